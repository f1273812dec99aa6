"""Parser for COCO's instances format (one JSON file), used for MS-COCO and custom datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from gm_mlic.datasets.annotation_rows import is_finite, shown
from gm_mlic.datasets.base import BoxAnnotations
from gm_mlic.datasets.images import read_image
from gm_mlic.errors import DataError

#: Largest overhang of a box over the image border in pixels (rounding in annotations) that is clipped, not refused.
BOX_TOLERANCE = 2.0


@dataclass
class Photo:
    """One ``images`` entry with its annotations.

    ``labels`` and ``box_labels`` are label indices. ``boxes`` are (x1, y1, x2, y2) in pixels, clipped to the image,
    without crowd regions and boxes without area. ``unboxed``: whether an annotation has no box.
    """

    id: int
    file_name: str
    width: int
    height: int
    labels: set[int] = field(default_factory=set)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    box_labels: list[int] = field(default_factory=list)
    unboxed: bool = False

    def box_annotations(self) -> BoxAnnotations:
        """Boxes as :class:`BoxAnnotations`."""
        return BoxAnnotations.of(self.boxes, self.box_labels)


def load(source: Path) -> dict[str, Any]:
    """Load an annotation file.

    Raises:
        DataError: unless it is JSON with the lists of objects ``images``, ``annotations`` and ``categories``.
    """
    try:
        content = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not valid JSON ({error}): extract or download it again.") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}).") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{source} has no list {key!r}: expected COCO's instances format.")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise DataError(f"{source}: {key!r} has an entry that is not an object: expected COCO's instances format.")
    return dict(content)


def parse(
    content: dict[str, Any],
    source: Path,
    label_order: Literal["name", "id"] = "name",
    locate: Callable[[Any, str], str] | None = None,
) -> tuple[tuple[str, ...], dict[int, Photo]]:
    """Parse label names, and photos with labels and boxes by image id.

    Args:
        content: the result of :func:`load`.
        source: path of the file, for error messages.
        label_order: sort labels by ``name`` (alphabetical) or by category ``id``.
        locate: function of a file name, and of the start of error messages, that returns the path of the photo. With
            it, annotations may have no box. Default: names are kept, and each annotation has a box.

    Raises:
        DataError: if an entry is malformed or duplicated, names an unknown image or category, or has an invalid box.
    """
    labels, column_of = _categories(content, source, label_order)
    photos = _photos(content, source, locate)
    _annotate(photos, content, source, column_of, locate is not None)
    return labels, photos


def read_photo(folder: Path, photo: Photo) -> Image.Image:
    """Read a photo as RGB, upright.

    Raises:
        UnreadableImage: if it cannot be decoded.
        DataError: if its size differs from the annotated one.
    """
    path = folder / photo.file_name
    image = read_image(path)
    check_size(path, image.size, (photo.width, photo.height), f"its annotation (image id {photo.id})")
    return image


def leaves_folder(file_name: str) -> bool:
    """Whether an annotated file name could point outside the image folder, on any operating system."""
    parts = PurePosixPath(file_name)
    return parts.is_absolute() or ".." in parts.parts or "\\" in file_name or ":" in file_name


def check_size(path: Path, size: tuple[int, int], annotated: tuple[int, int], where: str) -> None:
    """Raise :class:`DataError` if the (width, height) of an image differs from the annotated one."""
    if size != annotated:
        raise DataError(
            f"Image {path} is {size[0]} x {size[1]} pixels, but {where} has {annotated[0]} x {annotated[1]}: correct "
            "the annotation or replace the image."
        )


def clip_box(
    box: tuple[float, float, float, float], size: tuple[int, int], where: str
) -> tuple[float, float, float, float] | None:
    """Clip (x1, y1, x2, y2) to an image of ``size`` (width, height); None if no area is left.

    Raises:
        DataError: if it exceeds the border by more than :data:`BOX_TOLERANCE` pixels; ``where`` starts the message.
    """
    (x1, y1, x2, y2), (width, height) = box, size
    if max(-x1, -y1, x2 - width, y2 - height) > BOX_TOLERANCE:
        raise DataError(f"{where}, outside the image of {width} x {height} pixels: correct the file.")
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def _integer(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where} has {key} {shown(value)}: expected an integer.")
    return value


def _categories(content: dict[str, Any], source: Path, order: str) -> tuple[tuple[str, ...], dict[int, int]]:
    """Ordered label names, and the label index of each category id."""
    names: dict[int, str] = {}
    for n, entry in enumerate(content["categories"]):
        key = _integer(entry, "id", f"{source}: category number {n}")
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{source}: category {key} has name {shown(name)}: expected a string.")
        if key in names or name in names.values():
            raise DataError(f"{source}: category {key} ({shown(name)}) occurs twice: ids and names must be unique.")
        names[key] = name
    keys = sorted(names, key=lambda key: names[key]) if order == "name" else sorted(names)
    return tuple(names[key] for key in keys), {key: column for column, key in enumerate(keys)}


def _photos(content: dict[str, Any], source: Path, locate: Callable[[Any, str], str] | None) -> dict[int, Photo]:
    photos: dict[int, Photo] = {}
    files: set[str] = set()
    for n, entry in enumerate(content["images"]):
        key = _integer(entry, "id", f"{source}: image number {n}")
        where = f"{source}: image id {key}"
        width, height = (_integer(entry, side, where) for side in ("width", "height"))
        if width < 1 or height < 1:
            raise DataError(f"{where} has size {width} x {height}: both must be at least 1.")
        file_name = entry.get("file_name")
        if not isinstance(file_name, str) or not file_name or "\0" in file_name:
            raise DataError(f"{where} has file_name {shown(file_name)}: expected a file name.")
        if locate is not None:
            file_name = locate(file_name, where)
        elif leaves_folder(file_name):
            raise DataError(f"{where} has file_name {shown(file_name)}: it must stay inside the image folder.")
        if key in photos or file_name in files:
            raise DataError(f"{where} ({shown(file_name)[1:-1]}) occurs twice: ids and file names must be unique.")
        files.add(file_name)
        photos[key] = Photo(key, file_name, width, height)
    return photos


def _annotate(
    photos: dict[int, Photo],
    content: dict[str, Any],
    source: Path,
    column_of: dict[int, int],
    boxes_optional: bool,
) -> None:
    """Add each annotation's label and box to its photo."""
    for n, entry in enumerate(content["annotations"]):
        key = entry.get("id", f"number {n}")
        where = f"{source}: annotation {key if isinstance(key, int) or 'id' not in entry else shown(key)}"
        photo = photos.get(_integer(entry, "image_id", where))
        if photo is None:
            raise DataError(f"{where} has unknown image_id {shown(entry['image_id'])}: correct the file.")
        column = column_of.get(_integer(entry, "category_id", where))
        if column is None:
            category = shown(entry["category_id"])
            raise DataError(f"{where} (image id {photo.id}) has unknown category_id {category}: correct the file.")
        unboxed = boxes_optional and entry.get("bbox") in (None, [])
        box = None if unboxed else _box(entry.get("bbox"), photo, where)
        photo.unboxed |= unboxed
        photo.labels.add(column)
        if box is not None and not entry.get("iscrowd", 0):
            photo.boxes.append(box)
            photo.box_labels.append(column)


def _box(bbox: Any, photo: Photo, where: str) -> tuple[float, float, float, float] | None:
    """Convert (x, y, width, height) to (x1, y1, x2, y2), clipped to the image; None without area."""
    where = f"{where} (image id {photo.id}, {photo.file_name}) has bbox"
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_finite, bbox)):
        raise DataError(f"{where} {shown(bbox)}: expected four finite numbers x, y, width, height.")
    where = f"{where} {bbox}"
    x, y, width, height = (float(v) for v in bbox)
    if width < 0 or height < 0:
        raise DataError(f"{where}: width and height must not be negative.")
    return clip_box((x, y, x + width, y + height), (photo.width, photo.height), where)
