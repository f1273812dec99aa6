"""Values that all annotation formats share: file names, labels, missing values and splits, and rows of photos."""

from __future__ import annotations

import ast
import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from gm_mlic.datasets.base import Box
from gm_mlic.datasets.images import check_size, read_image
from gm_mlic.datasets.photo_folder import PhotoFolder, file_size
from gm_mlic.errors import DataError

#: Largest number of characters of a file name, with its folders.
_MAX_NAME = 4096
#: What no file name has: NUL, and halves of characters, which JSON may have and which cannot be encoded.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
#: What a missing value is written as, in lower case: by pandas, spreadsheets and databases.
_MISSING = frozenset({"nan", "-nan", "none", "null", "n/a", "#n/a", "na", "<na>"})
_SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "development": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
#: A list of quoted texts as Python, JSON or NumPy writes it. NumPy separates them by spaces only.
_QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_ITEM = re.compile(rf"{_QUOTED}|\b(?:None|nan|null)\b", re.DOTALL)
_LIST = re.compile(rf"[\[({{](?:[\s,]*(?:{_ITEM.pattern}))*[\s,]*[\])}}]", re.DOTALL)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


def shown(value: Any) -> str:
    """A value of a file for a message: its ``repr``, shortened."""
    text = _short.repr(value)
    return text if len(text) <= 150 else f"{text[:150]}..."


def split_called(name: Any) -> str | None:
    """The split that a name such as Train or valid means; None if it is not one."""
    return _SPLITS.get(name.strip().casefold()) if isinstance(name, str) else None


def place(where: str) -> str:
    """``line 3`` of ``FILE: line 3``."""
    return where.rpartition(": ")[2]


def label_names(names: Iterable[Any], where: str) -> tuple[str, ...]:
    """Label names of a list, without surrounding spaces; an error if one is blank, no text or repeated."""
    labels: dict[str, None] = {}
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where} has the label {shown(name)}: expected a text, in quotes.")
        if name.strip() in labels:
            raise DataError(f"{where} has the label {shown(name)} twice: names must be unique.")
        labels[name.strip()] = None
    return tuple(labels)


def is_finite(value: Any) -> bool:
    """Whether a value of a JSON file is a number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


@dataclass(frozen=True)
class TableFormat:
    """Column names and conventions of an annotation file: arguments of :class:`~gm_mlic.datasets.CustomDataset`.

    ``file``, ``labels`` and ``split`` are its ``columns``, ``ignore`` is ``ignore_columns``, and ``known`` its
    ``labels``: a text such as ``None`` is a label only if it is one of them.
    """

    file: str = "file"
    labels: str | None = "labels"
    split: str | None = "split"
    separator: str = ";"
    suffix: str = ""
    ignore: tuple[str, ...] = ()
    target_format: Literal["binary", "voc"] = "binary"
    missing_value: Literal["absent", "error"] = "error"
    known: frozenset[str] = frozenset()

    def is_missing(self, value: Any) -> bool:
        """Whether a value is null or NaN, or a text that stands for it."""
        if isinstance(value, str):
            return value.strip().casefold() in _MISSING and value.strip() not in self.known
        return value is None or (isinstance(value, float) and math.isnan(value))


class ImageRow(NamedTuple):
    """Annotations of one image.

    Attributes:
        file: image path relative to the dataset's root, with ``/``.
        where: annotation file and line (or image id), for error messages.
        split: ``train``, ``val`` or ``test``; None if the file has no split column.
        present, difficult: label names.
        boxes: pairs of box and label name; None if the image has no box annotations.
        size: annotated image width and height; None if not given.
        relative: whether boxes are fractions of width and height instead of pixels.
        other: further values by name. Rows of the same image are merged only if these are equal.
    """

    file: str
    where: str
    split: str | None
    present: tuple[str, ...]
    difficult: tuple[str, ...] = ()
    boxes: tuple[tuple[Box, str], ...] | None = None
    size: tuple[int, int] | None = None
    relative: bool = False
    other: Mapping[str, Any] = {}

    def image(self, root: Path) -> Image.Image:
        """The photo as RGB, upright; an error if its size differs from the annotated one."""
        image = read_image(root / self.file)
        if self.size is not None:
            check_size(root / self.file, image.size, self.size, self.where)
        return image


def label_mask(rows: Sequence[ImageRow], labels: Sequence[str], which: Literal["present", "difficult"]) -> np.ndarray:
    """(N, C) bool mask of the labels in ``present`` or ``difficult`` of each row."""
    column = {label: c for c, label in enumerate(labels)}
    mask = np.zeros((len(rows), len(labels)), dtype=bool)
    for i, row in enumerate(rows):
        mask[i, [column[label] for label in getattr(row, which)]] = True
    return mask


class Annotations(NamedTuple):
    """Content of one annotation file.

    Attributes:
        source: path of the file.
        labels: declared label names in file order (columns, or COCO categories by name); None if the file only lists
            labels per image.
        rows: one per image; file names are unique.
        notes: what was found in the file and may be unexpected, one line each.
    """

    source: Path
    labels: tuple[str, ...] | None
    rows: tuple[ImageRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One annotation file, or a folder of them, that is being read."""

    path: Path
    form: TableFormat
    folder: PhotoFolder
    _notes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def note(self, text: str, example: str = "") -> None:
        """Add to the notes; ``{count}`` and ``{example}`` in the text become the number of calls and the first one."""
        count, first = self._notes.get(text, (0, example))
        self._notes[text] = count + 1, first

    def notes(self) -> tuple[str, ...]:
        """The notes, one line each."""
        texts = (text.format(count=count, example=example) for text, (count, example) in self._notes.items())
        return tuple(f"{self.path}: {text}" for text in texts)

    def file(self, name: Any, where: str, suffix: str = "", key: str | None = None) -> str:
        """Path of a photo relative to the dataset's root (:meth:`PhotoFolder.locate`); messages name the ``key``."""
        key = key or self.form.file
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or _NO_TEXT.search(name):
            raise DataError(f"{where} has {key} {shown(name)}: expected a file name.")
        file = self.folder.locate(name + suffix)
        if file is None:
            raise DataError(
                f"{where} has {key} {shown(name)}: it must stay inside the image folder (no other absolute "
                "path, no .., no drive or network path)."
            )
        plain, found = _base_name(name + suffix), _base_name(file)
        if plain != found:
            self.note("{count} file names are found in another spelling, such as {example}", f"{plain!r}: {found!r}")
        return file

    def is_photo(self, name: str) -> bool:
        """Whether a text is the name of an existing photo."""
        file = self.folder.locate(name + self.form.suffix)
        return file is not None and file_size(self.folder.root / file) is not None

    def row(self, name: Any, where: str, *values: Any, other: Mapping[str, Any], boxes: Any = None) -> ImageRow:
        """A row of the photo ``name``. Two names of one photo that differ by more than their folder are not merged."""
        row = ImageRow(self.file(name, where, self.form.suffix), where, *values)
        return row._replace(boxes=boxes, other={**other, self.form.file: _base_name(name)})

    def split(self, record: Mapping[str, Any], where: str) -> str | None:
        """``train``, ``val`` or ``test``, also in another spelling, such as Train or valid; None without the key."""
        if self.form.split is None or self.form.split not in record:
            return None
        split = split_called(record[self.form.split])
        if split is None:
            value = shown(record[self.form.split])
            raise DataError(f"{where} has {self.form.split} {value}: expected train, val or test.")
        return split

    def labels_of_text(self, text: str, where: str) -> tuple[str, ...]:
        """Labels in one cell: separated (``cat;dog``), or a list of Python, JSON or NumPy (``['cat', 'dog']``)."""
        text = text.strip()
        if text in self.form.known:
            return (text,)
        items = _list_items(text)
        if items is None:
            items = text.split(self.form.separator)
        elif not all(isinstance(item, str) or self.form.is_missing(item) for item in items):
            raise DataError(
                f"{where} has {self.form.labels} {shown(text)}: expected label names, such as cat{self.form.separator}"
                'dog or ["cat", "dog"].'
            )
        stripped = [item.strip() if isinstance(item, str) else item for item in items]
        return self.labels_of_items([item for item in stripped if item != ""], where)

    def labels_of_items(self, items: Iterable[Any], where: str) -> tuple[str, ...]:
        """Labels of a list, each once, without missing items."""
        labels: dict[str, None] = {}
        for item in items:
            if self.form.is_missing(item):
                self.note(
                    "{count} missing values are read as no label, the first at {example}; if it is a label, list it in "
                    "the dataset's option labels",
                    f"{place(where)} ({item})",
                )
            else:
                labels[item] = None
        return tuple(labels)


def _base_name(file: str) -> str:
    return unicodedata.normalize("NFC", file.replace("\\", "/").rpartition("/")[2])


def _list_items(text: str) -> list[Any] | None:
    """Items of a list in a cell; None if it is not a list."""
    if text.startswith("[") and text.endswith("]"):
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            return list(items)
    if _LIST.fullmatch(text):
        try:
            tokens = (item.group() for item in _ITEM.finditer(text))
            return [None if token in ("None", "nan", "null") else ast.literal_eval(token) for token in tokens]
        except (ValueError, SyntaxError):
            return [0]  # an invalid escape: not a label
    quoted = "'" in text or '"' in text
    if text.startswith("{") and text.endswith("}") and quoted:
        return [0]  # a mapping
    if text.startswith("[") and text.endswith("]"):
        items = [item for item in text[1:-1].split(",") if item.strip()]
        return [0] if quoted or any(re.fullmatch(r"[-+.\d\s]+", item) for item in items) else items
    return None


def merge_rows(source: Source, rows: Iterable[ImageRow]) -> list[ImageRow]:
    """One row per image: rows that differ in nothing but their labels are merged, other differences are errors."""
    merged: dict[str, ImageRow] = {}
    for row in rows:
        first = merged.setdefault(row.file, row)
        if first is not row:
            merged[row.file] = _merged(source, first, row)
    return list(merged.values())


def _merged(source: Source, first: ImageRow, row: ImageRow) -> ImageRow:
    repeats = f"{row.where} repeats the image {row.file!r} ({first.where})"
    if row.split != first.split:
        raise DataError(f"{repeats} with the split {row.split!r} instead of {first.split!r}: keep one of them.")
    if row.other != first.other or (row.boxes is None) != (first.boxes is None):
        names = [name for name in row.other if row.other[name] != first.other.get(name)]
        raise DataError(
            f"{repeats} with another value of {names[0] if names else 'boxes'!r}: keep one row per image, with all of "
            "its labels, or list columns that do not matter in `ignore_columns`."
        )
    present = tuple(dict.fromkeys((*first.present, *row.present)))
    boxes = None if first.boxes is None else tuple(dict.fromkeys((*first.boxes, *(row.boxes or ()))))
    if set(row.present) <= set(first.present) and boxes == first.boxes:
        source.note("{count} rows repeat an earlier row and are ignored, the first is {example}", place(row.where))
    else:
        source.note("several rows per image (layout=long): labels of {count} rows are added to those of an earlier row")
    return first._replace(present=present, boxes=boxes)
