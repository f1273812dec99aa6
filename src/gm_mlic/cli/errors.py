"""One-line error messages and exit codes for exceptions."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Sequence

import yaml
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from gm_mlic.errors import GMMLICError
from gm_mlic.io import first_line
from gm_mlic.registry import plugin_failure

_USER_OS_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space, then run the same command again to resume",
    errno.EDQUOT: "the disk quota is exceeded; free some space, then run the same command again to resume",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "part of this path is a file, not a folder: choose another path",
    errno.EEXIST: "a file with this name exists, a folder is needed: choose another path",
    errno.EISDIR: "a folder with this name exists, a file is needed: choose another path",
    errno.ENAMETOOLONG: "the name is too long for the file system: choose another path",
}


#: Messages of torch.distributed when another process has ended.
_PEER_LOST = re.compile(r"^Dist\w*Error:|gloo/transport|NCCL (error|communicator)|[Cc]onnection (closed|reset) by peer")
#: Advice for out-of-memory errors.
_LESS_MEMORY = {
    "train": "lower trainer.batch_size (instances.batch_size during extraction), or set "
    "model.gradient_checkpointing=true, which needs less memory and more time; then run the same command again to "
    "resume.",
    "predict": "lower batch_size, or scale the largest photos down.",
    "explain": "scale the photo down.",
    "export": "set a smaller size.",
}
#: How to run commands that call torch.compile without it.
_WITHOUT_COMPILE = {"train": "set trainer.compile=false", "bench": "remove compiled from bench.executions"}
#: Errors of torch.compile for a missing or broken C++ compiler. The last one is the message of Triton.
_NO_COMPILER = re.compile(r"^(InvalidCxxCompiler|CppCompileError):|Failed to find C compiler")
_NO_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory")


def explain(error: BaseException, command: str, arguments: Sequence[str]) -> tuple[str, int]:
    """Error message in one line, and exit code, for an exception of ``gm-mlic COMMAND ARGUMENTS``."""
    message = _user_error(error, command, arguments)
    if message is None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return f"internal error: {text} (run with --verbose for the traceback, and please report it)", 1
    return f"error: {' '.join(message.split())}", error.exit_code if isinstance(error, GMMLICError) else 2


def _user_error(error: BaseException, command: str, arguments: Sequence[str]) -> str | None:
    """What is wrong and what to do next; None for an internal error."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, GMMLICError):
        return f"{error}{_set_by(str(error), command, arguments)}"
    if returns := [argument for argument in arguments if "\r" in argument]:
        return f"{returns[0]!r}: remove the carriage return; scripts need Unix line ends."
    if sys.flags.optimize and "override_parser" in "".join(traceback.format_tb(error.__traceback__)):
        return "Hydra's parser needs assertions: unset PYTHONOPTIMIZE, or run Python without -O."
    if isinstance(error, yaml.YAMLError) or (isinstance(error, ValueError) and "Invalid defaults list" in text):
        return str(error)  # of a file of --config-dir
    if isinstance(error, RecursionError) and any(a.startswith(("--config-dir", "-cd")) for a in arguments):
        return "a file of --config-dir includes itself: check the lists `defaults:` in this folder."
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return config_error(error, command)
    if isinstance(error, OSError) and error.errno in _USER_OS_ERRORS:
        return f"{error.filename or ''}: {_USER_OS_ERRORS[error.errno]}.".removeprefix(": ")
    if isinstance(error, FileNotFoundError) and any(a.endswith(f"={error.filename}") for a in arguments):
        return f"{error.filename}: no such file or folder, and none can be created: choose another path."
    # By name, since importing torch is slow. On a CPU, torch raises RuntimeError.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY.search(str(error)):
        return f"out of memory: {_LESS_MEMORY.get(command, _LESS_MEMORY['train'])}"
    if isinstance(error, RuntimeError) and _PEER_LOST.search(text):
        return (
            "another process of this run has ended (its error, if any, is above); run the same command again to resume."
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return (
            "a data loader worker was killed, possibly by the system for lack of memory: lower instances.num_workers "
            "and trainer.num_workers (0: no workers), then run the same command again to resume."
        )
    if command in _WITHOUT_COMPILE and type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return _compile_error(error, command)
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        return _invalid_option(arguments)
    if isinstance(error, ValueError) and "StudyDirection" in str(error):
        return "hydra.sweeper.direction: expected one of minimize, maximize."
    return plugin_failure(error)


def _compile_error(error: BaseException, command: str) -> str:
    """Message for an error of torch.compile."""
    cause: BaseException = getattr(error, "inner_exception", error)  # the first line of the outer error names no cause
    lines = f"{type(cause).__name__}: {cause}".splitlines()
    install = "install a C++ compiler, or " if _NO_COMPILER.search(lines[0]) else ""
    return f"torch.compile failed ({lines[0]}): {install}{_WITHOUT_COMPILE[command]}."


def config_error(error: BaseException, command: str) -> str:
    """Message for an error of Hydra or OmegaConf, with valid values or keys."""
    if isinstance(error, OverrideParseException):
        return _syntax_error(error, command)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if option in ("joblib", "submitit_local", "submitit_slurm", "optuna"):
            return f"{group}={option} is not installed: pip install 'gm-mlic[sweep]'."
        listed = ", ".join(sorted(name for name in error.options if not name.startswith("_")))
        has_plugins = group in ("detector", "dataset", "model", "embedding")
        plugin = ", or that of a plugin (plugins=[MODULE])" if has_plugins else ""
        return f"{group}={option}: unknown option; choose from {listed}{plugin}."
    message = str(error)
    if isinstance(error, (MissingMandatoryValue, InterpolationToMissingValueError)):
        found = re.search(r"(?:[Mm]issing mandatory value: |node ')([\w.]+)", message)
        key = found[1] if found else str(getattr(error, "full_key", "") or "a setting")
        return f"{key} has no value: set it with {key}=VALUE."
    if isinstance(error, InterpolationKeyError):
        name = re.search(r"'([^']*)'", message)
        return f"{error.full_key}: ${{{name[1] if name else ''}}} is no setting; gm-mlic {command} --help lists them."
    if several := re.match(r"Ambiguous value for argument '([^']*?)=([^']*)'", message):
        key, values = several.groups()
        return f"{key}={values}: add -m to run each of these values, or write {key}=[{values}] for a list."
    if isinstance(error, ConfigCompositionException):
        if no_match := re.search(r"Could not override '([\w/@.]+)'", message):  # of a search
            return f"{no_match[1]}: unknown setting; see gm-mlic {command} --help."
        if error.__cause__ is not None:
            message += f" ({first_line(error.__cause__)})"
    return re.sub(r"\s+(object|reference)_type=\w+", "", message)


def _syntax_error(error: OverrideParseException, command: str) -> str:
    """Message for a setting that Hydra cannot parse."""
    setting = error.override
    if "=" not in setting:
        return f"{setting}: settings are written as KEY=VALUE; gm-mlic {command} --help has examples."
    key, _, value = setting.partition("=")
    if re.search(r" \w[\w./]*=", value):
        return f"{setting}: write settings as separate arguments, without quotes around several of them."
    quoted = '"' + value.strip("'\"").replace('"', "") + '"'
    return f"{setting}: Hydra cannot parse this value; if it is a text, write it in quotes: {key}='{quoted}'."


def _set_by(message: str, command: str, arguments: Sequence[str]) -> str:
    """Where a key with an error comes from that is not on the command line."""
    key = re.match(r"([\w.]+)(=.*)?: (unknown setting|expected )", message)
    presets = [a for a in arguments if re.match(r"(experiment|ablation|sweep)=", a)]
    if key is None or any(a.lstrip("+~").startswith(key[1]) for a in arguments):
        return ""
    if command == "train-detector":
        return " train-detector is for Faster R-CNN of torchvision, e.g. detector=mobilenet_v3_large_fpn."
    return f" It is set by {' or '.join(presets)}: leave that out." if presets else ""


def _invalid_option(arguments: Sequence[str]) -> str:
    """Message for a group option that is not a name, e.g. ``model=5``; Hydra's message lacks the group."""
    from gm_mlic.cli.compose import options

    for argument in arguments:
        group = argument.lstrip("+").partition("=")[0]
        if options(group) and not re.search(r"=.*[A-Za-z]", argument.replace("null", "")):
            return f"{argument}: unknown option; choose from {', '.join(options(group))}."
    return "the option of a config group (model, dataset, ...) must be a name."
