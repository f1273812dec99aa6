"""Settings of a class or function: its arguments, their annotations, and their descriptions in the docstring.

A class that is built from a config needs no second description of its settings. Annotations and defaults are those of
its constructor::

    def __init__(self, weights: str, score_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.05) -> None: ...

and descriptions are in the section ``Args:`` of its docstring.

Annotations are checked by pydantic. Bounds are those of ``annotated_types``.
"""

from __future__ import annotations

import functools
import inspect
import json
import numbers
import pkgutil
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import DocInfo, Ge, Interval, Len, Predicate

from gm_mlic.errors import ArgumentError

P = ParamSpec("P")
T = TypeVar("T")

Natural = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
#: Seed of NumPy and torch.
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
NotNegative = Annotated[float, Ge(0)]
Probability = Annotated[float, Interval(ge=0, le=1)]
#: A fraction of images, or a probability of dropout, of which 1 would leave none.
Fraction = Annotated[float, Interval(ge=0, lt=1)]

Url = Annotated[str, Predicate(lambda v: v.startswith(("http://", "https://"))), DocInfo("a URL, http://...")]

#: Default of a setting that must be given.
REQUIRED = "???"


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        annotation: its type, with bounds.
        default: its default; :data:`REQUIRED` if it has none.
        text: its description, in one line; empty without one.
    """

    annotation: Any
    default: Any
    text: str

    def nested(self) -> Mapping[str, Setting]:
        """The settings of a mapping or a dataclass."""
        if is_dataclass(self.annotation):
            return settings_of(self.annotation)  # type: ignore[arg-type]
        return {key: Setting(get_args(self.annotation)[1], value, "") for key, value in self.default.items()}

    @property
    def expected(self) -> str:
        """Description of valid values, e.g. ``an integer of at least 1, or null``."""
        named = isinstance(self.default, Mapping) and bool(self.default)
        return f"settings: {', '.join(self.default)}" if named else describe(self.annotation)

    def accepts(self, value: Any) -> bool:
        """Whether ``value``, as read from YAML, is valid."""
        return (value != "" or self.default == "") and _allows(self.annotation, value)


@functools.cache
def settings_of(build: Callable[..., Any], leave_out: tuple[str, ...] = ()) -> Mapping[str, Setting]:
    """Settings of a class or function, in the order of its arguments.

    Args:
        build: the class or function, or a :class:`functools.partial` of one.
        leave_out: arguments that are no settings, such as the device.
    """
    inner = build.func if isinstance(build, functools.partial) else build
    hints = _annotations(inner.__init__ if isinstance(inner, type) else inner)  # type: ignore[misc]
    texts = argument_texts(inner)
    return {
        name: Setting(
            hints.get(name, Any), REQUIRED if p.default is p.empty else _plain(p.default), texts.get(name, "")
        )
        for name, p in inspect.signature(build).parameters.items()
        if name not in leave_out and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def _annotations(function: Any) -> dict[str, Any]:
    """Evaluated annotations; Any for names that exist only for type checkers."""
    found: dict[str, Any] = {}
    function = inspect.unwrap(function)
    for name, annotation in getattr(function, "__annotations__", {}).items():
        try:
            one = types.SimpleNamespace(__annotations__={name: annotation})
            found |= get_type_hints(one, getattr(function, "__globals__", {}), include_extras=True)
        except (NameError, TypeError):
            found[name] = Any
    return found


def checked(init: Callable[P, T]) -> Callable[P, T]:
    """Decorator of a constructor or function that checks arguments by their annotations.

    These are numbers with bounds, as :data:`Positive`, sequences of them, tuples of a fixed length, ``Literal`` and
    ``bool``, also as parts of a union. Other annotations are not checked.

    Raises:
        ArgumentError: when called, for a value that the annotation does not allow.
    """
    names = tuple(inspect.signature(init).parameters)

    @functools.wraps(init)
    def checking(*args: P.args, **kwargs: P.kwargs) -> T:
        hints = _annotations(init)
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            part = _checkable(hints.get(name, Any))
            if part is not Any and not _allows(part, value):
                expected = describe(hints[name]).replace("null", "None")
                raise ArgumentError(name, f"must be {expected}; got {value!r}.")
        return init(*args, **kwargs)

    return checking


def _checkable(annotation: Any) -> Any:
    """An annotation, with Any for its parts that :func:`checked` does not check."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return Union[tuple(map(_checkable, arguments))]  # noqa: UP007 - of a tuple
    if origin is tuple and Ellipsis not in arguments:
        return tuple[tuple(map(_checkable, arguments))]  # type: ignore[misc]
    is_number = origin is Annotated and arguments[0] in (int, float)
    is_list = origin is Sequence and get_origin(arguments[0]) is Annotated
    is_checked = is_number or is_list or origin is Literal or annotation in (bool, type(None))
    return annotation if is_checked else Any


def _allows(annotation: Any, value: Any) -> bool:
    """Whether an annotation allows a value, as read from YAML or given in Python."""
    try:
        # As JSON, in which lists stand for tuples, and strings for paths. Strict: no other conversions. YAML reads
        # .inf and .nan as numbers; JSON has none.
        content = json.dumps(value, default=_as_json, allow_nan=False)
        _adapter(annotation).validate_json(content, strict=True)
    except ValueError:  # of json, and the base class of pydantic's error
        return False
    return True


def _as_json(value: Any) -> Any:
    """A number, sequence or array of another package as one of Python; the text of other values."""
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Sequence):
        return list(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def summary_of(build: Callable[..., Any]) -> str:
    """First line of the docstring, without the period."""
    inner = build.func if isinstance(build, functools.partial) else build
    return _without_roles((inspect.getdoc(inner) or "").partition("\n")[0].rstrip("."))


def argument_texts(build: Callable[..., Any]) -> dict[str, str]:
    """Descriptions of arguments in the sections ``Args:`` of a docstring, each in one line of plain text.

    ``a, b: see :func:`NAME`.`` stands for the descriptions of another function.
    """
    texts: dict[str, str] = {}
    parts = [build]
    if isinstance(build, type):
        parts = [part for base in build.__mro__ for part in (base, base.__init__)]  # type: ignore[misc]
    for part in map(inspect.getdoc, parts):
        section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", part or "", re.MULTILINE)
        for entry in re.split(r"\n(?=    \S)", section.group(1).rstrip()) if section else ():
            names, _, text = entry.strip().partition(":")
            for name in re.sub(r"\(.*?\)", "", names).split(","):
                name = name.strip().lstrip("*")
                texts.setdefault(name, _text(name, " ".join(text.split()), build.__module__))
    return texts


def _text(name: str, text: str, module: str) -> str:
    """Description of an argument; ``see :func:`NAME``` stands for the one of that function."""
    if other := re.fullmatch(r"see :func:`~?([\w.]+)`\.", text):
        path = other[1] if "." in other[1] else f"{module}.{other[1]}"
        return argument_texts(pkgutil.resolve_name(path)).get(name) or _without_roles(text)
    return _without_roles(text)


def describe(annotation: Any) -> str:
    """Description of the values that an annotation allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_dataclass(annotation):
        return f"settings: {', '.join(settings_of(annotation))}"  # type: ignore[arg-type]
    if origin is Annotated:
        words = [part.documentation for part in arguments[1:] if isinstance(part, DocInfo)]
        text = describe(arguments[0])
        for length in (part for part in arguments[1:] if isinstance(part, Len) and part.min_length):
            fixed = length.min_length == length.max_length
            text = text.replace("a list of", f"a list of {length.min_length}" if fixed else "a non-empty list of", 1)
        return words[0] if words else text + _bounds(arguments[1:])
    if origin in (Union, types.UnionType):
        texts = dict.fromkeys(
            describe(a) for a in arguments if a is not type(None) and not (a is Path and str in arguments)
        )
        known = [text for text in texts if text != _OTHER] or [_OTHER]  # of torch: float | Tensor
        return ", or ".join([*known, *(["null"] if type(None) in arguments else [])])
    if origin is Literal:
        return f"{'one of ' if len(arguments) > 1 else ''}{', '.join(map(as_typed, arguments))}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of names to {_plural(arguments[1])}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        inner = [a for a in arguments if a is not Ellipsis]
        number = f"{len(inner)} " if origin is tuple and Ellipsis not in arguments else ""
        return f"a list of {number}{_plural(inner[0])}" if len(set(inner)) == 1 else "a list"
    return _NAMES.get(annotation, _OTHER)


def as_typed(value: Any) -> str:
    """Value in the syntax of YAML and the command line."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {as_typed(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


_OTHER = "a value"
_NAMES = {
    int: "an integer", float: "a number", str: "a string", bool: "true or false", Path: "a path", type(None): "null",
}  # fmt: skip


def _plural(annotation: Any) -> str:
    return re.sub(r"^an? (integer|number|string|path)\b", r"\1s", describe(annotation)).replace("one of", "some of")


def _bounds(constraints: Sequence[Any]) -> str:
    parts = [part for c in constraints for part in (c if hasattr(c, "__iter__") else [c])]
    limits = {key: getattr(part, key) for part in parts for key in _WORDS if getattr(part, key, None) is not None}
    if limits.keys() == {"ge", "le"}:
        return f" from {limits['ge']} to {limits['le']}"
    return " " + " and ".join(f"{_WORDS[key]} {limits[key]}" for key in _WORDS if key in limits) if limits else ""


_WORDS = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


def _plain(value: Any) -> Any:
    """Default as YAML writes it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@functools.cache
def _adapter(annotation: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    config = None if is_dataclass(annotation) else ConfigDict(arbitrary_types_allowed=True)
    return TypeAdapter(annotation, config=config)


def _without_roles(text: str) -> str:
    """Text without reStructuredText markup, and without a default in parentheses, which is shown in any case."""
    text = re.sub(r":math:`(.*?)`", lambda match: match[1].replace("\\", ""), text)
    text = re.sub(r":\w+(?::\w+)?:`~?(?:[\w.]*\.)?([^`<]+?)(?:\s*<[^>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`]+)`_", r"\1", text).replace("``", "")
    return re.sub(r"\s*\(default: (?:[^\s(),;]+|\([^()]*\))\)", "", text)
