"""Errors that a user can mend. The command line prints their message as one line and exits with their code.

Every message says what is wrong, where, and what to do next. Anything that is not a :class:`GMMLICError` is a
defect of this package, and is reported as one.

The library names its arguments, between backticks where a message mentions them (```download=True```).
:func:`config_keys` puts config keys in their place (``dataset.download=true``).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class GMMLICError(Exception):
    """Base of all errors that the user can mend; ``str(error)`` is one line: what is wrong and what to do next."""

    exit_code: int = 2


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM), as clusters do before they take a machine back."""

    def __init__(self) -> None:
        super().__init__(143)  # 128 + SIGTERM, as shells have it


class ConfigError(GMMLICError):
    """A setting, or a combination of settings, that cannot work."""


class ArgumentError(ConfigError, ValueError):
    """An argument of a function or class has a value that cannot work.

    The library names the argument; the command line adds the config group, so that ``k must be 1 or more`` becomes
    ``model.k must be 1 or more``.

    Args:
        argument: name of the argument.
        problem: what is wrong with its value, the rest of the sentence: ``"must be 1 or more, got 0."``.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument} {problem}")
        self.argument, self.problem = argument, problem

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str]]:
        return type(self), (self.argument, self.problem)


def check_positive(**sizes: int) -> None:
    """Raise :class:`ArgumentError` for the first of some arguments that is below 1."""
    for argument, size in sizes.items():
        if size < 1:
            raise ArgumentError(argument, f"must be 1 or more, got {size}.")


#: An argument, perhaps with a key and a value, as messages have it: `part`, `part='all'`, `columns['file']`.
_ARGUMENT = re.compile(r"`([a-z]\w*(?:\['\w+'\])*)(?:=([^`]*))?`")
_LITERALS = {"True": "true", "False": "false", "None": "null"}


@contextlib.contextmanager
def config_keys(section: str = "", **keys: str) -> Iterator[None]:
    """Let errors that are raised within this context name config keys instead of arguments.

    Args:
        section: that the arguments come from, as ``dataset``; empty for the top of the config.
        **keys: full keys of arguments that the config calls something else.

    Example:
        >>> with config_keys("model"):
        ...     raise ArgumentError("k", "must be 1 or more, got 0.")
        Traceback (most recent call last):
        gm_mlic.errors.ConfigError: model.k must be 1 or more, got 0.
    """

    def key_of(argument: str) -> str:
        name, *parts = re.findall(r"\w+", argument)
        return ".".join([keys.get(name, f"{section}.{name}" if section else name), *parts])

    def named(match: re.Match[str]) -> str:
        argument, value = match.groups()
        if value is None:
            return key_of(argument)
        return f"{key_of(argument)}={_LITERALS.get(value, value.strip(chr(39)))}"

    try:
        yield
    except ArgumentError as error:
        raise ConfigError(f"{key_of(error.argument)} {_ARGUMENT.sub(named, error.problem)}") from error
    except GMMLICError as error:
        error.args = (_ARGUMENT.sub(named, str(error)), *error.args[1:])
        raise


class DataError(GMMLICError):
    """Something in a dataset's files is missing, malformed or inconsistent."""


class UnreadableImage(DataError):  # noqa: N818 - named for what it is about
    """One image cannot be decoded. Extraction records it and goes on; everything else stops."""


class StoreError(GMMLICError):
    """An instance store is missing, unfinished, damaged, or was made for something else."""


class WeightsError(GMMLICError):
    """A weights file or checkpoint is missing, malformed, or does not fit the model or the labels."""
