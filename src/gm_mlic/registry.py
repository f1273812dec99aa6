"""Registries of models, detectors, datasets and embeddings, as in timm.

Classes and functions are registered by a decorator. Their arguments are the settings of their config section::

    @register_model("my_model")
    class MyModel(nn.Module): ...

A package makes its own ones known by an entry point of the group ``gm_mlic.plugins`` that names a module. ``gm-mlic``
also imports the modules of ``plugins=[MODULE]``.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import importlib.metadata
import inspect
import logging
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from gm_mlic.errors import ConfigError, Terminated
from gm_mlic.io import first_line
from gm_mlic.schema import Setting, settings_of, summary_of

log = logging.getLogger(__name__)

#: Group of entry points.
PLUGINS = "gm_mlic.plugins"

Builder = TypeVar("Builder", bound=Callable[..., Any])

#: Packages and modules that are plugins.
_plugin_packages: set[str] = set()


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
        homes: modules, or packages with all their modules, that register the built-in entries; imported on first use.
        given: arguments that are no settings, since the program supplies them.
    """

    def __init__(self, kind: str, homes: Sequence[str], given: Sequence[str] = ()) -> None:
        self.kind, self.homes, self.given = kind, homes, tuple(given)
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, summary: str | None = None, **preset: Any) -> Callable[[Builder], Builder]:
        """Decorator that registers a class or function.

        Args:
            name: unique name.
            summary: one-line description; default: the first line of the docstring.
            **preset: default arguments of this name; callers can override them.
        """
        if not isinstance(name, str):
            raise TypeError(f'register_{self.kind} needs a name: @register_{self.kind}("my_{self.kind}")')
        if not re.fullmatch(r"[a-zA-Z0-9]\w*(-\w+)*", name):
            raise ValueError(f"the name {name!r} of a {self.kind} may have only letters, digits, _ and -")

        def decorate(build: Builder) -> Builder:
            if not callable(build):
                raise TypeError(f"register_{self.kind}({name!r}) needs a class or function, not {build!r}")
            if not is_built_in(build):
                self._import_homes()  # so that their names are taken
            if name in self._entries:
                raise ValueError(f"the {self.kind} {name!r} is already registered: choose another name")
            self._entries[name] = Entry(build, preset, summary or summary_of(build))
            return build

        return decorate

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names that match a shell-style pattern."""
        self._import_homes()
        import_entry_points()
        return sorted(fnmatch.filter(self._entries, pattern))

    def _import_homes(self) -> None:
        for home in self.homes:
            _import_all(home)

    def builders(self) -> tuple[tuple[str, Callable[..., Any]], ...]:
        """What is registered now: names, with their classes or functions."""
        return tuple((name, self._entries[name].build) for name in self.names())

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

    def settings(self, name: str) -> dict[str, Setting]:
        """Settings of a registered class or function: its arguments, with the defaults of the preset."""
        entry = self.entry(name)
        given = self.given + getattr(entry.build, "no_settings", ())
        found = settings_of(entry.build, given)
        found = {key: replace(s, default=entry.preset.get(key, s.default)) for key, s in found.items()}
        for key, setting in found.items():
            if not isinstance(setting.default, (type(None), bool, int, float, str, list, tuple, Mapping)):
                raise ConfigError(
                    f"The {self.kind} {name}: the default of {key} is a {type(setting.default).__name__}, expected a "
                    "number, a string, True, False, None or a list."
                )
        return found

    def attribute(self, name: str, attribute: str, default: Any = None) -> Any:
        """Attribute of a registered class or function."""
        return getattr(self.entry(name).build, attribute, default)

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
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        unknown = sorted(arguments.keys() - {p.name for p in named}) if len(named) == len(parameters) else []
        missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
        called = getattr(entry.build, "__name__", name)
        if inspect.isabstract(entry.build):
            raise ConfigError(
                f"{called} has no {' and '.join(sorted(getattr(entry.build, '__abstractmethods__', ())))}: correct it."
            )
        if unknown:
            allowed = ", ".join(p.name for p in named)
            raise ConfigError(f"{called} has no argument {unknown[0]!r}. It takes: {allowed}.")
        if missing:
            raise ConfigError(f"{called} needs {' and '.join(missing)}.")
        try:
            return entry.build(**arguments)
        except Terminated:
            raise
        except SystemExit as error:  # a plugin must not end gm-mlic without a message
            raise ConfigError(f"The {self.kind} {name}, {called}, called exit({error.code}): correct it.") from error


MODELS = Registry(
    "model",
    ["gm_mlic.nn", "gm_mlic.nn.baselines"],
    given=("instance_dim", "label_dim", "num_labels", "labels", "detector_labels"),
)
DETECTORS = Registry(
    "detector",
    ["gm_mlic.detection.faster_rcnn", "gm_mlic.detection.grid", "gm_mlic.detection.detectors"],
    given=("device",),
)
DATASETS = Registry("dataset", ["gm_mlic.datasets"], given=("split",))
EMBEDDINGS = Registry("embedding", ["gm_mlic.embeddings"], given=("labels",))
LOSSES = Registry(
    "loss", ["gm_mlic.losses"], given=("label_ratio", "validate_args", "target_format", "allow_all_present")
)
OPTIMIZERS = Registry("optimizer", ["gm_mlic.optim"], given=("params",))
SCHEDULERS = Registry("scheduler", ["gm_mlic.optim"], given=("optimizer", "steps", "last_epoch"))


def register_model(name: str, summary: str | None = None, **preset: Any) -> Callable[[Builder], Builder]:
    """Decorator: register a model, a class or function that returns a module, for ``model.name`` and
    :func:`create_model <gm_mlic.create_model>`.

    Args:
        name: a new name.
        summary: one line for lists; default: the first line of the docstring.
        **preset: arguments that the name stands for; a caller may override them.
    """
    return MODELS.register(name, summary, **preset)


def register_detector(name: str, summary: str | None = None, **preset: Any) -> Callable[[Builder], Builder]:
    """Decorator as :func:`register_model`: register a detector, a class or function that returns an
    :class:`~gm_mlic.detection.InstanceExtractor`, for ``detector.name``.

    It is called with its settings and, if it has such an argument, ``device``.
    """
    return DETECTORS.register(name, summary, **preset)


def register_dataset(name: str, summary: str | None = None, **preset: Any) -> Callable[[Builder], Builder]:
    """Decorator as :func:`register_model`: register a dataset, a class or function that returns a
    :class:`~gm_mlic.datasets.MultiLabelDataset`, for ``dataset.name``.

    It is called with its settings and ``split``: ``train``, ``val`` or ``test``.
    """
    return DATASETS.register(name, summary, **preset)


def register_embedding(name: str, summary: str | None = None, **preset: Any) -> Callable[[Builder], Builder]:
    """Decorator as :func:`register_model`: register a function from labels to a
    :class:`~gm_mlic.embeddings.LabelEmbedding`, for ``embedding.name``.

    It is called with its settings and ``labels``, unique names.
    """
    return EMBEDDINGS.register(name, summary, **preset)


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of registered models that match a shell-style pattern."""
    return MODELS.names(pattern)


def is_built_in(build: Callable[..., Any]) -> bool:
    """Whether a registered class or function is of this package or of torch, and not of a plugin."""
    inner = build.func if isinstance(build, functools.partial) else build
    return str(getattr(inner, "__module__", "")).startswith(("gm_mlic.", "torch."))


@functools.cache
def _import_all(home: str) -> None:
    module = importlib.import_module(home)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        importlib.import_module(f"{home}.{found.name}")


@functools.cache
def import_entry_points() -> None:
    """Import the plugins of installed packages, once; one that fails is reported and left out."""
    for point in importlib.metadata.entry_points(group=PLUGINS):
        try:
            point.load()
            _plugin_packages.add(point.module.partition(".")[0])
        except Terminated:
            raise
        except (Exception, SystemExit) as error:
            log.warning("The plugin %s cannot be imported and is left out: %s", point.value, first_line(error))


def import_plugins(modules: Sequence[str]) -> None:
    """Import modules that register models, detectors, datasets or embeddings; the current folder is searched too.

    Raises:
        ConfigError: if a module does not exist or cannot be imported.
    """
    if modules and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    for name in modules:
        package = name.partition(".")[0]
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"plugins={name}: expected the name of a module, e.g. my_package.my_module.")
        if name.endswith(".py") and Path(name).is_file():
            raise ConfigError(f"plugins={name}: name the module without .py: plugins=[{name.removesuffix('.py')}].")
        try:
            module = importlib.import_module(name)
            _plugin_packages.add(package)
        except Terminated:
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == package:
                hint = "no such module; install it, or start gm-mlic in its folder"
            else:
                hint = f"{first_line(error).rstrip('.')}{_places(error).get(package, '')}; correct it"
            raise ConfigError(f"plugins={name}: {hint}.") from error
        for here, own in ((Path(f"{name}.py"), f"{name}.py"), (Path(name, "__init__.py"), f"the folder {name}")):
            if here.is_file() and not here.samefile(getattr(module, "__file__", None) or "/"):
                raise ConfigError(f"plugins={name}: there is an installed module of this name; rename {own}.")


def plugin_failure(error: BaseException) -> str | None:
    """Error message for an exception that was raised by a plugin, or by what it calls; None for others."""
    places = [(package, place) for package, place in _places(error).items() if package in _plugin_packages]
    if not places:
        return None
    name, place = places[0]
    message = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".:")
    return f"the plugin {name} failed: {message}{place}; correct it, or see --verbose."


def _places(error: BaseException) -> dict[str, str]:
    """Packages in a traceback, with the last file and line of each: `` (FILE, line NUMBER)``."""
    return {
        str(frame.f_globals.get("__name__")).partition(".")[0]: f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
    }
