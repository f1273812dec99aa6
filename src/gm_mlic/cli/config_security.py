"""Security checks of command lines and custom configs (``--config-dir``).

Hydra instantiates any class that a config names (``_target_``, and the classes of its logging section), so an untrusted
config could run code. Configs may therefore only name the classes listed here.
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

#: Allowed launchers, sweepers, samplers and callbacks.
TARGETS = {
    "gm_mlic.cli.commands.SweepFolder",
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    *(
        f"optuna.samplers.{name}"
        for name in ("CmaEsSampler", "GridSampler", "MOTPESampler", "NSGAIISampler", "RandomSampler", "TPESampler")
    ),
}
#: Allowed classes and streams of a logging section.
LOGGING = {
    "logging.FileHandler", "logging.Formatter", "logging.NullHandler", "logging.StreamHandler",
    "ext://sys.stderr", "ext://sys.stdout",
}  # fmt: skip
#: Keys whose values are called.
_CALLS = {"_target_", "class", "()", "factory"}
#: Keys allowed on the command line only: environment variables, shell commands on a cluster, log files, config paths.
_COMMAND_LINE_ONLY = {"env_set", "setup", "teardown", "srun_args", "filename", "searchpath"}
#: Limit on the number of values, which nested YAML aliases can multiply.
_MOST_VALUES = 100_000


def check_arguments(arguments: Sequence[str]) -> list[Path]:
    """Check a command line and the configs of its ``--config-dir``.

    Returns:
        The folders given as ``--config-dir``.

    Raises:
        ConfigError: for flags, classes or keys that are not allowed.
    """
    folders = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument.startswith("-"):
            flag, _, value = argument.partition("=")
            if flag not in FLAGS:
                raise ConfigError(f"{flag}: unknown flag; choose from {', '.join(sorted(FLAGS))}, --verbose.")
            if flag in ("--config-dir", "-cd"):
                folders.append(Path(value or following))
        elif argument.lstrip("+~").startswith("hydra.searchpath"):
            raise ConfigError(f"{argument}: pass a folder of configs as --config-dir DIR.")
        elif "=" in argument:
            key, _, value = argument.lstrip("+~").partition("=")
            if not key:
                raise ConfigError(f"{argument}: settings are written as KEY=VALUE.")
            if key == "sweep" and "," in value and not value.startswith("["):
                raise ConfigError(f"{argument}: write sweep=[{value}] to run every combination of these.")
            _check_target(key, value, "the command line")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {folder}: no such folder.")
        for file in sorted((*folder.rglob("*.yaml"), *folder.rglob("*.yml"))):
            _check_file(file)
    return folders


def _check_target(key: str, value: str, where: str) -> None:
    """Check classes named in a setting of the command line, e.g. ``hydra.callbacks.x._target_=...``."""
    if key.rpartition(".")[2] in _CALLS and value.strip("'\"") not in TARGETS | LOGGING:
        raise ConfigError(f"{where}: {key}={value} is not an allowed class.")
    for name in re.findall(r"_target_['\"]?\s*:\s*['\"]?([^\s,'\"}]+)", value):
        if name not in TARGETS:
            raise ConfigError(f"{where}: {key} names {name}, which is not an allowed class.")


def _check_file(file: Path) -> None:
    try:
        documents = list(yaml.safe_load_all(file.read_text()))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not readable YAML: {' '.join(str(error).split())}") from error
    for number, (key, value) in enumerate(_leaves(documents)):
        problem = None
        if number > _MOST_VALUES or key is None:
            problem = "is too large or too deep"
        elif key in _COMMAND_LINE_ONLY:
            problem = f"sets {key}"
        elif key in _CALLS and not (isinstance(value, str) and value in TARGETS | LOGGING):
            problem = f"names {value}"
        elif isinstance(value, str) and value not in LOGGING and _HIDDEN.search(value):
            problem = f"hides a call in {value!r}"
        if problem is not None:
            raise ConfigError(f"{file}: {problem}, which custom configs may not (docs/reliability.md).")


#: Mappings and imports in strings.
_HIDDEN = re.compile(r"_target_|\b(?:ext|cfg)://|\$\{\s*oc\.(?:create|decode)")


def _leaves(tree: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str | None, Any]]:
    """Last key and value of all scalars, and of containers under restricted keys; key None for too deep content."""
    if depth > 50:
        yield None, None
        return
    if isinstance(tree, dict):
        for name, value in tree.items():
            # Keys may be dotted, or entries of a defaults list (override group@package).
            last = re.split(r"[.@/]", str(name))[-1]
            if last in _COMMAND_LINE_ONLY | _CALLS and isinstance(value, (dict, list)):
                yield last, value
            yield from _leaves(value, last, depth + 1)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, "", depth + 1)
    else:
        yield key, tree
