"""User errors. The command line prints their message as one line and exits with their code.

A message is one line: what is wrong, where, and what to do next. Exceptions other than :class:`GMMLICError` are
reported as internal errors.

Messages name library arguments, between backticks (```download=True```), which :func:`config_keys` replaces by config
keys (``dataset.download=true``).
"""

from __future__ import annotations

import contextlib
import numbers
import re
from collections.abc import Iterable, Iterator


class GMMLICError(Exception):
    """Base class of errors that the user can fix; ``str(error)`` is one line."""

    exit_code: int = 2


class Terminated(SystemExit):
    """Termination by SIGTERM, for example on preemption by a cluster."""

    def __init__(self) -> None:
        super().__init__(143)  # 128 + SIGTERM, as in shells


class ConfigError(GMMLICError):
    """Invalid setting or combination of settings."""


class ArgumentError(ConfigError, ValueError):
    """Invalid argument of a function or class.

    The message names the argument, and :func:`config_keys` makes ``model.k must be ...`` of ``k must be ...``.

    Args:
        argument: name of the argument.
        problem: rest of the sentence, for example ``"must be 1 or more, got 0."``.
    """

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument} {problem}")
        self.argument, self.problem = argument, problem

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str]]:
        return type(self), (self.argument, self.problem)


def check_positive(**sizes: int) -> None:
    """Raise :class:`ArgumentError` for the first argument that is not a whole number, or below 1."""
    for argument, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, numbers.Integral):
            raise ArgumentError(argument, f"must be a whole number, got {size!r}.")
        if size < 1:
            raise ArgumentError(argument, f"must be 1 or more, got {size}.")


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raise :class:`ArgumentError` unless ``value`` is one of the choices."""
    known = tuple(choices)
    if value not in known:
        raise ArgumentError(argument, f"is {value!r}: choose one of {', '.join(known)}.")


#: Argument in a message, optionally with a key or value: `part`, `part='all'`, `columns['file']`.
_ARGUMENT = re.compile(r"`([a-z]\w*(?:\['\w+'\])*)(?:=([^`]*))?`")
_LITERALS = {"True": "true", "False": "false", "None": "null"}


@contextlib.contextmanager
def config_keys(section: str = "", **keys: str) -> Iterator[None]:
    """Context manager that replaces argument names by config keys in error messages.

    Args:
        section: config section of the arguments, for example ``dataset``; empty for the top level.
        **keys: full config keys of arguments with another name in the config.
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
    """Missing, malformed or inconsistent dataset file."""


class UnreadableImage(DataError):  # noqa: N818 - describes the image
    """Image that cannot be decoded. Extraction records it and continues; other callers stop."""


class StoreError(GMMLICError):
    """Instances that violate the protocol, or a store that is missing, incomplete, damaged, or made for other data."""


class WeightsError(GMMLICError):
    """Weights file or checkpoint that is missing, malformed, or does not match the model or labels."""
