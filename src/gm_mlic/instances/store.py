"""Instance store: memory-mapped instances of every image of a split, with a manifest.

A store is a folder. Shapes: N images, V = 1 + r views per image (view 0 is the original, views 1 to r are augmented),
m instance slots, D features, C labels. Instances are sorted by descending confidence. Unused slots are zero, with
detected label -1.

=================== ============ ======= =========================================================
file                shape        dtype   content
=================== ============ ======= =========================================================
manifest.json                            :class:`Manifest`; written last, marks the store complete
features.npy        (N, V, m, D) float16 f of eq. 1
boxes.npy           (N, V, m, 4) float32 B of eq. 1: x1, y1, x2, y2 divided by image width and height
scores.npy          (N, V, m)    float32 confidences in [0, 1]
detected_labels.npy (N, V, m)    int32   index into the manifest's ``detector_labels``; -1 for none
counts.npy          (N, V)       int32   number of used slots; 0 only for unreadable images
targets.npy         (N, C)       int8    1 present, 0 absent
difficult.npy       (N, C)       bool    mask of difficult labels; only if the dataset has one
=================== ============ ======= =========================================================

The first m' slots equal an extraction with m = m', so that sweeps over m slice one store. An incomplete store is the
folder ``<path>.partial`` (:mod:`gm_mlic.instances.writer`).
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

#: Stores up to this size are verified each time, in about a second.
_SMALL_BYTES = 1 << 30
FORMAT = 2
MANIFEST = "manifest.json"
REMEDY = "set `overwrite=True` to replace it, or another `path` to keep both"


@dataclass(frozen=True)
class Manifest:
    """Metadata of a store. It has no times or host names: equal jobs write equal bytes.

    Attributes:
        dataset, split, dataset_fingerprint: of the :class:`~gm_mlic.datasets.MultiLabelDataset`.
        ids, labels: its N image ids and C label names, in the order of the arrays.
        difficult: whether it has a mask of difficult labels.
        detector, detector_fingerprint, detector_labels, feature_dim: of the extractor.
        m: instance slots per view.
        views: r, augmented views per image; the arrays have V = 1 + r views.
        view_size, view_seed: size in pixels and seed of the augmented views; None without them.
        batch_size: images per call of the extractor (padding within a batch can change the last bits).
        versions: of gm_mlic, torch, torchvision and numpy.
        skipped: reason by id, for unreadable images.
        arrays: ``{"shape", "dtype", "sha256"}`` by array name.
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
        """Serialize to ``manifest.json``; equal manifests give equal text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Read a manifest.

        Raises:
            StoreError: if it cannot be read, is not a manifest, or has another format version.
        """
        damaged = f"The manifest {file} is damaged"
        remedy = "extract again with `overwrite=True`"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise StoreError(f"Cannot read the manifest {file}: {error.strerror}.") from error
        except ValueError as error:
            raise StoreError(f"{damaged} ({error}): {remedy}.") from error
        if not isinstance(values, dict):
            raise StoreError(f"{damaged} (not a JSON object): {remedy}.")
        if values.get("format") != FORMAT:
            raise StoreError(
                f"The store {file.parent} has format {values.get('format')!r}, this version of gm-mlic reads format "
                f"{FORMAT}: {remedy}, or use the version that wrote it."
            )
        for spec in dataclasses.fields(cls):
            value = values.get(spec.name)
            kind: Any = {"int": int, "str": str, "bool": bool, "int | None": (int, type(None))}.get(
                str(spec.type), dict
            )
            if str(spec.type).startswith("tuple"):
                kind = list
            if spec.name not in values or not isinstance(value, kind):
                raise StoreError(f"{damaged} (field {spec.name!r} is missing or malformed): {remedy}.")
            if kind is list:
                values[spec.name] = tuple(map(str, values[spec.name]))
        try:
            manifest = cls(**values)
            manifest.specs()
        except TypeError as error:
            raise StoreError(f"{damaged} ({error}): {remedy}.") from error
        return manifest


def dataset_fields(dataset: MultiLabelDataset) -> dict[str, Any]:
    """Fields of :class:`Manifest` from a dataset."""
    return {
        "dataset": dataset.name,
        "split": dataset.split,
        "dataset_fingerprint": dataset.fingerprint,
        "ids": tuple(dataset.ids),
        "labels": tuple(dataset.labels),
        "difficult": dataset.difficult is not None,
    }


def extractor_fields(extractor: InstanceExtractor) -> dict[str, Any]:
    """Fields of :class:`Manifest` from an extractor."""
    return {
        "detector": extractor.name,
        "detector_fingerprint": extractor.fingerprint,
        "detector_labels": tuple(extractor.labels),
        "feature_dim": int(extractor.feature_dim),
    }


def differences(stored: Manifest, requested: Manifest) -> Iterator[str]:
    """Differences between the jobs of two manifests, the most informative first."""
    if (stored.dataset, stored.split) != (requested.dataset, requested.split):
        yield (
            f"it has dataset {stored.dataset}, split {stored.split}; "
            f"requested: dataset {requested.dataset}, split {requested.split}"
        )
    yield from _list_difference("label", stored.labels, requested.labels)
    yield from _list_difference("image", stored.ids, requested.ids)
    if stored.dataset_fingerprint != requested.dataset_fingerprint:
        yield (
            f"it has other targets (dataset sha {stored.dataset_fingerprint[:8]}) "
            f"than requested (sha {requested.dataset_fingerprint[:8]})"
        )
    if stored.detector != requested.detector or stored.detector_fingerprint != requested.detector_fingerprint:
        yield (
            f"it has detector {stored.detector} (sha {stored.detector_fingerprint[:8]}), "
            f"requested: {requested.detector} (sha {requested.detector_fingerprint[:8]}: weights or settings differ)"
        )
    yield from _list_difference("detector label", stored.detector_labels, requested.detector_labels)
    for name in ("feature_dim", "m", "views", "view_size", "view_seed", "batch_size", "dtype"):
        if getattr(stored, name) != getattr(requested, name):
            yield f"it has {name}={getattr(stored, name)}, requested: {name}={getattr(requested, name)}"
    for name, version in requested.versions.items():
        if stored.versions.get(name) != version:
            yield f"it was begun with {name} {stored.versions.get(name)}, installed: {name} {version}"


def _list_difference(what: str, stored: Sequence[str], requested: Sequence[str]) -> Iterator[str]:
    for i, (a, b) in enumerate(zip(stored, requested, strict=False)):
        if a != b:
            yield f"its {what} {i} is {a!r}, requested: {b!r}"
            return
    if len(stored) != len(requested):
        yield f"it has {len(stored)} {what}s, requested: {len(requested)}"


class InstanceStore:
    """Complete instance store, opened for reading.

    Opening checks the manifest, and the shape, dtype and length of every array file; :meth:`verify` also compares
    checksums. Pickling (to DataLoader workers) sends the path, not the arrays.

    Attributes:
        path: folder of the store.
        manifest: its metadata.
        features, boxes, scores, detected_labels, counts, targets: read-only memory maps; see the module docstring.
        difficult: read-only memory map; None if the dataset has no mask of difficult labels.
        rows: (n,) int64 ascending indices of readable images.
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
        """Open a store.

        Raises:
            StoreError: if it is missing, incomplete or damaged.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            if partial_path(path).is_dir():
                raise StoreError(
                    f"The instance store {path} is incomplete: call gm_mlic.extract (or run gm-mlic extract) with the "
                    "same arguments again to resume."
                )
            what = "is not an instance store (no manifest.json)" if path.exists() else "does not exist"
            raise StoreError(f"The instance store {path} {what}: create it with gm_mlic.extract (or gm-mlic extract).")
        manifest = Manifest.read(path / MANIFEST)
        arrays = {name: _open_array(path / f"{name}.npy", manifest, name) for name in manifest.specs()}
        return cls(path, manifest, arrays)

    def __len__(self) -> int:
        """N, including unreadable images."""
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
        """Instances of image ``i``, copied from the memory maps.

        Args:
            i: row.
            view: 0 for the original image, 1 to r for an augmented view.
            m: number of instances to keep, by confidence; None keeps all.

        Raises:
            StoreError: if the image is unreadable, or the store has fewer views or slots.
            ConfigError: if ``m`` is less than 1.
        """
        if m is not None:
            self.check(m=m)
        if not 0 <= view <= self.manifest.views:
            raise StoreError(f"The store {self.path} has views 0 to {self.manifest.views}, requested: view {view}.")
        count = int(self.counts[i, view])
        if count == 0:
            image = self.manifest.ids[i]
            raise StoreError(
                f"Image {image!r} has no instances in the store {self.path}: "
                f"{self.manifest.skipped.get(image, 'it is unreadable')}. Use only the rows in InstanceStore.rows."
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
        """Check that this store matches the given arguments; None is not checked.

        A store with more instances or views matches, since it can be sliced.

        Raises:
            StoreError: if it does not match.
            ConfigError: if ``m`` is less than 1 or ``views`` is negative.
        """
        stored = self.manifest
        check_sizes(m=m, views=views)
        changes: dict[str, Any] = {}
        if dataset is not None:
            changes |= dataset_fields(dataset)
        if extractor is not None:
            changes |= extractor_fields(extractor)
        if views and stored.views:
            changes |= {} if view_size is None else {"view_size": view_size}
            changes |= {} if view_seed is None else {"view_seed": view_seed}
        for difference in differences(stored, dataclasses.replace(stored, **changes)):
            raise StoreError(f"The store {self.path} is of another job: {difference}; {REMEDY}.")
        if m is not None and m > stored.m:
            raise StoreError(
                f"The store {self.path} has m={stored.m} instances per image, requested: m={m}: extract again with "
                f"`m={m}` and `overwrite=True`, or lower `m`."
            )
        if views is not None and views > stored.views:
            raise StoreError(
                f"The store {self.path} has {stored.views} augmented views, requested: {views}: extract again with "
                f"`views={views}` and `overwrite=True`, or lower `views`."
            )

    def verify(self) -> None:
        """Compare the SHA-256 of every array with the manifest.

        Raises:
            StoreError: if a file differs.
        """
        for name, info in self.manifest.arrays.items():
            file = self.path / f"{name}.npy"
            if sha256(file) != info.get("sha256"):
                raise StoreError(
                    f"The file {file} is damaged (its SHA-256 differs from the manifest): "
                    "extract again with `overwrite=True`."
                )

    def verify_once(self) -> None:
        """Run :meth:`verify`, for stores above 1 GB only if the files changed since the last time.

        Raises:
            StoreError: if a file differs.
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
        log.info("Verifying the instance store %s.", self.path)
        self.verify()
        with contextlib.suppress(OSError):  # without write permission, verify each time
            stamp.write_text(state)


def partial_path(path: Path) -> Path:
    """Folder of the incomplete store ``path``."""
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
    remedy = "extract again with `overwrite=True`"
    recorded = manifest.arrays.get(name)
    if not isinstance(recorded, dict) or recorded.get("shape") != list(shape) or recorded.get("dtype") != dtype.str:
        raise StoreError(f"The manifest {file.parent / MANIFEST} is damaged (wrong entry of array {name!r}): {remedy}.")
    try:
        array = map_array(file)
    except FileNotFoundError as error:
        raise StoreError(f"The store {file.parent} lacks {file.name}: {remedy}.") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"The file {file} is damaged ({error}): {remedy}.") from error
    if array.shape != shape or array.dtype != dtype:
        raise StoreError(
            f"The file {file} is damaged (it has {array.dtype} {array.shape}, the manifest {dtype} {shape}): {remedy}."
        )
    if file.stat().st_size != array.offset + array.nbytes:
        raise StoreError(f"The file {file} is damaged (longer than its header states): {remedy}.")
    return array
