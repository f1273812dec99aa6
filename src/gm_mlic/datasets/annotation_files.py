"""Annotation readers. Each format gives one row per image; malformed files raise :class:`DataError`.

A file is decoded to records, whose values become file names, labels and splits (``annotation_rows.py``). Tables are in
``annotation_tables.py``, YOLO and Pascal VOC in ``annotation_folders.py``, JSON Lines and COCO JSON here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gm_mlic.datasets.annotation_folders import read_folder, read_yolo
from gm_mlic.datasets.annotation_rows import (
    Annotations,
    Box,
    ImageRow,
    Source,
    TableFormat,
    is_finite,
    merge_rows,
    shown,
)
from gm_mlic.datasets.annotation_tables import close_to, read_table, read_text
from gm_mlic.datasets.coco_format import read_instances
from gm_mlic.datasets.photo_folder import PhotoFolder
from gm_mlic.errors import DataError


def read_annotations(path: Path, form: TableFormat, folder: PhotoFolder | None = None) -> Annotations:
    """Read an annotation file, whose suffix selects the format, or a folder of them.

    Args:
        path: the file or folder.
        form: column names and conventions.
        folder: the photos; default: the folder of the file.

    Raises:
        DataError: if the file is missing, malformed, empty or not UTF-8, has contradictory rows of an image, or names
            one outside the image folder.
    """
    suffix = path.suffix.lower()
    if not path.is_dir() and suffix not in SUFFIXES:
        raise DataError(f"{path} has the suffix {path.suffix!r}: expected one of {', '.join(SUFFIXES)}, or a folder.")
    source = Source(path, form, folder or PhotoFolder(path.parent))
    labels, rows = (read_folder if path.is_dir() else _READERS[suffix])(source)
    if not rows:
        raise DataError(f"{path} has no rows: expected one per image.")
    rows = merge_rows(source, rows)
    stated = [row.split is not None for row in rows]
    if any(stated) and not all(stated):
        raise DataError(
            f"{rows[stated.index(False)].where} has no {form.split!r}, but other images do: set it for all or none."
        )
    return Annotations(path, labels, tuple(rows), source.notes())


def _read_lines(source: Source) -> tuple[None, list[ImageRow]]:
    rows = []
    # splitlines() would also split at characters that JSON allows inside strings.
    lines = read_text(source.path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for line, text in enumerate(lines, start=1):
        if text.strip():
            where = f"{source.path}: line {line}"
            try:
                entry = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not valid JSON ({error}): expected one object per line.") from error
            if not isinstance(entry, dict):
                raise DataError(f"{where} is not a JSON object with {source.form.file!r} and {source.form.labels!r}.")
            rows.append(_object_row(entry, source, where))
    return None, rows


def _object_row(entry: dict[str, Any], source: Source, where: str) -> ImageRow:
    form = source.form
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
    items = entry[key] if key in entry else [label for _, label in boxes or ()]
    if form.is_missing(items):
        items = [items]
    if not isinstance(items, list) or not all(isinstance(item, str) or form.is_missing(item) for item in items):
        raise DataError(f"{where} has {key} {shown(items)}: expected a list of strings.")
    labels = source.labels_of_items(items, where)
    boxes = None if boxes is None else tuple((box, label) for box, label in boxes if not form.is_missing(label))
    for _, label in boxes or ():
        if label not in labels:
            raise DataError(f"{where} has a box with label {shown(label)}, not in its {key}{close_to(label, labels)}")
    return source.row(entry[form.file], where, source.split(entry, where), labels, other={}, boxes=boxes)


def _object_boxes(boxes: Any, where: str) -> tuple[tuple[Box, str], ...]:
    if not isinstance(boxes, list):
        raise DataError(f"{where} has boxes {shown(boxes)}: expected a list of [x1, y1, x2, y2, label].")
    parsed = []
    for box in boxes:
        *corners, label = box if isinstance(box, list) and box else [None]
        if len(corners) != 4 or not all(map(is_finite, corners)) or not isinstance(label, str):
            raise DataError(f"{where} has the box {shown(box)}: expected [x1, y1, x2, y2, label], in pixels.")
        x1, y1, x2, y2 = map(float, corners)
        if x2 < x1 or y2 < y1:
            raise DataError(f"{where} has the box {shown(box)}: x2 and y2 must not be less than x1 and y1.")
        if 0 < x2 <= 1 and 0 < y2 <= 1:
            raise DataError(
                f"{where} has the box {shown(box)} within one pixel: expected pixels, not relative coordinates."
            )
        parsed.append(((x1, y1, x2, y2), label))
    return tuple(parsed)


def _read_coco(source: Source) -> tuple[tuple[str, ...], list[ImageRow]]:
    labels, rows = read_instances(source)
    return labels, list(rows.values())


_READERS = {
    ".csv": read_table, ".tsv": read_table, ".txt": read_table,
    ".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_coco,
    ".yaml": read_yolo, ".yml": read_yolo,
}  # fmt: skip
#: Suffixes of annotation files.
SUFFIXES = tuple(_READERS)
