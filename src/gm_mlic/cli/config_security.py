"""What a command line, and configs that come from elsewhere (``--config-dir``), may have Hydra do.

Hydra makes objects of any class that a config names (``_target_``, and the classes of its logging section), so a config
from elsewhere is a program. Here it is data: it may name the classes of this list and no others.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gm_mlic.errors import ConfigError

#: Flags of Hydra that do no more than they say. Left out are those that read a pickle (``--experimental-rerun``) or
#: take another config for a command's own.
FLAGS = {
    "--help", "-h", "--hydra-help", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--multirun", "-m",
    "--info", "-i", "--config-dir", "-cd", "--shell-completion", "-sc",
}  # fmt: skip

#: Launchers, sweepers, samplers and callbacks.
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
#: Classes and streams of a logging section.
LOGGING = {
    "logging.FileHandler", "logging.Formatter", "logging.NullHandler", "logging.StreamHandler",
    "ext://sys.stderr", "ext://sys.stdout",
}  # fmt: skip
#: Keys whose values are called.
_CALLS = {"_target_", "class", "()", "factory"}
#: Keys that may be set on the command line, but not elsewhere: variables of the environment, a shell script on a
#: cluster, where a log is written, where more configs come from.
_OURS = {"env_set", "setup", "teardown", "srun_args", "filename", "searchpath"}
#: More values than any config has: aliases of aliases, that grow without end.
_MOST_VALUES = 100_000


def check_arguments(arguments: Sequence[str]) -> list[Path]:
    """Raise :class:`~gm_mlic.errors.ConfigError` for what a command line, or a config that it brings, may not do.

    Returns:
        The folders with configs that it brings.
    """
    folders = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        if argument.startswith("-"):
            flag, _, value = argument.partition("=")
            if flag not in FLAGS:
                raise ConfigError(f"{flag}: there is no such option; there are {', '.join(sorted(FLAGS))}, --verbose.")
            if flag in ("--config-dir", "-cd"):
                folders.append(Path(value or following))
        elif argument.lstrip("+~").startswith("hydra.searchpath"):
            raise ConfigError(f"{argument}: give a folder with configs as --config-dir DIR.")
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
    """A command line is its user's own; still, what it calls is of the list (as ``hydra.callbacks.x._target_=...``)."""
    if key.rpartition(".")[2] in _CALLS and value.strip("'\"") not in TARGETS | LOGGING:
        raise ConfigError(f"{where}: {key}={value} is not of the classes that a config may name.")
    for name in re.findall(r"_target_['\"]?\s*:\s*['\"]?([^\s,'\"}]+)", value):
        if name not in TARGETS:
            raise ConfigError(f"{where}: {key} names {name}, which is not of the classes that a config may name.")


def _check_file(file: Path) -> None:
    try:
        documents = list(yaml.safe_load_all(file.read_text()))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: no readable YAML: {' '.join(str(error).split())}") from error
    for number, (key, value) in enumerate(_leaves(documents)):
        bad = None
        if number > _MOST_VALUES or key is None:
            bad = "is larger or deeper than any config"
        elif key in _OURS:
            bad = f"sets {key}"
        elif key in _CALLS and not (isinstance(value, str) and value in TARGETS | LOGGING):
            bad = f"names {value}"
        elif isinstance(value, str) and value not in LOGGING and _HIDDEN.search(value):
            bad = f"hides a call in {value!r}"
        if bad is not None:
            raise ConfigError(f"{file}: {bad}, which a config from elsewhere may not (docs/reliability.md).")


#: A mapping, or an import, written as a text.
_HIDDEN = re.compile(r"_target_|\b(?:ext|cfg)://|\$\{\s*oc\.(?:create|decode)")


def _leaves(tree: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str | None, Any]]:
    """The last key and the value of everything that is no container; of what is called or ours, of containers too.

    A key of None stands for what is too deep to look at.
    """
    if depth > 50:
        yield None, None
        return
    if isinstance(tree, dict):
        for name, value in tree.items():
            # A key may be dotted, or be that of a defaults list (override group@package).
            last = re.split(r"[.@/]", str(name))[-1]
            if last in _OURS | _CALLS and isinstance(value, (dict, list)):
                yield last, value
            yield from _leaves(value, last, depth + 1)
    elif isinstance(tree, list):
        for value in tree:
            yield from _leaves(value, "", depth + 1)
    else:
        yield key, tree
