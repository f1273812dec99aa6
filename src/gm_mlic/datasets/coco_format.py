"""Reader of COCO's instances format (one JSON file), used for MS-COCO and custom datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from gm_mlic.datasets.annotation_rows import Box, ImageRow, Source, is_finite, label_names, shown
from gm_mlic.datasets.base import read_bytes
from gm_mlic.errors import DataError

#: Largest overhang of a box over the image border in pixels (rounding in annotations) that is clipped, not refused.
BOX_TOLERANCE = 2.0


def read_instances(
    source: Source, label_order: Literal["name", "id"] = "name", *, boxed: bool = False
) -> tuple[tuple[str, ...], dict[int, ImageRow]]:
    """Read label names, and a row per image by image id, ascending.

    Labels of crowd regions and of annotations without a box are present; boxes are without crowd regions and boxes
    without area. Labels are sorted by ``name`` (alphabetical) or by category ``id``. With ``boxed``, each annotation
    must have a box.
    """
    path = source.path
    content = _load(path)
    labels = _categories(content, path, label_order)
    images = _images(content, source)
    present: dict[int, set[str]] = {key: set() for key in images}
    boxes: dict[int, list[tuple[Box, str]]] = {key: [] for key in images}
    unboxed: set[int] = set()
    for n, entry in enumerate(content["annotations"]):
        name = entry.get("id", f"number {n}")
        where = f"{path}: annotation {name if isinstance(name, int) or 'id' not in entry else shown(name)}"
        key = _integer(entry, "image_id", where)
        if key not in images:
            raise DataError(f"{where} has unknown image_id {shown(key)}: correct the file.")
        label = labels.get(_integer(entry, "category_id", where))
        if label is None:
            category = shown(entry["category_id"])
            raise DataError(f"{where} (image id {key}) has unknown category_id {category}: correct the file.")
        present[key].add(label)
        if not boxed and entry.get("bbox") in (None, []):
            unboxed.add(key)
            continue
        box = _box(entry.get("bbox"), images[key], f"{where} (image id {key}, {images[key].file}) has bbox")
        if box is not None and not entry.get("iscrowd", 0):
            boxes[key].append((box, label))
    names = tuple(labels.values())
    return names, {
        key: images[key]._replace(
            present=tuple(name for name in names if name in present[key]),
            boxes=None if key in unboxed and not boxes[key] else tuple(boxes[key]),
        )
        for key in sorted(images)
    }


def clip_box(box: Box, size: tuple[int, int], where: str) -> Box | None:
    """Clip (x1, y1, x2, y2) to an image of ``size`` (width, height); None if no area is left.

    A box that exceeds the border by more than :data:`BOX_TOLERANCE` pixels is an error; ``where`` starts the message.
    """
    (x1, y1, x2, y2), (width, height) = box, size
    if max(-x1, -y1, x2 - width, y2 - height) > BOX_TOLERANCE:
        raise DataError(f"{where}, outside the image of {width} x {height} pixels: correct the file.")
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def _load(path: Path) -> dict[str, Any]:
    """Content of a file with the lists of objects ``images``, ``annotations`` and ``categories``."""
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): extract or download it again.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path} has no list {key!r}: expected COCO's instances format.")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise DataError(f"{path}: {key!r} has an entry that is not an object: expected COCO's instances format.")
    return dict(content)


def _integer(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where} has {key} {shown(value)}: expected an integer.")
    return value


def _categories(content: dict[str, Any], path: Path, order: str) -> dict[int, str]:
    """Label names by category id, in the order of the labels."""
    names: dict[int, str] = {}
    for n, entry in enumerate(content["categories"]):
        key = _integer(entry, "id", f"{path}: category number {n}")
        (name,) = label_names([entry.get("name")], f"{path}: category {key}")
        if key in names or name in names.values():
            raise DataError(f"{path}: category {key} ({shown(name)}) occurs twice: ids and names must be unique.")
        names[key] = name
    return dict(sorted(names.items(), key=lambda item: item[1] if order == "name" else item[0]))


def _images(content: dict[str, Any], source: Source) -> dict[int, ImageRow]:
    """Rows without labels by image id."""
    rows: dict[int, ImageRow] = {}
    files: set[str] = set()
    for n, entry in enumerate(content["images"]):
        key = _integer(entry, "id", f"{source.path}: image number {n}")
        where = f"{source.path}: image id {key}"
        width, height = (_integer(entry, side, where) for side in ("width", "height"))
        if width < 1 or height < 1:
            raise DataError(f"{where} has size {width} x {height}: both must be at least 1.")
        file = source.file(entry.get("file_name"), where, key="file_name")
        split = source.split(entry, where)
        if key in rows or file in files:
            raise DataError(f"{where} ({shown(file)[1:-1]}) occurs twice: ids and file names must be unique.")
        files.add(file)
        rows[key] = ImageRow(file, where, split, (), size=(width, height))
    return rows


def _box(bbox: Any, image: ImageRow, where: str) -> Box | None:
    """Convert (x, y, width, height) to (x1, y1, x2, y2), clipped to the image; None without area."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_finite, bbox)):
        raise DataError(f"{where} {shown(bbox)}: expected four finite numbers x, y, width, height.")
    where = f"{where} {bbox}"
    x, y, width, height = (float(v) for v in bbox)
    if width < 0 or height < 0:
        raise DataError(f"{where}: width and height must not be negative.")
    assert image.size is not None
    return clip_box((x, y, x + width, y + height), image.size, where)
