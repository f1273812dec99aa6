"""Config schema: the keys of ``conf/``, which every config must have, and no others.

Hydra alone rejects unknown keys only in plain overrides; not in added keys (``+graph.q=1``), removed keys
(``~graph.m``) or custom files (``--config-dir``).
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from gm_mlic.errors import ConfigError

#: Key that selects the kind of a section; each kind has its own keys. Kinds that are not in ``conf/`` are custom
#: (docs/add_model.md), and their keys are not checked.
_KIND = "name"

#: Keys of a section, with the keys of a nested section, or None for a value.
Keys = dict[str, Any]


def check_keys(config: DictConfig, command: str) -> None:
    """Check the keys of a config.

    Args:
        config: the composed config.
        command: name of a file in ``conf/`` without its suffix.

    Raises:
        ConfigError: for an unknown or missing key.
    """
    keys, groups = _keys_of(command)
    # Groups without a default (``embedding: null``) are optional sections.
    keys = {group: {} for group in groups if group in config} | keys
    _check(OmegaConf.to_container(config), keys, groups, "")


def options(group: str) -> list[str]:
    """Options of a config group; empty for unknown groups."""
    return sorted(file.stem for file in (_conf() / group).glob("*.yaml"))


def unknown(key: str, known: Iterable[str], kind: str = "") -> str:
    """Error message for an unknown key, with a suggestion and the known settings of its section.

    Args:
        key: the unknown key.
        known: settings of its section.
        kind: kind of the section, for the message.
    """
    parent, _, name = key.rpartition(".")
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {parent + '.' if parent else ''}{close[0]}?" if close else "."
    section = f" of {parent}{kind}" if parent else ""
    return f"{key}: unknown setting{hint} Settings{section}: {', '.join(known)}."


def groups_of(command: str) -> list[str]:
    """Config groups of a command."""
    return [str(key).partition("@")[0] for key in _defaults(command) if not str(key).startswith("override ")]


def _check(tree: Any, keys: Keys, groups: Mapping[str, str], path: str) -> None:
    """Check the section at ``path``; ``groups`` are the config groups of the sections, by path."""
    if path in groups:
        kinds = _matching_options(groups[path], tree)
        if not kinds:
            return
        keys = keys | {key: below for kind in kinds for key, below in kind.items()}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}={'null' if tree is None else tree}: expected settings: {', '.join(sorted(keys))}.")
    for key in tree:
        if key not in keys and (path or key != "hydra"):
            kind = f" ({tree[_KIND]})" if _KIND in tree and path in groups else ""
            raise ConfigError(unknown(f"{path}.{key}" if path else str(key), keys, kind))
    for key, below in keys.items():
        full_key = f"{path}.{key}" if path else key
        if key not in tree:
            raise ConfigError(f"{full_key} is missing: set it (conf/ describes it).")
        if isinstance(below, dict):
            _check(tree[key], below, groups, full_key)


@functools.cache
def _keys_of(command: str) -> tuple[Keys, dict[str, str]]:
    """Keys of a command's file and its sections, and the config group of each section."""
    content = _read(_conf() / f"{command}.yaml")
    keys = _tree({key: value for key, value in content.items() if key not in ("defaults", "hydra")})
    groups = {}
    for key, choice in _defaults(command).items():
        group, _, package = key.partition("@")
        if " " in group or _is_global(group):
            continue
        groups[package or group] = group
        if choice is None:
            continue
        section = keys
        for part in (package or group).split("."):
            section = section.setdefault(part, {})
    return keys, groups


def _defaults(command: str) -> dict[str, Any]:
    """Defaults list of a command: options by group."""
    listed = _read(_conf() / f"{command}.yaml").get("defaults", [])
    return {str(key): choice for item in listed if isinstance(item, dict) for key, choice in item.items()}


def _matching_options(group: str, tree: Any) -> list[Keys]:
    """Keys of the options of a group that have the same kind as the section."""
    found = _contents(group)
    if isinstance(tree, dict) and _KIND in tree and any(_KIND in option for option in found):
        found = [option for option in found if option.get(_KIND) == tree[_KIND]]
    return [_tree(option) for option in found]


@functools.cache
def _contents(group: str) -> list[dict[str, Any]]:
    return [_with_defaults(group, name) for name in options(group)]


def _with_defaults(group: str, name: str) -> dict[str, Any]:
    content = _read(_conf() / group / f"{name}.yaml")
    above: dict[str, Any] = {}
    for other in content.pop("defaults", []):
        if isinstance(other, str):
            above |= _with_defaults(group, other)
    return above | content


def _tree(content: Mapping[str, Any]) -> Keys:
    return {str(key): _tree(value) if isinstance(value, dict) else None for key, value in content.items()}


@functools.cache
def _is_global(group: str) -> bool:
    """Whether the options of a group have package ``_global_``, that is, change other sections."""
    return all(
        (_conf() / group / f"{name}.yaml").read_text().startswith("# @package _global_") for name in options(group)
    )


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text()) or {}


def _conf() -> Path:
    return Path(str(importlib.resources.files("gm_mlic.conf")))
