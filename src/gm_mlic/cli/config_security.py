"""Checks of command lines and of custom configs (``--config-dir``), which are not trusted.

Hydra instantiates classes that a config names with ``_target_``, evaluates interpolations such as ``${oc.env:HOME}``,
and configures logging with any class. Custom configs contain none of these, and no plugins. On the command line, only
the names of options select launchers, sweepers and samplers.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gm_mlic.errors import ConfigError

#: Allowed flags of Hydra. Flags that read a pickle (``--experimental-rerun``) or replace a command's config are not.
FLAGS = {
    "--help", "-h", "--hydra-help", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--multirun", "-m",
    "--info", "-i", "--config-dir", "-cd", "--shell-completion", "-sc",
}  # fmt: skip
#: Flags of which Hydra takes one only.
_MODES = {"--cfg", "-c", "--run", "-r", "--multirun", "-m", "--info", "-i", "--shell-completion", "-sc"}
#: Keys with a call, at any depth.
_CALLS = re.compile(r"_target_|_args_|_partial_|_convert_|job_logging|hydra_logging|callbacks")
#: An interpolation that calls a resolver, whose name may be an interpolation.
_RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)
#: Sections of Hydra that a custom config may set: sweeps.
_OF_HYDRA = {"mode", "sweeper"}
#: Limits on the number of values, which nested YAML aliases can multiply, and on nesting.
_MOST_VALUES, _DEEPEST = 100_000, 50


def check_arguments(arguments: Sequence[str]) -> list[Path]:
    """Check a command line and the configs of its ``--config-dir``; returns these folders.

    Raises:
        ConfigError: for flags or keys that are not allowed.
    """
    folders, modes = [], []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument.startswith("-"):
            flag, _, value = argument.partition("=")
            if flag not in FLAGS:
                raise ConfigError(f"{flag}: unknown flag; choose from {', '.join(sorted(FLAGS))}, --verbose.")
            if flag in ("--cfg", "-c") and (value or following) not in ("job", "hydra", "all"):
                raise ConfigError(f"{flag}: expected one of job, hydra, all.")
            if flag in ("--config-dir", "-cd"):
                folders.append(Path(value or following))
            if flag in _MODES:
                modes.append(flag)
        elif argument.lstrip("+~").startswith("hydra.searchpath"):
            raise ConfigError(f"{argument}: pass a folder of configs as --config-dir DIR.")
        elif "=" in argument:
            key, _, value = argument.lstrip("+~").partition("=")
            if not key:
                raise ConfigError(f"{argument}: settings are written as KEY=VALUE.")
            if key == "sweep" and "," in value and not value.startswith("["):
                raise ConfigError(f"{argument}: write sweep=[{value}] to run every combination of these.")
            if _CALLS.search(key) or "_target_" in value:
                raise ConfigError(f"{argument}: settings may not name classes to call.")
    if len(modes) > 1:
        raise ConfigError(f"{modes[0]} excludes {modes[1]}.")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: no such folder.")
        for file in sorted(folder.rglob("*.yaml")):
            _check_file(file, folder)
    return folders


def _check_file(file: Path, folder: Path) -> None:
    try:
        text = file.read_text()
        documents = list(yaml.safe_load_all(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not readable YAML: {' '.join(str(error).split())}") from error
    if not all(isinstance(document, (dict, type(None))) for document in documents):
        raise ConfigError(f"{file}: expected settings, as KEY: VALUE.")
    problem = None
    # The package of a file, to which its keys belong, follows from its header, folder and name.
    if re.search(r"^#\s*@package\b.*\bhydra", text, re.MULTILINE) or "hydra" in _parts(str(file.relative_to(folder))):
        problem = "changes Hydra"
    for number, (keys, value) in enumerate(_leaves(documents)):
        path = [part for key in keys for part in _parts(key)]
        if "defaults" in path and isinstance(value, str):  # an entry of a defaults list: GROUP/OPTION@PACKAGE
            path += _parts(value)
        of_hydra = path[path.index("hydra") :] if "hydra" in path else []
        if number > _MOST_VALUES or len(keys) > _DEEPEST:
            problem = "is too large or too deep"
        elif any(map(_CALLS.search, path)):
            problem = f"has the key {'.'.join(path)}"
        elif "plugins" in path:
            problem = "names plugins"
        elif of_hydra and not _OF_HYDRA.intersection(of_hydra[1:2]):
            problem = f"sets {'.'.join(path)}"
        elif _RESOLVER.search(f"{path} {value}") or "_target_" in str(value):
            problem = f"has the call {value!r}"
        if problem is not None:
            raise ConfigError(f"{file}: {problem}, which custom configs may not (docs/reliability.md).")


def _parts(key: str) -> list[str]:
    """Parts of a dotted key, a path, or an entry of a defaults list (``override GROUP@PACKAGE``)."""
    return [part for part in re.split(r"[.@/ ]", key) if part]


def _leaves(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Keys and value of all scalars."""
    if len(keys) > _DEEPEST or not isinstance(tree, (dict, list)) or not tree:
        yield keys, tree if not isinstance(tree, (dict, list)) else None
        return
    for name, value in tree.items() if isinstance(tree, dict) else (("", item) for item in tree):
        yield from _leaves(value, (*keys, str(name)))
