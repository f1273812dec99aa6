"""Annotation readers for CSV, JSON Lines and COCO JSON. Each returns one row per image; malformed files are errors."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from gm_mlic.datasets import coco_format
from gm_mlic.errors import DataError
from gm_mlic.io import few

Box = tuple[float, float, float, float]

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}

#: Values allowed in a label column: present, difficult, absent. Spreadsheets and pandas write 1.0 for 1 where a column
#: had gaps, and True for a Boolean.
_CELLS: dict[str, tuple[frozenset[str], frozenset[str], frozenset[str]]] = {
    "binary": (
        frozenset({"1", "1.0", "true", "True", "TRUE"}),
        frozenset(),
        frozenset({"0", "0.0", "false", "False", "FALSE"}),
    ),
    "voc": (frozenset({"1", "1.0"}), frozenset({"0", "0.0"}), frozenset({"-1", "-1.0"})),
}


@dataclass(frozen=True)
class TableFormat:
    """Column names and conventions of an annotation file.

    Attributes:
        file: column (CSV) or key (JSON Lines) of the image file name.
        labels: column or key of the label list. A CSV without this column has one column per label.
        split: column or key (in COCO JSON, of an ``images`` entry) with the value train, val or test.
        separator: text between the labels of one cell.
        suffix: appended to every file name of a CSV or JSON Lines file.
        ignore: CSV columns that are not labels.
        target_format: values of a label column. ``binary``: 1 present, 0 absent. ``voc``: 1 present, 0 difficult,
            -1 absent.
    """

    file: str = "file"
    labels: str | None = "labels"
    split: str | None = "split"
    separator: str = ";"
    suffix: str = ""
    ignore: tuple[str, ...] = ()
    target_format: Literal["binary", "voc"] = "binary"


class ImageRow(NamedTuple):
    """Annotations of one image.

    Attributes:
        file: image path relative to the image folder, with ``/``.
        where: annotation file and line (or image id), for error messages.
        split: ``train``, ``val`` or ``test``; None if the file has no split column.
        present, difficult: label names.
        boxes: pairs of box and label name; None if the image has no box annotations.
        size: annotated image width and height; None if not given.
    """

    file: str
    where: str
    split: str | None
    present: tuple[str, ...]
    difficult: tuple[str, ...] = ()
    boxes: tuple[tuple[Box, str], ...] | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Annotations:
    """Content of one annotation file.

    Attributes:
        source: path of the file.
        labels: declared label names in file order (columns, or COCO categories by name); None if the file only lists
            labels per image.
        rows: one per image; file names are unique.
    """

    source: Path
    labels: tuple[str, ...] | None
    rows: tuple[ImageRow, ...]


def read_annotations(source: Path, form: TableFormat) -> Annotations:
    """Read one annotation file. The suffix selects the format.

    ``.csv``, ``.tsv`` and ``.txt`` are tables. Their delimiter is comma, semicolon, tab or bar, whichever makes the
    file column appear in the first line. ``.jsonl`` and ``.ndjson`` are JSON Lines. ``.json`` is COCO's instances
    format.

    Raises:
        DataError: if the file is missing, malformed, empty or not UTF-8, repeats an image, or names one outside the
            image folder.
    """
    readers = {
        ".csv": _read_table, ".tsv": _read_table, ".txt": _read_table,
        ".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_coco,
    }  # fmt: skip
    if source.suffix.lower() not in readers:
        raise DataError(f"{source} has the suffix {source.suffix!r}: expected one of {', '.join(readers)}.")
    labels, rows = readers[source.suffix.lower()](source, form)
    if not rows:
        raise DataError(f"{source} has no rows: expected one per image.")
    first: dict[str, str] = {}
    for row in rows:
        if row.file in first:
            raise DataError(
                f"{row.where} repeats the image {row.file!r} ({first[row.file]}): keep one row per image, with all of "
                "its labels."
            )
        first[row.file] = row.where
    stated = [row.split is not None for row in rows]
    if any(stated) and not all(stated):
        raise DataError(
            f"{rows[stated.index(False)].where} has no {form.split!r}, but other images do: set it for all or none."
        )
    return Annotations(source, labels, tuple(rows))


def close_to(name: str, names: Iterable[str]) -> str:
    """Message ending ``; did you mean 'x' or 'y'?`` for names similar to ``name``; a period if none is similar."""
    by_folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(repr(by_folded[key]) for key in close)}?" if close else "."


# ---- CSV ----


def _read_table(source: Path, form: TableFormat) -> tuple[tuple[str, ...] | None, list[ImageRow]]:
    text = read_text(source)
    header, records = _open_table(source, text, form)
    position = {name: n for n, name in enumerate(header)}
    for name in form.ignore:
        if name not in position:
            raise DataError(f"{source} has no column {name!r}, listed in `ignore_columns`{close_to(name, header)}")
    listed = form.labels is not None and form.labels in position
    others = [name for name in header if name not in (form.file, form.split, *form.ignore)]
    if not listed and not others:
        raise DataError(
            f"{source} has neither a column {form.labels!r} nor label columns: add one, or set `columns['labels']` to "
            "its name."
        )
    read = _listed(form, position) if listed else _one_column_each(source, form, position, others)
    rows = []
    for line, record in records:
        where = f"{source}: line {line}"
        if len(record) != len(header):
            raise DataError(
                f"{where} has {len(record)} fields, but the first line has {len(header)}: quote fields that contain "
                "the delimiter."
            )
        split = None if form.split not in position else _split(record[position[form.split]].strip(), form, where)
        present, difficult = read(record, where)
        file = _file(record[position[form.file]].strip(), form, where)
        rows.append(ImageRow(file, where, split, present, difficult))
    if not listed and form.target_format == "voc" and rows and all(_is_full(row, others) for row in rows):
        raise DataError(
            f"{source} has no value -1, so no label is ever absent: set `target_format='binary'` if 0 means absent."
        )
    return None if listed else tuple(others), rows


def _is_full(row: ImageRow, labels: Sequence[str]) -> bool:
    return len(row.present) + len(row.difficult) == len(labels)


def read_text(source: Path) -> str:
    """Read a UTF-8 text file, without its byte order mark.

    Raises:
        DataError: if it cannot be read or is not UTF-8.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}).") from error
    remedy = "save it as UTF-8 (in a spreadsheet: CSV UTF-8)."
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{source} is UTF-16: {remedy}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{source}: line {line} is not UTF-8 (byte {content[error.start]:#04x}): {remedy}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{source}: line {line} has a NUL character, so it is not text: {remedy}")
    return text


def _open_table(source: Path, text: str, form: TableFormat) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Column names, and an iterator over the remaining records with their line numbers."""
    headers: dict[str, list[str]] = {}
    problem: DataError | None = None
    for delimiter in _DELIMITERS:
        try:
            _, record = next(_records(source, text, delimiter))
            headers[delimiter] = [name.strip() for name in record]
        except StopIteration:
            raise DataError(f"{source} is empty: its first line must name the columns.") from None
        except DataError as error:  # quoting is invalid for this delimiter
            problem = error
    if not headers and problem is not None:
        raise problem
    fitting = [delimiter for delimiter, header in headers.items() if form.file in header]
    if any(len(headers[delimiter]) == 1 for delimiter in fitting):
        fitting = fitting[:1]  # a single column, under any delimiter
    if not fitting:
        header = max(headers.values(), key=len)
        raise DataError(
            f"{source} has no column {form.file!r} in its first line ({few(header, 6)}): set `columns['file']` to the "
            f"column with the file names{close_to(form.file, header)}"
        )
    if len(fitting) > 1:
        names = " or ".join(_DELIMITERS[delimiter] for delimiter in fitting)
        raise DataError(f"{source}: the delimiter is ambiguous ({names}): rename the columns in the first line.")
    header = headers[fitting[0]]
    for n, name in enumerate(header):
        if header.index(name) != n:
            raise DataError(f"{source} has two columns {name!r}: rename or remove one.")
    records = _records(source, text, fitting[0])
    next(records)
    return header, records


def _records(source: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Non-blank records with the number of their last line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for record in reader:
            if any(map(str.strip, record)):
                yield reader.line_num, record
    except csv.Error as error:
        raise DataError(f"{source}: line {reader.line_num} is malformed ({error}): check its quotes.") from error


def _listed(form: TableFormat, position: dict[str, int]) -> Any:
    """Reader of records that list their labels in one cell. Repeated labels and empty items are ignored."""
    column = position[str(form.labels)]

    def read(record: list[str], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        labels = (label.strip() for label in record[column].split(form.separator))
        return tuple(dict.fromkeys(filter(None, labels))), ()

    return read


def _one_column_each(source: Path, form: TableFormat, position: dict[str, int], labels: list[str]) -> Any:
    """Reader of records with one column per label."""
    if "" in labels:
        raise DataError(
            f"{source}: column {position[''] + 1} has no name: remove it (pandas: to_csv(..., index=False))."
        )
    columns = [position[label] for label in labels]
    present, difficult, absent = _CELLS[form.target_format]
    known = present | difficult | absent

    def read(record: list[str], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        cells = [record[column] for column in columns]
        if set(cells) - known:
            cells = [cell.strip() for cell in cells]
            for label, cell in zip(labels, cells, strict=True):
                if cell not in known:
                    raise DataError(f"{where}: column {label!r} has {cell!r}{_expected_cell(cell, label, form)}")
        return (
            tuple(label for label, cell in zip(labels, cells, strict=True) if cell in present),
            tuple(label for label, cell in zip(labels, cells, strict=True) if cell in difficult) if difficult else (),
        )

    return read


def _expected_cell(cell: str, label: str, form: TableFormat) -> str:
    if form.target_format == "voc":
        return ": expected 1 (present), 0 (difficult) or -1 (absent)."
    if cell in ("-1", "-1.0"):
        return ": expected 1 or 0; set `target_format='voc'` if -1 means absent and 0 difficult."
    return (
        ": expected 1 or 0. If the column is not a label, add it to `ignore_columns`; if it lists the labels, set "
        f"`columns['labels']={label!r}`."
    )


# ---- JSON Lines ----


def _read_lines(source: Path, form: TableFormat) -> tuple[None, list[ImageRow]]:
    rows = []
    # splitlines() would also split at characters that JSON allows inside strings.
    lines = read_text(source).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for line, text in enumerate(lines, start=1):
        if text.strip():
            where = f"{source}: line {line}"
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not valid JSON ({error}): expected one object per line.") from error
            if not isinstance(entry, dict):
                raise DataError(f"{where} is not a JSON object with {form.file!r} and {form.labels!r}.")
            rows.append(_object_row(entry, form, where))
    return None, rows


def _object_row(entry: dict[str, Any], form: TableFormat, where: str) -> ImageRow:
    if form.file not in entry:
        raise DataError(
            f"{where} has no key {form.file!r}: set `columns['file']` to its name{close_to(form.file, entry)}"
        )
    key = form.labels or "labels"
    boxes = None if entry.get("boxes") is None else _object_boxes(entry["boxes"], where)
    if key not in entry and boxes is None:
        raise DataError(
            f"{where} has no key {key!r} (use an empty list for an image without labels){close_to(key, entry)}"
        )
    labels = entry[key] if key in entry else [label for _, label in boxes or ()]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DataError(f"{where} has {key} {labels!r}: expected a list of strings.")
    for _, label in boxes or ():
        if label not in labels:
            raise DataError(f"{where} has a box with label {label!r}, not in its {key}{close_to(label, labels)}")
    split = entry.get(form.split) if form.split is not None else None
    if split is not None or (form.split is not None and form.split in entry):
        split = _split(split, form, where)
    file = _file(entry[form.file], form, where)
    return ImageRow(file, where, split, tuple(dict.fromkeys(labels)), boxes=boxes)


def _object_boxes(boxes: Any, where: str) -> tuple[tuple[Box, str], ...]:
    if not isinstance(boxes, list):
        raise DataError(f"{where} has boxes {boxes!r}: expected a list of [x1, y1, x2, y2, label].")
    parsed = []
    for box in boxes:
        *corners, label = box if isinstance(box, list) and box else [None]
        if len(corners) != 4 or not all(map(_is_finite, corners)) or not isinstance(label, str):
            raise DataError(f"{where} has the box {box!r}: expected [x1, y1, x2, y2, label], in pixels.")
        x1, y1, x2, y2 = map(float, corners)
        if x2 < x1 or y2 < y1:
            raise DataError(f"{where} has the box {box!r}: x2 and y2 must not be less than x1 and y1.")
        if 0 < x2 <= 1 and 0 < y2 <= 1:
            raise DataError(f"{where} has the box {box!r} within one pixel: expected pixels, not relative coordinates.")
        parsed.append(((x1, y1, x2, y2), label))
    return tuple(parsed)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- COCO JSON ----


def _read_coco(source: Path, form: TableFormat) -> tuple[tuple[str, ...], list[ImageRow]]:
    content = coco_format.load(source)
    labels, photos = coco_format.parse(content, source)
    splits = {entry["id"]: entry[form.split] for entry in content["images"] if form.split in entry}
    rows = []
    for key in sorted(photos):
        photo, where = photos[key], f"{source}: image id {key}"
        boxes = zip(photo.boxes, photo.box_labels, strict=True)
        rows.append(
            ImageRow(
                str(PurePosixPath(photo.file_name)),
                where,
                _split(splits[key], form, where) if key in splits else None,
                tuple(labels[c] for c in sorted(photo.labels)),
                boxes=tuple((box, labels[c]) for box, c in boxes),
                size=(photo.width, photo.height),
            )
        )
    return labels, rows


# ---- All formats ----


def _split(value: Any, form: TableFormat, where: str) -> str:
    if value not in ("train", "val", "test"):
        raise DataError(f"{where} has {form.split} {value!r}: expected train, val or test.")
    return str(value)


def _file(name: Any, form: TableFormat, where: str) -> str:
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where} has {form.file} {name!r}: expected a file name.")
    if coco_format.leaves_folder(name):
        raise DataError(
            f"{where} has {form.file} {name!r}: it must stay inside the image folder (no leading /, no .., no \\ or :)."
        )
    return str(PurePosixPath(name + form.suffix))
