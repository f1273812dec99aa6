"""Model registry, as in timm: ``list_models("gm*")``, ``create_model("gm_mlic", ...)``.

Classes and functions are registered by a decorator::

    @register_model("my_model")
    class MyModel(nn.Module): ...
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from gm_mlic.errors import ConfigError

Builder = TypeVar("Builder", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """Registered class or function with preset arguments."""

    build: Callable[..., Any]
    preset: dict[str, Any]
    summary: str


class Registry:
    """Registry of classes or functions by name.

    Args:
        kind: noun for error messages, for example ``"model"``.
        home: module that registers the built-in entries, imported on first use.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind, self.home = kind, home
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, summary: str | None = None, **preset: Any) -> Callable[[Builder], Builder]:
        """Decorator that registers a class or function.

        Args:
            name: unique name.
            summary: one-line description; default: the first line of the docstring.
            **preset: default arguments of this name; callers can override them.
        """

        def decorate(build: Builder) -> Builder:
            if name in self._entries:
                raise ValueError(f"A {self.kind} named {name!r} is already registered.")
            first = (inspect.getdoc(build) or "").partition("\n")[0].rstrip(".")
            self._entries[name] = Entry(build, preset, summary or re.sub(r":class:`(\w+)`", r"`\1`", first))
            return build

        return decorate

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names that match a shell-style pattern."""
        importlib.import_module(self.home)
        return sorted(fnmatch.filter(self._entries, pattern))

    def entry(self, name: str) -> Entry:
        """Entry of ``name``.

        Raises:
            ConfigError: if the name is unknown; the message suggests the closest one.
        """
        names = self.names()
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"Unknown {self.kind} {name!r}.{hint} Choose from {', '.join(names)}.")
        return self._entries[name]

    def arguments(self, name: str) -> list[str]:
        """Argument names of a registered class or function."""
        return list(inspect.signature(self.entry(name).build).parameters)

    def build(self, name: str, **overrides: Any) -> Any:
        """Call a registered class or function.

        Args:
            name: one of :meth:`names`.
            **overrides: arguments; they take precedence over the preset.

        Raises:
            ConfigError: if the name or an argument is unknown, or an argument is missing. A TypeError raised inside the
                constructor is passed on.
        """
        entry = self.entry(name)
        arguments = {**entry.preset, **overrides}
        parameters = inspect.signature(entry.build).parameters.values()
        named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        unknown = sorted(arguments.keys() - {p.name for p in named}) if len(named) == len(parameters) else []
        missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
        if unknown:
            allowed = ", ".join(p.name for p in named)
            raise ConfigError(f"{entry.build.__name__} has no argument {unknown[0]!r}. It takes: {allowed}.")
        if missing:
            raise ConfigError(f"{entry.build.__name__} needs {' and '.join(missing)}.")
        return entry.build(**arguments)


MODELS = Registry("model", "gm_mlic.nn")


def register_model(name: str, summary: str | None = None, **preset: Any) -> Callable[[Builder], Builder]:
    """Decorator: make a class or function known to :func:`create_model <gm_mlic.create_model>` under ``name``.

    Args:
        name: a new name.
        summary: one line for lists; default: the first line of the docstring.
        **preset: arguments that the name stands for; a caller may override them.
    """
    return MODELS.register(name, summary, **preset)


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of registered models that match a shell-style pattern."""
    return MODELS.names(pattern)
