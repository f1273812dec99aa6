"""MS-COCO 2014 as it is distributed: two image folders and two annotation files, read strictly."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from gm_mlic.datasets.base import ABSENT, PRESENT, BoxAnnotations, MultiLabelDataset, check_targets
from gm_mlic.datasets.images import read_image
from gm_mlic.errors import ConfigError, DataError

#: How far, in pixels, a box may reach over the image's border (rounding in the annotations); it is clipped.
BOX_TOLERANCE = 2.0


@dataclass
class _Photo:
    """One entry of the annotation file's ``images`` with all that is annotated on it."""

    id: int
    file_name: str
    width: int
    height: int
    labels: set[int] = field(default_factory=set)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    box_labels: list[int] = field(default_factory=list)


class COCO2014(MultiLabelDataset):
    """MS-COCO 2014 with image-level labels derived from its object annotations.

    Expects the layout of the official archives::

        root/train2014/*.jpg
        root/val2014/*.jpg
        root/annotations/instances_train2014.json
        root/annotations/instances_val2014.json

    As the literature has it, ``val2014`` is the test set. ``train`` and ``val`` part ``train2014`` by a seeded random
    permutation of its images (in the order of their ids): ``round(val_fraction * N)`` of them, and at least one, are
    ``val``. With ``val_fraction=0`` all of ``train2014`` is ``train``.

    ============ ========================= ============== ==========
    archive      images with a label       all images     labels
    ============ ========================= ============== ==========
    train2014    82,081                    82,783         80
    val2014      40,137                    40,504         80
    ============ ========================= ============== ==========

    The default ``unlabelled="drop"`` gives the literature's 82,081 and 40,137.

    A label is present if any annotation of the image has its category, crowd regions (``iscrowd=1``) included, as in
    ML-GCN's label files. :meth:`boxes` leaves out crowd regions, which do not outline one object, and boxes without
    area. Boxes are clipped to the image if they reach at most :data:`BOX_TOLERANCE` pixels over its border. Rows are in
    the order of the image ids, which (as decimal strings) are ``ids``.

    Args:
        root: the folder described above.
        split: ``train``, ``val`` or ``test``.
        val_fraction: share of ``train2014`` held out as ``val``, in [0, 1).
        seed: of the permutation that holds it out.
        unlabelled: ``drop`` or ``keep`` images without any annotation.
        label_order: columns by ``name`` (alphabetical, as label embeddings are distributed) or by category ``id``.

    Raises:
        ConfigError: for a setting with another value.
        DataError: if a file is missing or malformed, an annotation names an unknown image or category or has an
            impossible box, or an image file does not exist.
    """

    name = "coco2014"

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        val_fraction: float = 0.1,
        seed: int = 0,
        unlabelled: Literal["drop", "keep"] = "drop",
        label_order: Literal["name", "id"] = "name",
    ) -> None:
        for key, value, allowed in (
            ("split", split, ("train", "val", "test")),
            ("unlabelled", unlabelled, ("drop", "keep")),
            ("label_order", label_order, ("name", "id")),
        ):
            if value not in allowed:
                raise ConfigError(f"dataset.{key} is {value!r}: choose one of {', '.join(allowed)}.")
        if not 0.0 <= val_fraction < 1.0:
            raise ConfigError(f"dataset.val_fraction is {val_fraction}: choose a share in [0, 1).")
        self.split = split
        self.root = Path(root)
        archive = "val2014" if split == "test" else "train2014"
        self.folder = self.root / archive
        source = self.root / "annotations" / f"instances_{archive}.json"
        for path, exists in ((self.folder, self.folder.is_dir()), (source, source.is_file())):
            if not exists:
                what = path.relative_to(self.root)
                raise DataError(f"COCO's {what} is missing: expected {path} under dataset.root ({self.root}).")

        content = _load(source)
        labels, column_of = _categories(content, source, label_order)
        photos = _photos(content, source)
        _annotate(photos, content, source, column_of)
        chosen = [photos[i] for i in sorted(photos) if unlabelled == "keep" or photos[i].labels]
        if split != "test":
            chosen = _holdout(chosen, split, val_fraction, seed)
        _check_files(chosen, self.folder, source)

        self.labels = labels
        self.ids = tuple(str(photo.id) for photo in chosen)
        self.targets = np.full((len(chosen), len(labels)), ABSENT, dtype=np.int8)
        for row, photo in enumerate(chosen):
            self.targets[row, list(photo.labels)] = PRESENT
        check_targets(self.ids, self.labels, self.targets)
        self._chosen = chosen

    def image(self, i: int) -> Image.Image:
        """The photo of row ``i`` as RGB, upright.

        Raises:
            UnreadableImage: if it cannot be decoded.
            DataError: if its size is not the annotated one, since the boxes would not fit.
        """
        photo = self._chosen[i]
        image = read_image(self.folder / photo.file_name)
        if image.size != (photo.width, photo.height):
            raise DataError(
                f"Image {self.folder / photo.file_name} is {image.width} x {image.height} pixels, but its annotation "
                f"(image id {photo.id}) says {photo.width} x {photo.height}: the boxes would not fit; mend one of them."
            )
        return image

    def boxes(self, i: int) -> BoxAnnotations:
        """The object boxes of row ``i``, without crowd regions; there may be none."""
        photo = self._chosen[i]
        return BoxAnnotations(
            boxes=torch.tensor(photo.boxes, dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor(photo.box_labels, dtype=torch.int64),
        )


def _load(source: Path) -> dict[str, Any]:
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
            raise DataError(f"{source}: {key!r} holds an entry that is no object: expected COCO's instances format.")
    return dict(content)


def _integer(entry: dict[str, Any], key: str, where: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{where} has {key} {value!r}: an integer is needed.")
    return value


def _categories(content: dict[str, Any], source: Path, order: str) -> tuple[tuple[str, ...], dict[int, int]]:
    """The label names in their order, and the column of each category id."""
    names: dict[int, str] = {}
    for n, entry in enumerate(content["categories"]):
        key = _integer(entry, "id", f"{source}: category number {n}")
        name = entry.get("name")
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{source}: category {key} has name {name!r}: a text is needed.")
        if key in names or name in names.values():
            raise DataError(f"{source}: category {key} ({name!r}) occurs twice: ids and names must be unique.")
        names[key] = name
    keys = sorted(names, key=lambda key: names[key]) if order == "name" else sorted(names)
    return tuple(names[key] for key in keys), {key: column for column, key in enumerate(keys)}


def _photos(content: dict[str, Any], source: Path) -> dict[int, _Photo]:
    photos: dict[int, _Photo] = {}
    files: set[str] = set()
    for n, entry in enumerate(content["images"]):
        key = _integer(entry, "id", f"{source}: image number {n}")
        where = f"{source}: image id {key}"
        width, height = (_integer(entry, side, where) for side in ("width", "height"))
        if width < 1 or height < 1:
            raise DataError(f"{where} has size {width} x {height}: both must be at least 1.")
        file_name = entry.get("file_name")
        if not isinstance(file_name, str) or not file_name or "\0" in file_name:
            raise DataError(f"{where} has file_name {file_name!r}: a file name is needed.")
        parts = PurePosixPath(file_name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file_name or ":" in file_name:
            raise DataError(f"{where} has file_name {file_name!r}: it must stay inside the image folder.")
        if key in photos or file_name in files:
            raise DataError(f"{where} ({file_name}) occurs twice: ids and file names must be unique.")
        files.add(file_name)
        photos[key] = _Photo(key, file_name, width, height)
    return photos


def _annotate(photos: dict[int, _Photo], content: dict[str, Any], source: Path, column_of: dict[int, int]) -> None:
    """Put each annotation's label and box on its photo."""
    for n, entry in enumerate(content["annotations"]):
        where = f"{source}: annotation {entry.get('id', f'number {n}')}"
        photo = photos.get(_integer(entry, "image_id", where))
        if photo is None:
            raise DataError(f"{where} is for image id {entry['image_id']}, not among the images: mend the file.")
        column = column_of.get(_integer(entry, "category_id", where))
        if column is None:
            raise DataError(
                f"{where} (image id {photo.id}) has category_id {entry['category_id']}, which is not among the "
                "categories: mend the file."
            )
        box = _box(entry.get("bbox"), photo, where)
        photo.labels.add(column)
        if box is not None and not entry.get("iscrowd", 0):
            photo.boxes.append(box)
            photo.box_labels.append(column)


def _box(bbox: Any, photo: _Photo, where: str) -> tuple[float, float, float, float] | None:
    """(x, y, width, height) as (x1, y1, x2, y2) within the image; None if it has no area."""
    where = f"{where} (image id {photo.id}, {photo.file_name}) has bbox {bbox}"
    number = isinstance(bbox, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in bbox)
    if not number or len(bbox) != 4 or not all(math.isfinite(v) for v in bbox):
        raise DataError(f"{where}: four finite numbers x, y, width, height are needed.")
    x, y, width, height = (float(v) for v in bbox)
    if width < 0 or height < 0:
        raise DataError(f"{where}: width and height must not be negative.")
    over = max(-x, -y, x + width - photo.width, y + height - photo.height)
    if over > BOX_TOLERANCE:
        raise DataError(f"{where}, outside the image of {photo.width} x {photo.height} pixels: mend the file.")
    x1, y1 = max(x, 0.0), max(y, 0.0)
    x2, y2 = min(x + width, float(photo.width)), min(y + height, float(photo.height))
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def _holdout(photos: list[_Photo], split: str, val_fraction: float, seed: int) -> list[_Photo]:
    count = max(1, round(val_fraction * len(photos))) if val_fraction else 0
    held_out = set(np.random.default_rng(seed).permutation(len(photos))[:count].tolist())
    chosen = [photo for row, photo in enumerate(photos) if (row in held_out) == (split == "val")]
    if photos and not chosen:
        raise ConfigError(
            f"dataset.val_fraction={val_fraction} of {len(photos)} images leaves none for split {split!r}: change it."
        )
    return chosen


def _check_files(photos: list[_Photo], folder: Path, source: Path) -> None:
    # One listing of the folder is far cheaper than tens of thousands of single look-ups.
    with os.scandir(folder) as entries:
        present = {entry.name for entry in entries}
    missing = [p.file_name for p in photos if p.file_name not in present and not (folder / p.file_name).is_file()]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{len(missing)} of {len(photos)} images of {source} are missing in {folder} ({first}): "
            "extract the archive again or remove them from the file."
        )
