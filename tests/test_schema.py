"""Settings are read from signatures, and values are checked against their annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from annotated_types import DocInfo, Gt, Interval, Len, Predicate

from gm_mlic.errors import ArgumentError
from gm_mlic.schema import (
    REQUIRED,
    Fraction,
    Natural,
    Positive,
    Probability,
    Setting,
    Url,
    as_typed,
    checked,
    describe,
    settings_of,
    summary_of,
)


@dataclass(frozen=True)
class Point:
    """A point.

    Args:
        x: first coordinate.
        y: second coordinate.
    """

    x: Natural = 0
    y: Natural = 1


class Example:
    """An example of :class:`Point` things.

    Args:
        weights: ``coco`` or a file,
            see :func:`~gm_mlic.schema.describe` and `a page`_; null: none.
        low, high: limits.
        size (int, optional): a size.
    """

    def __init__(
        self,
        weights: str | Path | None,
        low: Probability = 0.0,
        high: Probability = 1.0,
        size: Positive = 2,
        **other: Any,
    ) -> None: ...


def build(arch: str, *, point: Point = Point(), sizes: tuple[int, ...] = (1, 2), device: str = "cpu") -> None:
    """Build it."""


def test_settings_of_a_class():
    found = settings_of(Example)
    assert list(found) == ["weights", "low", "high", "size"]
    assert found["weights"] == Setting(
        str | Path | None, REQUIRED, "coco or a file, see describe and a page; null: none."
    )
    assert (found["low"].text, found["high"].text, found["size"].text) == ("limits.", "limits.", "a size.")
    assert (found["size"].default, found["size"].annotation) == (2, Positive)


def test_an_inherited_constructor_is_described_by_its_class():
    class Small(Example):
        """A small example."""

    assert settings_of(Small) == settings_of(Example)
    assert summary_of(Small) == "A small example"


def test_settings_of_functions_and_partials():
    assert list(settings_of(build)) == ["arch", "point", "sizes", "device"]
    found = settings_of(partial(build, "resnet"), ("device",))
    assert list(found) == ["point", "sizes"]
    assert found["point"].default == {"x": 0, "y": 1}
    assert found["sizes"].default == [1, 2]  # as YAML writes it
    assert list(settings_of(partial(build, device="cuda"))) == ["arch", "point", "sizes", "device"]
    assert settings_of(partial(build, device="cuda"))["device"].default == "cuda"
    assert summary_of(partial(build, "resnet")) == "Build it"
    assert summary_of(Example) == "An example of Point things"


def test_descriptions_of_another_function():
    assert settings_of(like)["low"].text == "limits."
    assert settings_of(like)["lr"].text == "see settings_of."


def like(low: float = 0.0, lr: float = 0.0) -> None:
    """A function.

    Args:
        low: see :func:`Example`.
        lr: see :func:`~gm_mlic.schema.settings_of`.
    """


def test_settings_of_a_dataclass_and_nested_settings():
    assert {key: setting.text for key, setting in settings_of(Point).items()} == {
        "x": "first coordinate.", "y": "second coordinate.",
    }  # fmt: skip
    nested = settings_of(build)["point"].nested()
    assert nested.keys() == {"x", "y"}
    assert not nested["x"].accepts(-1)
    by_name = Setting(Mapping[str, Positive], {"train": 5}, "").nested()
    assert by_name["train"] == Setting(Positive, 5, "")


def test_names_for_type_checkers_only_are_not_checked():
    def later(size: Unknown = 3, other: Positive = 1) -> None:  # type: ignore[name-defined]  # noqa: F821
        """Function with an annotation that does not exist at run time."""

    assert settings_of(later)["size"].annotation is Any
    assert settings_of(later)["other"].annotation == Positive


NAN, INF = float("nan"), float("inf")
SHARD = Annotated[str, Predicate(lambda v: "/" in v), DocInfo("i/n")]


@pytest.mark.parametrize(
    ("annotation", "words", "valid", "invalid"),
    [
        (int, "an integer", [0, -3], [True, 1.0, 1.5, "1", None, NAN, [1]]),
        (Natural, "an integer of at least 0", [0, 7], [-1, False]),
        (Positive | None, "an integer of at least 1, or null", [1, None], [0, "null"]),
        (Annotated[int, Interval(ge=0, le=65535)], "an integer from 0 to 65535", [0, 65535], [-1, 65536]),
        (float, "a number", [0, 1, 1.5, 1e-9], [True, "1", NAN, INF, -INF, None]),
        (Annotated[float, Gt(0)], "a number above 0", [1e-9, 2], [0, 0.0, -1, INF]),
        (Probability, "a number from 0 to 1", [0, 1, 0.5], [-0.1, 1.1, NAN, True]),
        (Fraction, "a number of at least 0 and below 1", [0, 0.99], [1]),
        (bool, "true or false", [True, False], [0, 1, "true", None]),
        (bool | Literal["auto"], "true or false, or auto", [True, "auto"], [1, "on"]),
        (str, "a string", ["a", "1"], ["", 1, None, True, ["a"]]),
        (str | Path, "a string", ["a/b"], ["", 3]),
        (Path | None, "a path, or null", ["a/b", None], ["", 3]),
        (Literal["dense", "sparse"], "one of dense, sparse", ["dense"], ["Dense", "", None, 0]),
        (
            Positive | Literal[-1, "auto"],
            "an integer of at least 1, or one of -1, auto",
            [1, -1, "auto"],
            [0, -2, "all", True],
        ),
        (Sequence[str], "a list of strings", [[], ["a"]], ["a", [1], None, {"a": 1}]),
        (
            Annotated[Sequence[Positive], Len(2, 2)],
            "a list of 2 integers of at least 1",
            [[1, 2]],
            [[1], [1, 2, 3], [0, 1]],
        ),
        (
            Annotated[Sequence[Literal["a", "b"]], Len(1)],
            "a non-empty list of some of a, b",
            [["a"], ["a", "b"]],
            [[], ["c"], "a"],
        ),
        (tuple[float, float], "a list of 2 numbers", [[0.9, 0.99]], [[0.9], [0.9, 1, 2], ["a", 1], [NAN, 1]]),
        (float | complex, "a number", [0.5], ["a"]),
        (tuple[float | complex, float | complex], "a list of 2 numbers", [[0.9, 1]], [0.9]),
        (Mapping[str, Positive], "a mapping of names to integers of at least 1", [{"a": 1}], [{"a": 0}, [1], 5]),
        (Mapping[Literal["train"], str], "a mapping of names to strings", [{"train": "a"}], [{"val": "a"}, "a"]),
        (Url, "a URL, http://...", ["https://x/y"], ["x", 5, ""]),
        (SHARD | None, "i/n, or null", ["0/4", None], ["04", 4]),
        (Point, "settings: x, y", [{"x": 1}], [{"x": -1}, {"x": None}, 5, [1], None]),
        (Any, "a value", [1, "a", None], []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_words_and_values(annotation: Any, words: str, valid: list[Any], invalid: list[Any]):
    setting = Setting(annotation, REQUIRED, "")
    assert setting.expected == describe(annotation) == words
    assert [value for value in valid if not setting.accepts(value)] == []
    assert [value for value in invalid if setting.accepts(value)] == []


def test_empty_strings_are_valid_only_as_defaults():
    assert Setting(str, "", "").accepts("")
    assert not Setting(str | None, None, "").accepts("")


@pytest.mark.parametrize(
    ("value", "typed"),
    [
        (None, "null"), (True, "true"), (False, "false"), (1, "1"), (1.5, "1.5"), ("a b", "a b"),
        ([1, None, "a"], "[1, null, a]"), ({"a": [True]}, "{a: [true]}"), ((1, 2), "[1, 2]"), ([], "[]"),
    ],
)  # fmt: skip
def test_values_are_written_as_typed(value: Any, typed: str):
    assert as_typed(value) == typed


class Layer:
    """A layer."""

    @checked
    def __init__(
        self,
        size: Positive,
        weights: Any = None,
        rate: Fraction = 0.5,
        widths: Positive | Sequence[Positive] | None = None,
        kind: Literal["max", "mean"] = "max",
        radius: Annotated[float, Gt(0)] | None = None,
        root: Url | None = None,
        betas: tuple[Fraction, float] | None = None,
        *,
        norm: bool = False,
    ) -> None:
        self.size, self.weights = size, weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be an integer of at least 1; got 0."),
        ({"size": True}, "size must be an integer of at least 1; got True."),
        ({"size": 2.0}, "size must be an integer of at least 1; got 2.0."),
        ({"size": "2"}, "size must be an integer of at least 1; got '2'."),
        ({"rate": 1}, "rate must be a number of at least 0 and below 1; got 1."),
        ({"rate": float("nan")}, "rate must be a number of at least 0 and below 1; got nan."),
        ({"rate": None}, "rate must be a number of at least 0 and below 1; got None."),
        ({"widths": (3, 0)}, "widths must be an integer of at least 1, or a list of .* at least 1, or None; got"),
        ({"widths": "33"}, "widths must be .*; got '33'."),
        ({"kind": "min"}, "kind must be one of max, mean; got 'min'."),
        ({"radius": 0.0}, "radius must be a number above 0, or None; got 0.0."),
        ({"radius": float("inf")}, "radius must be .*; got inf."),
        ({"betas": (0.5,)}, r"betas must be a list.*, or None; got \(0\.5,\)\."),
        ({"betas": [1, 2]}, r"betas must be .*; got \[1, 2\]\."),
        ({"norm": "no"}, "norm must be true or false; got 'no'."),
    ],
)
def test_checked_constructors_refuse(options: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=f"^{message}") as error:
        Layer(**{"size": 1, **options})
    assert error.value.argument in options


def test_checked_constructors_accept():
    """Integers and numbers of NumPy, and anything where the annotation is not checked; errors of Python are its own."""
    layer = Layer(np.int64(2), torch.ones(2), np.float32(0.5), [1, np.int64(3)], radius=1, norm=True)
    assert layer.size == 2
    assert layer.weights.tolist() == [1, 1]
    assert Layer(size=1, root=3, widths=None, betas=np.array([0.5, 3])).size == 1
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        Layer()
    assert list(settings_of(Layer)) == ["size", "weights", "rate", "widths", "kind", "radius", "root", "betas", "norm"]
