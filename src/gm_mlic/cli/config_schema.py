"""Which settings there are: the keys of ``conf/``, which a config may neither add to nor lack.

Hydra itself refuses only a key that the command line changes and no file has; not one that is added (``+graph.q=1``),
taken away (``~graph.m``), or misspelt in a file of one's own (``--config-dir``).
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

#: The key that says which kind of thing a section sets up; each kind has keys of its own. A kind that ``conf/`` does
#: not have is somebody's own (docs/add_model.md), and so are its keys.
_KIND = "name"

#: The keys of a section: those of a section below, or None for a value.
Keys = dict[str, Any]


def check_keys(config: DictConfig, command: str) -> None:
    """Raise :class:`~gm_mlic.errors.ConfigError` for a key that ``command`` does not have, or one that is missing.

    Args:
        config: as it was composed.
        command: a file of ``conf/`` without its suffix.
    """
    keys, groups = _keys_of(command)
    # A section that a command chooses nothing for (``embedding: null``) is there only if it was asked for.
    keys = {group: {} for group in groups if group in config} | keys
    _check(OmegaConf.to_container(config), keys, groups, "")


def options(group: str) -> list[str]:
    """The options of a group, as ``experiment``; none if there is no such group."""
    return sorted(file.stem for file in (_conf() / group).glob("*.yaml"))


def unknown(key: str, known: Iterable[str], kind: str = "") -> str:
    """Say that there is no setting ``key``, and which there are where it was looked for, in a section of some kind."""
    parent, _, name = key.rpartition(".")
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    where = f"{parent}{kind} has" if parent else "there are"
    hint = f"did you mean {parent + '.' if parent else ''}{close[0]}? " if close else ""
    return f"{key}: there is no such setting; {hint}{where} {', '.join(known)}."


def groups_of(command: str) -> list[str]:
    """The groups that a command chooses from."""
    return [str(key).partition("@")[0] for key in _defaults(command) if not str(key).startswith("override ")]


def _check(tree: Any, keys: Keys, groups: Mapping[str, str], path: str) -> None:
    """Hold the section at ``path`` to its keys; ``groups`` are those that sections come from, by path."""
    if path in groups:
        kinds = _of_its_kind(groups[path], tree)
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
        inside = f"{path}.{key}" if path else key
        if key not in tree:
            raise ConfigError(f"{inside} is missing: give it a value (conf/ says what it decides).")
        if isinstance(below, dict):
            _check(tree[key], below, groups, inside)


@functools.cache
def _keys_of(command: str) -> tuple[Keys, dict[str, str]]:
    """The keys of a command's own file with those of its sections, and the group that each section comes from."""
    content = _read(_conf() / f"{command}.yaml")
    keys = _tree({key: value for key, value in content.items() if key not in ("defaults", "hydra")})
    groups = {}
    for key, choice in _defaults(command).items():
        group, _, package = key.partition("@")
        if " " in group or _changes_others(group):
            continue
        groups[package or group] = group
        if choice is None:
            continue
        section = keys
        for part in (package or group).split("."):
            section = section.setdefault(part, {})
    return keys, groups


def _defaults(command: str) -> dict[str, Any]:
    """What a command's defaults list chooses from its groups."""
    listed = _read(_conf() / f"{command}.yaml").get("defaults", [])
    return {str(key): choice for item in listed if isinstance(item, dict) for key, choice in item.items()}


def _of_its_kind(group: str, tree: Any) -> list[Keys]:
    """The keys of those options of a group that set up what this section does."""
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
def _changes_others(group: str) -> bool:
    """Whether the options of a group are changes to other sections, and no section of their own."""
    return all(
        (_conf() / group / f"{name}.yaml").read_text().startswith("# @package _global_") for name in options(group)
    )


def _read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text()) or {}


def _conf() -> Path:
    return Path(str(importlib.resources.files("gm_mlic.conf")))
