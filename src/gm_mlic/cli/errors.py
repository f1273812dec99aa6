"""Say any exception in one line, with the exit code that belongs to it."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from gm_mlic.cli.config_schema import groups_of, options, unknown
from gm_mlic.errors import GMMLICError

_MENDABLE_OS_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space, then run the same command again: it continues",
    errno.EDQUOT: "the disk quota is used up; free some space, then run the same command again: it continues",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of this path is a file, where a folder is needed: choose another place",
    errno.EEXIST: "there is a file of this name, where a folder is needed: choose another place",
    errno.EISDIR: "there is a folder of this name, where a file is needed: choose another place",
    errno.ENAMETOOLONG: "this name is too long for the file system: choose another place",
}


#: What torch.distributed says when the other side of a connection is gone.
_OTHER_GONE = re.compile(
    r"^Dist\w*Error:|gloo/transport|NCCL (error|communicator)|[Cc]onnection (closed|reset) by peer"
)
#: What to do where memory is full.
_LESS_MEMORY = {
    "train": "lower trainer.batch_size (instances.batch_size while extracting), or set "
    "model.gradient_checkpointing=true, which takes less memory and more time; then run the same command again: it "
    "continues.",
    "predict": "lower batch_size, or scale the largest photos down.",
    "explain": "scale the photo down.",
    "export": "set a smaller size.",
}
_NO_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")


def explain(error: BaseException, command: str, arguments: Sequence[str]) -> tuple[str, int]:
    """One line for people, and the exit code.

    Args:
        error: what was raised.
        command: the command it was raised in.
        arguments: that command's arguments; they help to name what would have been right.
    """
    if isinstance(error, GMMLICError):
        return f"error: {_one_line(str(error))}", error.exit_code
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return f"error: {_one_line(_setting(error, command, arguments))}", 2
    if isinstance(error, OSError) and error.errno in _MENDABLE_OS_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{_MENDABLE_OS_ERRORS[error.errno]}.", 2
    # torch's own class, on a GPU; importing torch only to name it would be slow. On a CPU it says RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(str(error)):
        remedy = _LESS_MEMORY.get(command, _LESS_MEMORY["train"])
        return f"error: memory is full: {remedy}", 2
    if isinstance(error, RuntimeError) and _OTHER_GONE.search(f"{type(error).__name__}: {error}"):
        return (
            "error: another process of this run has ended (if it said why, that is above); run the same command again: "
            "it continues.",
            2,
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return (
            "error: a process that reads images was killed, by the system if memory was short: lower "
            "instances.num_workers and trainer.num_workers (0 reads in the main process), then run the same command "
            "again: it continues.",
            2,
        )
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        why = _one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        return (
            f"error: torch.compile failed ({why}): it needs a C++ compiler; or do without (trainer.compile=false).",
            2,
        )
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        return f"error: {_no_option(arguments)}", 2
    if isinstance(error, ValueError) and "StudyDirection" in str(error):
        return "error: hydra.sweeper.direction: expected one of minimize, maximize.", 2
    what = _one_line(f"{type(error).__name__}: {error}")
    return f"internal error: {what} (run with --verbose for the traceback, and please report it)", 1


def _setting(error: BaseException, command: str, arguments: Sequence[str]) -> str:
    """What is wrong with a setting, and what would be right."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if option in ("joblib", "submitit_local", "submitit_slurm", "optuna"):
            return f"{group}={option} is not installed: pip install 'gm-mlic[sweep]'."
        return f"{group}={option}: there is no such option; choose from {', '.join(sorted(error.options))}."
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        return _unknown_key(str(cause.full_key), command, arguments)
    if isinstance(error, (MissingMandatoryValue, InterpolationToMissingValueError)):
        found = re.search(r"[Mm]issing mandatory value: ([\w.]+)", str(error)) or re.search(
            r"node '([\w.]+)'", str(error)
        )
        key = found.group(1) if found else str(getattr(error, "full_key", "") or "a setting")
        return f"{key} has no value: set it with {key}=VALUE."
    several = re.match(r"Ambiguous value for argument '([^']*?)=([^']*)'", str(error))
    if several:
        key, values = several.groups()
        return f"{key}={values}: add -m to run each of these, or write {key}=[{values}] if they are one list."
    no_match = re.search(r"Could not override '([\w/@.]+)'", str(error))
    if isinstance(error, ConfigCompositionException) and no_match:
        return _unknown_key(no_match.group(1), command, arguments)
    message = str(error)
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        message += f" ({str(error.__cause__).splitlines()[0]})"
    return re.sub(r"\s+(object|reference)_type=\w+", "", message)


def _no_option(arguments: Sequence[str]) -> str:
    """Say which group got something that is no name, as ``model=5``; there Hydra names nothing."""
    for argument in arguments:
        group = argument.lstrip("+").partition("=")[0]
        if options(group) and not re.search(r"=.*[A-Za-z]", argument.replace("null", "")):
            return f"{argument}: there is no such option; choose from {', '.join(options(group))}."
    return "a group of settings (model, dataset, ...) was given something that is no name of an option."


def _unknown_key(key: str, command: str, arguments: Sequence[str]) -> str:
    """Name the settings that stand where ``key`` was looked for."""
    from gm_mlic.cli.compose import compose

    parent = key.rpartition(".")[0]
    name = command.replace("-", "_")
    groups = [a for a in arguments if re.fullmatch(r"\w+=\w+", a) and not a.startswith(f"{key}=")]
    try:
        config: DictConfig = compose(name, groups)
        section = OmegaConf.select(config, parent) if parent else config
        known = {str(k) for k in section}
    except Exception:
        return f"{key}: there is no such setting; see gm-mlic {command} --help."
    return unknown(key, known if parent else known | set(groups_of(name)))


def _one_line(text: str) -> str:
    return " ".join(text.split())
