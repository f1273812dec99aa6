"""Precomputed instances: boxes, scores, classes and features of any detector, read from files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from gm_mlic.datasets.images import IMAGE_SUFFIXES
from gm_mlic.detection.labels import label_of_class, read_labels
from gm_mlic.detection.protocol import ROUNDING, Instances
from gm_mlic.errors import ConfigError, DataError, check_positive
from gm_mlic.io import few, first_line, kept, sha256
from gm_mlic.registry import register_detector
from gm_mlic.safe_load import load_arrays

log = logging.getLogger(__name__)

#: Names of arrays in files; the first is the recommended one, the others are those of published features.
KEYS: Mapping[str, tuple[str, ...]] = {
    "boxes": ("boxes", "bbox", "bboxes", "image_bb"),
    "scores": ("scores", "objects_conf", "cls_prob"),
    "classes": ("classes", "objects_id"),
    "features": ("features", "x", "image_features"),
    "count": ("counts", "num_boxes", "num_bbox"),
    "width": ("image_w", "img_w", "image_width"),
    "height": ("image_h", "img_h", "image_height"),
    "ids": ("image_ids", "image_id", "img_id"),
    "offsets": ("offsets",),
    "spans": ("pos_boxes",),
    "labels": ("labels",),
}
#: Arrays with a row for each instance: numbers of dimensions, and shape in messages.
_SHAPES: Mapping[str, tuple[tuple[int, ...], str]] = {
    "boxes": ((2,), "(M, 4)"),
    "scores": ((1, 2), "(M,) or (M, C)"),
    "classes": ((1,), "(M,)"),
    "features": ((2,), "(M, D)"),
}
_ALL_NAMES = tuple(name for names in KEYS.values() for name in names)
_HDF5 = (".h5", ".hdf5")
#: File with the class names, in a folder of files.
LABELS_FILE = "labels.txt"
#: Boxes that leave the image by less than this part of its size are clipped without a warning.
_SLACK = 0.01
#: Hashes of larger files are stored beside them.
_SMALL_BYTES = 1 << 28


@register_detector("precomputed")
class Precomputed:
    """Instances of any detector, read from files by image id (:class:`~gm_mlic.detection.protocol.LookupExtractor`).

    ``path`` is a folder with an ``.npz`` file for each photo, an HDF5 file with a group for each photo, or one ``.npz``
    or HDF5 file whose arrays hold all photos, or a folder of these, such as one for each split. A photo matches the
    file, group or id of its name: its path, or the end of it, with or without extension.

    Each photo has ``boxes`` (M, 4), ``scores`` (M,) in [0, 1], or (M, C) for each class, ``classes`` (M,) with -1 for
    none, and ``features`` (M, D), in any order. Without scores, all are 1 and the order is kept. Without features, the
    score at the class is the feature (C,). A photo without boxes has one instance, the whole image, whose feature is
    zero. Boxes are clipped to the image; boxes without area are left out.

    Args:
        path: the folder or file.
        labels: class names, as a list or a text file with one per line (``N/A``: unused class); null: labels.txt in the
            folder, or the array ``labels`` in the file; without these, there are no classes.
        first_class: number of the first class: 1 if 0 is the background.
        box_format: ``xyxy`` (corners), ``xywh`` (left, top, width, height) or ``cxcywh`` (center, width, height).
        box_units: ``pixels`` of the photo, or ``fraction`` of its width and height. For pixels, its size is in the
            files (``image_w``, ``image_h``), or that of the photo.
        missing: photos without an entry: ``error``, or ``skip`` to leave them out, as unreadable photos are.

    Raises:
        ConfigError: if an argument is invalid, or h5py is not installed.
        DataError: if the files cannot be read.
    """

    name = "precomputed"

    def __init__(
        self,
        path: str | Path,
        labels: str | Path | list[str] | None = None,
        first_class: Literal[0, 1] = 0,
        box_format: Literal["xyxy", "xywh", "cxcywh"] = "xyxy",
        box_units: Literal["pixels", "fraction"] = "pixels",
        missing: Literal["error", "skip"] = "error",
    ) -> None:
        self.path = Path(path).expanduser()
        self.box_format, self.box_units, self.missing = box_format, box_units, missing
        self._sources = _open(self.path)
        self._source_of: dict[str, _Source] = {}
        for source in self._sources:
            for key in source.keys:
                if key in self._source_of:
                    raise DataError(f"{self.path} has the photo {key!r} more than once: make ids unique.")
                self._source_of[key] = source
        self._keys = list(self._source_of)
        self._names = _Names(self._keys)
        if labels is None and (self.path / LABELS_FILE).is_file():
            labels = self.path / LABELS_FILE
        if labels is None:
            labels = next((source.labels for source in self._sources if source.labels), None)
        names = () if labels is None else read_labels(labels, f"the class names of {self.path}")
        self.labels, self._label_of_class = label_of_class(names, first_class)
        self._num_classes = len(names)
        first, arrays = self._sources[0].read(self._keys[:1])[self._keys[0]]
        self.needs_sizes = box_units == "pixels" and "width" not in arrays
        self._has_features = "features" in arrays
        if not self._has_features and not self.labels:
            raise DataError(
                f"{first} has no features ({', '.join(KEYS['features'])}): add them, or classes and their `labels`, "
                "whose scores then are the features."
            )
        self.feature_dim = len(self.labels)
        if self._has_features:
            self.feature_dim = _rows(first, arrays)["features"].shape[1]
        self._clipped = self._dropped = 0

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the settings, the class names, and the content of the files.

        The content of an ``.npz`` file is known by the names, sizes and CRC-32 of its arrays, in the directory at its
        end. Of an HDF5 file all bytes are read; above 256 MB, their SHA-256 is kept in the file ``.NAME.sha256`` beside
        it until its size or time changes.
        """
        # Not `missing`: it does not change the instances of a photo.
        settings = [self.labels, self._label_of_class.tolist(), self.box_format, self.box_units]
        digest = hashlib.sha256(json.dumps(["precomputed", *settings]).encode())
        for source in self._sources:
            for part in source.content():
                digest.update(json.dumps(part).encode())
        return digest.hexdigest()

    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        """Not possible: raises :class:`~gm_mlic.errors.ConfigError`."""
        raise ConfigError(
            f"The instances in {self.path} are looked up by the name of a photo: they cannot be computed for an image "
            "without a name, an augmented or cropped view, or on-line. Use another detector for these."
        )

    def check_ids(self, ids: Sequence[str]) -> None:
        """Raise :class:`~gm_mlic.errors.DataError` if photos have no entry, unless ``missing="skip"``."""
        without = [name for name in ids if self._names.find(name) is None]
        have = f"photo{'s' * (len(ids) > 1)} {'has' if len(without) == 1 else 'have'}"
        problem = f"{len(without):,} of {len(ids):,} {have} no instances in {self.path}: {few(without)}"
        if without and self.missing == "error":
            raise DataError(f"{problem}: add them, or set `missing='skip'` to leave photos out.")
        if without and len(without) == len(ids):
            raise DataError(f"{problem}; it has {few(self._keys)}: check the names.")

    def look_up(self, ids: Sequence[str], sizes: Sequence[tuple[int, int] | None], m: int) -> list[Instances | str]:
        """Instances of photos; see :meth:`gm_mlic.detection.protocol.LookupExtractor.look_up`.

        Raises:
            ConfigError: if ``m`` is less than 1.
            DataError: if a photo has no entry and ``missing="error"``, or its entry is invalid; the message has the
                file, the array and the row.
        """
        check_positive(m=m)
        keys = [self._names.find(name) for name in ids]
        if None in keys and self.missing == "error":
            self.check_ids(ids)
        entries: dict[str, _Entry] = {}
        for source in self._sources:
            entries |= source.read([key for key in keys if key is not None and self._source_of[key] is source])
        return [
            f"{name} has no instances in {self.path}" if key is None else self._instances(*entries[key], size).top(m)
            for name, key, size in zip(ids, keys, sizes, strict=True)
        ]

    def log_corrections(self) -> None:
        """Log how many boxes were clipped or left out since the last call, if any."""
        counts = ((self._clipped, "reach out of the photo and are clipped"), (self._dropped, "have no area in it"))
        parts = [f"{count:,} boxes {what}" for count, what in counts if count]
        if parts:
            log.warning("%s: %s (box_format=%s).", self.path, " and ".join(parts), self.box_format)
        self._clipped = self._dropped = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, photos={len(self._keys)}, D={self.feature_dim})"

    def _instances(self, where: str, arrays: dict[str, np.ndarray], size: tuple[int, int] | None) -> Instances:
        """Checked and sorted instances of one photo."""
        parts = _rows(where, arrays)
        if ("features" in parts) != self._has_features:
            has = "no features" if self._has_features else "features"
            raise DataError(f"{where} has {has}, unlike the first photo: write all files in one way.")
        boxes = self._boxes(where, parts["boxes"], self._size(where, arrays, size))
        scores, labels = self._scored(where, parts, len(boxes))
        keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1).nonzero().flatten()
        self._dropped += len(boxes) - len(keep)
        keep = keep[scores[keep].sort(descending=True, stable=True).indices]
        if self._has_features:
            features = parts["features"].float()
            if features.shape[1] != self.feature_dim:
                raise DataError(f"{where}: features have {features.shape[1]} columns, expected {self.feature_dim}.")
        else:
            features = torch.zeros(len(boxes), self.feature_dim)
            classed = (labels >= 0).nonzero().flatten()
            features[classed, labels[classed]] = scores[classed]
        if len(keep) == 0:
            return Instances.whole_image(torch.zeros(self.feature_dim))
        return Instances(boxes[keep], scores[keep], labels[keep], features[keep])

    def _size(
        self, where: str, arrays: dict[str, np.ndarray], size: tuple[int, int] | None
    ) -> tuple[float, float] | None:
        """Width and height that boxes are divided by; None for fractions."""
        if self.box_units == "fraction":
            return None
        if "width" in arrays and "height" in arrays:
            width, height = (_number(where, key, arrays[key]) for key in ("width", "height"))
            if not (width > 0 and height > 0):
                raise DataError(f"{where}: the size of the photo is {width:g} x {height:g}, expected positive numbers.")
            return width, height
        if size is None:
            raise DataError(
                f"{where} has no size of the photo ({KEYS['width'][0]}, {KEYS['height'][0]}), unlike the first photo: "
                "boxes in pixels need it."
            )
        return size

    def _boxes(self, where: str, boxes: Tensor, size: tuple[float, float] | None) -> Tensor:
        """Boxes as corners, divided by the size of the photo and clipped."""
        corners: Tensor = box_convert(boxes.double(), self.box_format, "xyxy")
        highest = float(corners.max()) if len(corners) else 0.0
        if size is None and highest > 2:
            raise DataError(
                f"{where}: boxes reach {highest:g}, expected fractions from 0 to 1: set `box_units='pixels'`."
            )
        if size is not None:
            if len(corners) and 0 < highest <= 1 and min(size) > 2:
                raise DataError(f"{where}: boxes reach {highest:g} pixels only: set `box_units='fraction'`.")
            corners = corners / corners.new_tensor([*size, *size])
        clipped: Tensor = corners.clamp(0, 1)
        self._clipped += int(((corners - clipped).abs() > _SLACK).any(dim=1).sum())
        return clipped.float()

    def _scored(self, where: str, parts: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
        """Scores (M,) and labels (M,)."""
        scores = parts.get("scores", torch.ones(count)).float()
        classes = parts.get("classes")
        outside = ((scores < -ROUNDING) | (scores > 1 + ROUNDING)).nonzero()
        if len(outside):
            at = outside[0].tolist()
            raise DataError(f"{where}: scores{at} is {float(scores[tuple(at)]):g}, expected 0 to 1.")
        scores = scores.clamp(0, 1)
        if scores.dim() == 2:
            C = self._num_classes
            if not self.labels or scores.shape[1] not in (C, C + 1):
                raise DataError(
                    f"{where}: scores have {scores.shape[1]} columns, `labels` names {C} classes: expected a column "
                    "for each class, or for the background and each class."
                )
            best, label = scores[:, -C:][:, self._label_of_class[-C:] >= 0].max(dim=1)
            return best, label
        if classes is None or bool((classes == -1).all()):
            return scores, torch.full((count,), -1)
        if not self.labels:
            raise DataError(f"{where} has classes, but their names are unknown: set `labels`, or all classes to -1.")
        columns = len(self._label_of_class)
        wrong = ((classes < -1) | (classes >= columns) | (classes != classes.round())).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{where}: classes[{row}] is {float(classes[row]):g}, expected -1 to {columns - 1}: check `labels` and "
                "`first_class`."
            )
        number = classes.long()
        return scores, torch.where(number < 0, -1, self._label_of_class[number])


def _rows(where: str, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays with a row for each instance, checked: numbers, finite, of consistent shapes."""
    if "boxes" not in arrays:
        raise DataError(f"{where} has no boxes: expected the array {' or '.join(KEYS['boxes'])}.")
    found: dict[str, Tensor] = {}
    total = count = len(np.atleast_1d(arrays["boxes"]))
    if "count" in arrays:
        number = _number(where, "count", arrays["count"])
        if number != int(number) or not 0 <= number <= count:
            raise DataError(f"{where}: the number of boxes is {number:g}, but there are {count}.")
        count = int(number)
    for key, (dimensions, wanted) in ((key, _SHAPES[key]) for key in _SHAPES if key in arrays):
        array = arrays[key]
        if array.dtype.kind not in "fiub":
            raise DataError(f"{where}: {key} are {array.dtype}, expected numbers.")
        if key == "features" and array.ndim == 2 and len(array) != total and array.shape[1] == total:
            array = array.T  # some published files have a column for each box
        if key == "classes" and array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim not in dimensions or len(array) != total or (key == "boxes" and array.shape[1] != 4):
            raise DataError(f"{where}: {key} have shape {array.shape}, expected {wanted} with M = {count} boxes.")
        rows = array[:count]
        if not np.isfinite(rows).all():
            row = int(np.argwhere(~np.isfinite(rows))[0][0])
            raise DataError(f"{where}: {key}[{row}] is NaN or infinite: leave this instance out, or detect again.")
        kind = np.float64 if key in ("boxes", "classes") else np.float32
        with np.errstate(over="ignore"):
            found[key] = torch.from_numpy(np.ascontiguousarray(rows, dtype=kind))
    return found


def _number(where: str, key: str, array: np.ndarray) -> float:
    """A number that is stored as an array of one element."""
    if array.size != 1 or array.dtype.kind not in "fiub" or not math.isfinite(float(array.reshape(-1)[0])):
        raise DataError(f"{where}: {KEYS[key][0]} is not a number: write the file again.")
    return float(array.reshape(-1)[0])


class _Names:
    """Entries by the name of a photo.

    A name matches an entry if they are equal, or one is the end of the other at a ``/``, or both are the number of the
    same COCO image (``42`` and ``COCO_val2014_000000000042``); extensions of images are ignored.
    """

    def __init__(self, keys: Collection[str]) -> None:
        self._keys: dict[tuple[str, str], list[str]] = {}
        for key in keys:
            short = _without_suffix(key)
            ends = [("end", end) for end in _ends(short)[1:]]
            for form in (("exact", key), ("whole", short), *ends, ("number", _coco_number(short))):
                self._keys.setdefault(form, []).append(key)

    def find(self, name: str) -> str | None:
        """Entry of a photo, or None.

        Raises:
            DataError: if it matches several equally well.
        """
        name = PurePosixPath(str(name).replace("\\", "/")).as_posix()
        short = _without_suffix(name)
        number = _coco_number(short) or short
        forms = [("exact", exact) for exact in (name, *_ends(name))]
        forms += [*(("whole", end) for end in _ends(short)), ("end", short), ("number", number), ("whole", number)]
        keys = next((self._keys[form] for form in forms if form in self._keys), [])
        if len(keys) > 1:
            raise DataError(f"The photo {name} matches several precomputed entries: {few(keys)}: rename them.")
        return keys[0] if keys else None


def _without_suffix(name: str) -> str:
    return name[: -len(suffix)] if (suffix := PurePosixPath(name).suffix).lower() in IMAGE_SUFFIXES else name


def _ends(name: str) -> list[str]:
    """A path, and the ends of it at each ``/``."""
    parts = name.strip("/").split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def _coco_number(name: str) -> str:
    """Number of a COCO image; empty for other names."""
    match = re.search(r"(?:^|[_/])(\d{12})$", name)
    return str(int(match.group(1))) if match else ""


# Files

#: Place of a photo's instances, for messages, and its arrays by the keys of :data:`KEYS`.
_Entry = tuple[str, dict[str, np.ndarray]]


def _open(path: Path) -> list[_Source]:
    """Files at ``path``."""
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.suffix.lower() in (".npz", *_HDF5))
        files = sorted(found, key=lambda file: file.relative_to(path).as_posix())
        if not files:
            raise DataError(f"The folder {path} has no .npz files: expected one for each photo.")
        if files[0].suffix.lower() == ".npz" and not _load(files[0], KEYS["ids"]):
            return [_Folder(path, [file for file in files if file.suffix.lower() == ".npz"])]
        return [source for file in files for source in _open(file)]
    if not path.is_file():
        raise DataError(f"{path} does not exist: expected a folder with .npz files, an .npz file or an HDF5 file.")
    if path.suffix.lower() == ".npz":
        return [_Table(path)]
    if path.suffix.lower() not in _HDF5:
        raise DataError(f"{path} is neither a folder, an .npz file, nor an HDF5 file ({', '.join(_HDF5)}).")
    with _hdf5(path) as file:
        is_table = any(name in file for name in KEYS["ids"])
    return [_Table(path) if is_table else _Groups(path)]


class _Source(ABC):
    """Entries of photos by key.

    Attributes:
        keys: keys of all photos, at least one.
        labels: class names, if there are any.
    """

    keys: Collection[str]
    labels: list[str] | None = None

    def __init__(self, path: Path) -> None:
        self._path = path

    @abstractmethod
    def read(self, keys: Sequence[str]) -> dict[str, _Entry]:
        """Entries of photos."""

    def content(self) -> Iterator[Any]:
        """JSON-serializable parts that change with the content."""
        yield _content(self._path)


class _Folder(_Source):
    """An ``.npz`` file for each photo."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.keys = self._files = {file.relative_to(path).with_suffix("").as_posix(): file for file in files}

    def read(self, keys: Sequence[str]) -> dict[str, _Entry]:
        return {key: (str(self._files[key]), _by_key(_load(self._files[key], _ALL_NAMES))) for key in keys}

    def content(self) -> Iterator[Any]:
        for key, file in self._files.items():
            yield [key, _content(file)]


class _Table(_Source):
    """One file for all photos: arrays with rows of each photo, (N, M, ...) or concatenated.

    Arrays of an ``.npz`` file are in memory; large ones of an HDF5 file stay in the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._memory = None if path.suffix.lower() in _HDF5 else _by_key(_load(path, _ALL_NAMES))
        self._small: dict[str, np.ndarray] = {}
        with self._arrays() as arrays:
            if "ids" not in arrays or "boxes" not in arrays:
                names = ", ".join(KEYS[key][0] for key in arrays)
                raise DataError(f"{path} has the arrays {names}: expected image_ids, boxes, scores, features, ...")
            small = ("ids", "count", "offsets", "spans", "width", "height", "labels")
            self._small = {key: np.asarray(arrays[key][...]) for key in small if key in arrays}
            shapes = {key: array.shape for key, array in arrays.items()}
        self.keys = ids = _texts(path, "image_ids", self._small["ids"])
        if not ids:
            raise DataError(f"{path} has no photos: image_ids is empty.")
        self._row = {name: i for i, name in enumerate(ids)}
        self.labels = _texts(path, "labels", self._small["labels"]) if "labels" in self._small else None
        self._spans = self._find_spans(len(ids), shapes["boxes"])
        for key in (*_SHAPES, "width", "height"):
            wanted = len(ids) if self._spans is None or key not in _SHAPES else shapes["boxes"][0]
            if key in shapes and shapes[key][:1] != (wanted,):
                raise DataError(f"{path}: {key} have shape {shapes[key]}, expected {wanted} rows.")

    def _find_spans(self, N: int, boxes: tuple[int, ...]) -> np.ndarray | None:
        """First and last row + 1 of each photo (N, 2) in concatenated arrays; None for arrays (N, M, ...)."""
        if "spans" in self._small:
            spans = self._small["spans"]
        elif "offsets" in self._small:
            spans = np.stack([self._small["offsets"][:-1], self._small["offsets"][1:]], axis=1)
        elif len(boxes) == 2 and "count" in self._small:
            ends = np.cumsum(self._small["count"].reshape(-1))
            spans = np.stack([ends - self._small["count"].reshape(-1), ends], axis=1)
        elif len(boxes) == 3:
            return None
        else:
            raise DataError(
                f"{self._path}: boxes have shape {boxes}: expected (N, M, 4), or (total, 4) and counts (N,)."
            )
        if spans.shape != (N, 2) or spans.dtype.kind not in "iu":
            raise DataError(f"{self._path}: there are {N} image_ids, but rows of {len(spans)} photos.")
        wrong = np.flatnonzero((spans[:, 0] < 0) | (spans[:, 0] > spans[:, 1]) | (spans[:, 1] > boxes[0]))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(f"{self._path}: photo {row} has the rows {spans[row].tolist()} of {boxes[0]}.")
        return np.asarray(spans, dtype=np.int64)

    @contextlib.contextmanager
    def _arrays(self) -> Iterator[dict[str, Any]]:
        if self._memory is not None:
            yield self._memory
        else:
            with _hdf5(self._path) as file:
                yield _by_key(_datasets(self._path, file)) | self._small

    def read(self, keys: Sequence[str]) -> dict[str, _Entry]:
        single = ("width", "height", "count") if self._spans is None else ("width", "height")
        found = {}
        with self._arrays() as arrays:
            for key in keys:
                i = self._row[key]
                rows: Any = i if self._spans is None else slice(*self._spans[i].tolist())
                entry = {name: np.asarray(arrays[name][rows]) for name in _SHAPES if name in arrays}
                entry |= {name: np.asarray(arrays[name][i]) for name in single if name in arrays}
                found[key] = f"{self._path}, photo {key}", entry
        return found


class _Groups(_Source):
    """An HDF5 file with a group for each photo."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with _hdf5(path) as file:
            self.keys = list(self._find(file, ""))
            if "labels" in file:
                self.labels = _texts(path, "labels", np.asarray(_datasets(path, file)["labels"][...]))
        if not self.keys:
            raise DataError(f"{path} has no boxes: expected a group for each photo, or arrays with image_ids.")

    def _find(self, group: Any, prefix: str) -> Iterator[str]:
        """Names of the groups with boxes."""
        import h5py

        for name in group:
            inner = _member(self._path, group, name)
            if isinstance(inner, h5py.Group):
                if any(key in inner for key in KEYS["boxes"]):
                    yield prefix + name
                else:
                    yield from self._find(inner, f"{prefix}{name}/")

    def read(self, keys: Sequence[str]) -> dict[str, _Entry]:
        found = {}
        with _hdf5(self._path) as file:
            for key in keys:
                arrays = {name: array[...] for name, array in _datasets(self._path, file[key]).items()}
                arrays |= {name: np.asarray(value) for name, value in file[key].attrs.items()}
                found[key] = f"{self._path}, group {key}", _by_key(arrays)
        return found


def _by_key(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by the keys of :data:`KEYS`; of alternative names, the first is used."""
    present = {key: [name for name in names if name in arrays] for key, names in KEYS.items()}
    return {key: arrays[names[0]] for key, names in present.items() if names}


def _load(file: Path, names: Collection[str]) -> dict[str, np.ndarray]:
    try:
        return load_arrays(file, names)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}): write it again with numpy.savez.") from error


@contextlib.contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    """An open HDF5 file; errors of the library become one line."""
    try:
        import h5py
    except ImportError as error:
        raise ConfigError(f"The file {path} needs h5py: pip install 'gm-mlic[hdf5]'.") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"{path} is not an HDF5 file, or damaged ({first_line(error)}).") from error


def _member(path: Path, group: Any, name: str) -> Any:
    """A group or dataset that is stored in the file itself: HDF5 files can refer to any other file of the machine."""
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        where = f"{group.name}/{name}".strip("/")
        raise DataError(f"{path}: {where} is a link: copy its data into the file.")
    return group[name]


def _datasets(path: Path, group: Any) -> dict[str, Any]:
    """Datasets of a group that are arrays of :data:`KEYS`."""
    import h5py

    found = {}
    for name in (name for name in _ALL_NAMES if name in group):
        dataset = _member(path, group, name)
        if not isinstance(dataset, h5py.Dataset):
            raise DataError(f"{path}: {name} is a group, expected an array.")
        if dataset.external or dataset.is_virtual:
            raise DataError(f"{path}: {name} is stored in another file: copy its data into this one.")
        found[name] = dataset
    return found


def _texts(path: Path, name: str, array: np.ndarray) -> list[str]:
    """A list of names or numbers as strings."""
    if array.ndim != 1 or array.dtype.kind not in "iuSUO":
        raise DataError(f"{path}: {name} is {array.dtype} of shape {array.shape}, expected strings (N,).")
    return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in array.tolist()]


def _content(file: Path) -> Any:
    """Names, sizes and CRC-32 of the arrays of an ``.npz`` file; SHA-256 of an HDF5 file."""
    if file.suffix.lower() == ".npz":
        try:
            with zipfile.ZipFile(file) as archive:
                return sorted([info.filename, info.file_size, info.CRC] for info in archive.infolist())
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{file} is not an .npz file, or damaged: write it again with numpy.savez.") from error
    stat = file.stat()
    if stat.st_size <= _SMALL_BYTES:
        return sha256(file)
    stamp, state = file.with_name(f".{file.name}.sha256"), [stat.st_size, stat.st_mtime_ns]
    return kept(stamp, state, lambda: sha256(file), f"Computing the SHA-256 of {file}")
