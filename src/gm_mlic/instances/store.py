"""The instance store: what a detector found in every image of a split, memory-mapped, with a manifest.

A store is a folder. Shapes: N images, V = 1 + r views of each (view 0 is the plain image, views 1 to r are augmented),
m instance slots, D features, C labels. Instances stand highest confidence first; a slot beyond the image's count is
zero, with detected label -1.

=================== ============ ======= =========================================================
file                shape        dtype   holds
=================== ============ ======= =========================================================
manifest.json                            :class:`Manifest`; written last: with it, the store is complete
features.npy        (N, V, m, D) float16 f of eq. 1
boxes.npy           (N, V, m, 4) float32 B of eq. 1: x1, y1, x2, y2 divided by image width and height
scores.npy          (N, V, m)    float32 confidences in [0, 1]
detected_labels.npy (N, V, m)    int32   index into the manifest's ``detector_labels``; -1 for none
counts.npy          (N, V)       int32   how many slots are used; 0 only where the image is unreadable
targets.npy         (N, C)       int8    1 present, 0 absent
difficult.npy       (N, C)       bool    True where a label is difficult; only if the dataset says so
=================== ============ ======= =========================================================

Because the slots are sorted, the first m' of them are what extraction with m' would have given: sweeps over m slice
one store. While a store is being made it is the folder ``<path>.partial`` (:mod:`gm_mlic.instances.writer`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gm_mlic.datasets.base import MultiLabelDataset
from gm_mlic.detection.protocol import InstanceExtractor, Instances
from gm_mlic.errors import ArgumentError, StoreError
from gm_mlic.safe_load import map_array

log = logging.getLogger(__name__)

#: Stores up to this size are checked each time: it takes a second.
_SMALL_BYTES = 1 << 30
FORMAT = 2
MANIFEST = "manifest.json"
REMEDY = "set `overwrite=True` to replace it, or another `path` to keep both"


@dataclass(frozen=True)
class Manifest:
    """What a store holds and what it was made with. No times, no machine: equal jobs write equal bytes.

    Attributes:
        dataset, split, dataset_fingerprint: of the :class:`~gm_mlic.datasets.MultiLabelDataset`.
        ids, labels: its N image ids and C label names, in the order of the arrays.
        difficult: whether it has a mask of difficult labels.
        detector, detector_fingerprint, detector_labels, feature_dim: of the extractor.
        m: instance slots for each view.
        views: r, the augmented views of each image; the arrays have V = 1 + r of them.
        view_size, view_seed: side in pixels and seed of the augmented views; None where there are none.
        batch_size: images to one call of the extractor (padding within a batch can change the last bits).
        versions: of gm_mlic, torch, torchvision and numpy.
        skipped: id to reason, for each image that could not be decoded.
        arrays: name to ``{"shape", "dtype", "sha256"}`` of each array's file.
    """

    dataset: str
    split: str
    dataset_fingerprint: str
    ids: tuple[str, ...]
    labels: tuple[str, ...]
    difficult: bool
    detector: str
    detector_fingerprint: str
    detector_labels: tuple[str, ...]
    feature_dim: int
    m: int
    views: int
    view_size: int | None
    view_seed: int | None
    batch_size: int
    versions: dict[str, str]
    dtype: str = "float16"
    skipped: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def specs(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype (little-endian) of each array."""
        slots = (len(self.ids), 1 + self.views, self.m)
        pairs = (len(self.ids), len(self.labels))
        return {
            "features": ((*slots, self.feature_dim), np.dtype(self.dtype).newbyteorder("<")),
            "boxes": ((*slots, 4), np.dtype("<f4")),
            "scores": (slots, np.dtype("<f4")),
            "detected_labels": (slots, np.dtype("<i4")),
            "counts": (slots[:2], np.dtype("<i4")),
            "targets": (pairs, np.dtype("i1")),
        } | ({"difficult": (pairs, np.dtype("?"))} if self.difficult else {})

    def to_json(self) -> str:
        """The text of ``manifest.json``; equal manifests give equal text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Read a manifest.

        Raises:
            StoreError: if it cannot be read, is no manifest, or is of another format version.
        """
        broken = f"The manifest {file} is damaged"
        again = "extract again with `overwrite=True`"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError(f"Cannot read the manifest {file}: {error.strerror}.") from error
        except ValueError as error:
            raise StoreError(f"{broken} ({error}): {again}.") from error
        if not isinstance(values, dict):
            raise StoreError(f"{broken} (not a JSON object): {again}.")
        if values.get("format") != FORMAT:
            raise StoreError(
                f"The store {file.parent} has format {values.get('format')!r}, this version of gm-mlic reads format "
                f"{FORMAT}: {again}, or use the version that made it."
            )
        for spec in dataclasses.fields(cls):
            value = values.get(spec.name)
            kind: Any = {"int": int, "str": str, "bool": bool, "int | None": (int, type(None))}.get(
                str(spec.type), dict
            )
            if str(spec.type).startswith("tuple"):
                kind = list
            if spec.name not in values or not isinstance(value, kind):
                raise StoreError(f"{broken} (field {spec.name!r} is missing or malformed): {again}.")
            if kind is list:
                values[spec.name] = tuple(map(str, values[spec.name]))
        try:
            manifest = cls(**values)
            manifest.specs()
        except TypeError as error:
            raise StoreError(f"{broken} ({error}): {again}.") from error
        return manifest


def dataset_fields(dataset: MultiLabelDataset) -> dict[str, Any]:
    """The fields of :class:`Manifest` that a dataset decides."""
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "dataset_fingerprint": dataset.fingerprint,
        "ids": tuple(dataset.ids),
        "labels": tuple(dataset.labels),
        "difficult": dataset.difficult is not None,
    }


def extractor_fields(extractor: InstanceExtractor) -> dict[str, Any]:
    """The fields of :class:`Manifest` that an extractor decides."""
    return {
        "detector": extractor.name,
        "detector_fingerprint": extractor.fingerprint,
        "detector_labels": tuple(extractor.labels),
        "feature_dim": int(extractor.feature_dim),
    }


def differences(found: Manifest, wanted: Manifest) -> Iterator[str]:
    """How the job of one manifest differs from another's, naming both sides, the most telling first."""
    if (found.dataset, found.split) != (wanted.dataset, wanted.split):
        yield (
            f"it has dataset {found.dataset}, split {found.split}; "
            f"you asked for dataset {wanted.dataset}, split {wanted.split}"
        )
    yield from _list_difference("label", found.labels, wanted.labels)
    yield from _list_difference("image", found.ids, wanted.ids)
    if found.dataset_fingerprint != wanted.dataset_fingerprint:
        yield (
            f"it has other targets (dataset sha {found.dataset_fingerprint[:8]}) "
            f"than you asked for (sha {wanted.dataset_fingerprint[:8]})"
        )
    if found.detector != wanted.detector or found.detector_fingerprint != wanted.detector_fingerprint:
        yield (
            f"it has detector {found.detector} (sha {found.detector_fingerprint[:8]}), "
            f"you asked for {wanted.detector} (sha {wanted.detector_fingerprint[:8]}: weights or settings differ)"
        )
    yield from _list_difference("detector label", found.detector_labels, wanted.detector_labels)
    for name in ("feature_dim", "m", "views", "view_size", "view_seed", "batch_size", "dtype"):
        if getattr(found, name) != getattr(wanted, name):
            yield f"it has {name}={getattr(found, name)}, you asked for {name}={getattr(wanted, name)}"
    for name, version in wanted.versions.items():
        if found.versions.get(name) != version:
            yield f"it was begun with {name} {found.versions.get(name)}, this is {name} {version}"


def _list_difference(what: str, found: Sequence[str], wanted: Sequence[str]) -> Iterator[str]:
    for i, (a, b) in enumerate(zip(found, wanted, strict=False)):
        if a != b:
            yield f"its {what} {i} is {a!r}, yours is {b!r}"
            return
    if len(found) != len(wanted):
        yield f"it has {len(found)} {what}s, you asked for {len(wanted)}"


class InstanceStore:
    """A complete instance store, opened for reading.

    Opening checks the manifest and that every array file has the recorded shape, dtype and length; :meth:`verify`
    also reads them all and compares checksums. Pickling (to a DataLoader's worker) sends the path, not the arrays.

    Attributes:
        path: the store's folder.
        manifest: what it holds and was made with.
        features, boxes, scores, detected_labels, counts, targets: read-only memory maps; see the module.
        difficult: likewise; None if the dataset has no mask of difficult labels.
        rows: (n,) int64 indices of the readable images, ascending.
    """

    features: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    detected_labels: np.ndarray
    counts: np.ndarray
    targets: np.ndarray
    difficult: np.ndarray | None

    def __init__(self, path: Path, manifest: Manifest, arrays: dict[str, np.ndarray]) -> None:
        self.path = path
        self.manifest = manifest
        self.features = arrays["features"]
        self.boxes = arrays["boxes"]
        self.scores = arrays["scores"]
        self.detected_labels = arrays["detected_labels"]
        self.counts = arrays["counts"]
        self.targets = arrays["targets"]
        self.difficult = arrays.get("difficult")
        self.rows: np.ndarray = np.flatnonzero(self.counts[:, 0] > 0)

    @classmethod
    def open(cls, path: str | Path) -> InstanceStore:
        """Open the store in the folder ``path``.

        Raises:
            StoreError: if it is missing, unfinished or damaged.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            if partial_path(path).is_dir():
                raise StoreError(
                    f"The instance store {path} is unfinished: call gm_mlic.extract (or run gm-mlic extract) with the "
                    "same arguments again; it continues where it stopped."
                )
            what = "is not an instance store (no manifest.json)" if path.exists() else "does not exist"
            raise StoreError(f"The instance store {path} {what}: make it with gm_mlic.extract (or gm-mlic extract).")
        manifest = Manifest.read(path / MANIFEST)
        arrays = {name: _open_array(path / f"{name}.npy", manifest, name) for name in manifest.specs()}
        return cls(path, manifest, arrays)

    def __len__(self) -> int:
        """N, unreadable images included."""
        return len(self.manifest.ids)

    def __repr__(self) -> str:
        manifest = self.manifest
        return (
            f"{type(self).__name__}({str(self.path)!r}, dataset={manifest.dataset}, split={manifest.split}, "
            f"images={len(self)}, views={manifest.views}, m={manifest.m}, detector={manifest.detector})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.path,)

    def instances(self, i: int, view: int = 0, m: int | None = None) -> Instances:
        """The instances of image ``i``, as tensors of their own (not views of the map).

        Args:
            i: row.
            view: 0 the plain image, 1 to r an augmented one.
            m: keep the ``m`` most confident; None keeps the store's.

        Raises:
            StoreError: if the image was unreadable, or the store has fewer views or slots.
            ConfigError: if ``m`` is less than 1.
        """
        if m is not None:
            self.check(m=m)
        if not 0 <= view <= self.manifest.views:
            raise StoreError(f"The store {self.path} has views 0 to {self.manifest.views}, you asked for view {view}.")
        count = int(self.counts[i, view])
        if count == 0:
            image = self.manifest.ids[i]
            raise StoreError(
                f"Image {image!r} has no instances in the store {self.path}: "
                f"{self.manifest.skipped.get(image, 'it was unreadable')}. Use only the rows in InstanceStore.rows."
            )
        top = slice(0, count if m is None else min(count, m))
        return Instances(
            boxes=torch.tensor(self.boxes[i, view, top]),
            scores=torch.tensor(self.scores[i, view, top]),
            detected_labels=torch.tensor(self.detected_labels[i, view, top], dtype=torch.int64),
            features=torch.tensor(self.features[i, view, top].astype(np.float32)),
        )

    def check(
        self,
        dataset: MultiLabelDataset | None = None,
        extractor: InstanceExtractor | None = None,
        m: int | None = None,
        views: int | None = None,
        view_size: int | None = None,
        view_seed: int | None = None,
    ) -> None:
        """Raise unless this store serves what is asked for; what is None is not checked.

        A store with more instances or views than asked for serves: it is sliced.

        Raises:
            StoreError: naming what the store has, what was asked for, and what to do.
            ConfigError: if ``m`` is less than 1 or ``views`` is negative.
        """
        have = self.manifest
        check_sizes(m=m, views=views)
        asked: dict[str, Any] = {}
        if dataset is not None:
            asked |= dataset_fields(dataset)
        if extractor is not None:
            asked |= extractor_fields(extractor)
        if views and have.views:
            asked |= {} if view_size is None else {"view_size": view_size}
            asked |= {} if view_seed is None else {"view_seed": view_seed}
        wanted = dataclasses.replace(have, **asked)
        for difference in differences(have, wanted):
            raise StoreError(f"The store {self.path} was made for something else: {difference}; {REMEDY}.")
        if m is not None and m > have.m:
            raise StoreError(
                f"The store {self.path} has m={have.m} instances for each image, you asked for m={m}: extract "
                f"again with `m={m}` and `overwrite=True`, or ask for fewer."
            )
        if views is not None and views > have.views:
            raise StoreError(
                f"The store {self.path} has {have.views} augmented views, you asked for {views}: extract again "
                f"with `views={views}` and `overwrite=True`, or ask for fewer."
            )

    def verify(self) -> None:
        """Read every array and compare its SHA-256 with the manifest's.

        Raises:
            StoreError: naming the first file that differs.
        """
        for name, info in self.manifest.arrays.items():
            file = self.path / f"{name}.npy"
            if sha256(file) != info.get("sha256"):
                raise StoreError(
                    f"The file {file} is damaged (its SHA-256 is not the manifest's): "
                    "extract again with `overwrite=True`."
                )

    def verify_once(self) -> None:
        """:meth:`verify`, unless that has been done since the files were last changed; up to 1 GB, always.

        Raises:
            StoreError: likewise.
        """
        files = [self.path / f"{name}.npy" for name in self.manifest.arrays]
        stats = [file.stat() for file in files]
        if sum(s.st_size for s in stats) <= _SMALL_BYTES:
            self.verify()
            return
        state = json.dumps([[file.name, s.st_size, s.st_mtime_ns] for file, s in zip(files, stats, strict=True)])
        stamp = self.path.with_name(f".{self.path.name}.verified")
        with contextlib.suppress(OSError):
            if stamp.read_text() == state:
                return
        log.info("Checking the instance store %s.", self.path)
        self.verify()
        with contextlib.suppress(OSError):  # a store that is not ours to write beside is checked each time
            stamp.write_text(state)


def partial_path(path: Path) -> Path:
    """The folder in which the store ``path`` is being made."""
    return path.with_name(path.name + ".partial")


def check_sizes(m: int | None = None, views: int | None = None) -> None:
    """Raise ConfigError unless ``m`` is at least 1 and ``views`` is not negative."""
    if m is not None and m < 1:
        raise ArgumentError("m", f"must be 1 or more, got {m}.")
    if views is not None and views < 0:
        raise ArgumentError("views", f"must be 0 or more, got {views}.")


def sha256(file: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _open_array(file: Path, manifest: Manifest, name: str) -> np.ndarray:
    shape, dtype = manifest.specs()[name]
    again = "extract again with `overwrite=True`"
    recorded = manifest.arrays.get(name)
    if not isinstance(recorded, dict) or recorded.get("shape") != list(shape) or recorded.get("dtype") != dtype.str:
        raise StoreError(f"The manifest {file.parent / MANIFEST} is damaged (array {name!r} does not fit it): {again}.")
    try:
        array = map_array(file)
    except FileNotFoundError as error:
        raise StoreError(f"The store {file.parent} lacks {file.name}: {again}.") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"The file {file} is damaged ({error}): {again}.") from error
    if array.shape != shape or array.dtype != dtype:
        raise StoreError(
            f"The file {file} is damaged: it has {array.dtype} {array.shape}, the manifest says {dtype} {shape}: "
            f"{again}."
        )
    if file.stat().st_size != array.offset + array.nbytes:
        raise StoreError(f"The file {file} is damaged: it is longer than its header says; {again}.")
    return array
