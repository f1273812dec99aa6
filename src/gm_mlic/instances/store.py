"""Instance store: memory-mapped instances of every image of a split, in blocks of images, with a manifest.

A store is a folder:

========================= ===========================================================================
file                      content
========================= ===========================================================================
block-00000.safetensors,  instances of the first B images, of the next B, ...; the last block can have
block-00001.safetensors,  fewer. Metadata ``skipped``: JSON, the reason for each unreadable image
...
targets.safetensors       labels of all images
manifest.json             :class:`Manifest`, with the SHA-256 of all other files
========================= ===========================================================================

Shapes: N images, B of them in a block (:attr:`Manifest.block_size`), V = 1 + r views per image
(view 0 is the original, views 1 to r are augmented), m instance slots, D features, C labels. Instances are sorted by
descending confidence. Unused slots are zero, with detected label -1. The first m' slots
equal an extraction with m = m', so that sweeps over m slice one store.

=============== ============ ======= =========================================================
tensor          shape        dtype   content
=============== ============ ======= =========================================================
features        (B, V, m, D) float16 f of eq. 1
boxes           (B, V, m, 4) float32 B of eq. 1: x1, y1, x2, y2 divided by image width and height
scores          (B, V, m)    float32 confidences in [0, 1]
detected_labels (B, V, m)    int32   index into the manifest's ``detector_labels``; -1 for none
counts          (B, V)       int32   number of used slots; 0 only for unreadable images
targets         (N, C)       int8    1 present, 0 absent
difficult       (N, C)       bool    mask of difficult labels; only if the dataset has one
=============== ============ ======= =========================================================

An incomplete store is the folder ``<path>.partial`` with the same files, some blocks missing
(:mod:`gm_mlic.instances.writer`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from gm_mlic.datasets.base import MultiLabelDataset
from gm_mlic.detection.protocol import InstanceExtractor, Instances
from gm_mlic.errors import StoreError, check_positive
from gm_mlic.instances.manifest import AGAIN, MANIFEST, TARGETS, Manifest, Specs, block_name, job_fields
from gm_mlic.io import first_line, kept, sha256

#: Stores up to this size are verified each time, in about a second.
_SMALL_BYTES = 1 << 30
REMEDY = "set `overwrite=True` to replace it, or another `path` to keep both"


class BlockArray:
    """Read-only array (N, ...) in blocks of rows, which is indexed as an :class:`numpy.ndarray`.

    The index of the rows is an integer, a slice, or a list or array of integers or booleans. Indices of the other
    dimensions are integers, slices, or arrays with a value for each row. The result is a copy; of one row, a view.

    Args:
        blocks: arrays (B, ...); the last one may have fewer rows.
    """

    def __init__(self, blocks: Sequence[np.ndarray]) -> None:
        self.blocks = blocks
        self.shape: tuple[int, ...] = (sum(map(len, blocks)), *blocks[0].shape[1:])
        self.dtype = blocks[0].dtype
        self._rows = np.arange(len(self))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.blocks, dtype=dtype)

    def __getitem__(self, key: Any) -> np.ndarray:
        first, *rest = key if isinstance(key, tuple) else (key,)
        rows, B = self._rows[first], len(self.blocks[0])
        if rows.ndim == 0 or len(rows) == 0:
            index = (rows % B, *rest)
            return np.asarray(self.blocks[int(rows) // B if rows.ndim == 0 else 0][index])
        each = [np.asarray(i).tolist() if np.ndim(i) else [i] * len(rows) for i in rest]
        keys = zip([slice(row, row + 1) for row in (rows % B).tolist()], *each, strict=True)
        return np.concatenate([self.blocks[block][key] for block, key in zip((rows // B).tolist(), keys, strict=True)])


class InstanceStore:
    """Complete instance store, opened for reading.

    Opening checks the manifest, and names, shapes and dtypes in all other files; :meth:`verify` also compares
    checksums. Pickling (to DataLoader workers) sends the path, not the arrays.

    Attributes:
        path: folder of the store.
        manifest: its metadata.
        features, boxes, scores, detected_labels: memory-mapped and read-only; see the module docstring.
        counts, targets: read-only arrays.
        difficult: read-only array; None if the dataset has no mask of difficult labels.
        rows: (n,) int64 ascending indices of readable images.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        specs = [manifest.block_specs(len(rows)) for rows in manifest.blocks()]
        blocks = [read_tensors(path / block_name(block), spec)[0] for block, spec in enumerate(specs)]
        arrays = {name: BlockArray([tensors[name] for tensors in blocks]) for name in specs[0]}
        self.features, self.boxes = arrays["features"], arrays["boxes"]
        self.scores, self.detected_labels = arrays["scores"], arrays["detected_labels"]
        self.counts = np.asarray(arrays["counts"])
        self.counts.flags.writeable = False
        targets, _ = read_tensors(path / TARGETS, manifest.target_specs())
        self.targets, self.difficult = targets["targets"], targets.get("difficult")
        self.rows: np.ndarray = np.flatnonzero(self.counts[:, 0] > 0)

    @classmethod
    def open(cls, path: str | Path) -> InstanceStore:
        """Open a store.

        Raises:
            StoreError: if it is missing, incomplete or damaged.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            what = "is not an instance store (no manifest.json)" if path.exists() else "does not exist"
            what = "is incomplete" if partial_path(path).is_dir() else what
            raise StoreError(f"The store {path} {what}: gm_mlic.extract (gm-mlic extract) creates or resumes it.")
        manifest = Manifest.read(path / MANIFEST)
        if list(manifest.files) != manifest.file_names():
            raise StoreError(f"The manifest {path / MANIFEST} is damaged (wrong names of files): {AGAIN}.")
        return cls(path, manifest)

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
            ConfigError: if ``m`` is less than 1.
        """
        stored, changes = self.manifest, job_fields(dataset, extractor)
        if views and stored.views:
            changes |= {} if view_size is None else {"view_size": view_size}
            changes |= {} if view_seed is None else {"view_seed": view_seed}
        for difference in stored.differences(dataclasses.replace(stored, **changes)):
            raise StoreError(f"The store {self.path} is of another job: {difference}; {REMEDY}.")
        check_positive(m=1 if m is None else m)
        for name, value, most in (("m", m, stored.m), ("views", views, stored.views)):
            if value is not None and value > most:
                raise StoreError(
                    f"The store {self.path} has {name}={most}, requested: {name}={value}: extract again with "
                    f"`{name}={value}` and `overwrite=True`, or lower `{name}`."
                )

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest.

        Raises:
            StoreError: if a file differs.
        """
        for name, checksum in self.manifest.files.items():
            if sha256(self.path / name) != checksum:
                raise StoreError(
                    f"The file {self.path / name} is damaged (its SHA-256 differs from the manifest): {AGAIN}."
                )

    def verify_once(self) -> None:
        """Run :meth:`verify`, for stores above 1 GB only if the files changed since the last time."""
        stats = [(self.path / name).stat() for name in self.manifest.files]
        if sum(stat.st_size for stat in stats) <= _SMALL_BYTES:
            self.verify()
        else:
            stamp = self.path.with_name(f".{self.path.name}.verified")
            state = [[stat.st_size, stat.st_mtime_ns] for stat in stats]
            kept(stamp, state, self.verify, f"Verifying the instance store {self.path}")


def partial_path(path: Path) -> Path:
    """Folder of the incomplete store ``path``."""
    return path.with_name(path.name + ".partial")


def read_tensors(file: Path, specs: Specs) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Memory-map a file of tensors, read-only; returns the tensors and the metadata.

    Raises:
        StoreError: if the file is missing or damaged, or has other tensors.
    """
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name).numpy() for name in content.keys()}  # noqa: SIM118 - no mapping
            metadata = content.metadata() or {}
    except FileNotFoundError as error:
        raise StoreError(f"The store {file.parent} lacks {file.name}: {AGAIN}.") from error
    except Exception as error:
        raise StoreError(f"The file {file} is damaged ({first_line(error)}): {AGAIN}.") from error
    found = {name: (tensor.shape, tensor.dtype.type) for name, tensor in tensors.items()}
    if found != specs:
        raise StoreError(f"The file {file} is damaged (its tensors are not those of the manifest): {AGAIN}.")
    for tensor in tensors.values():
        tensor.flags.writeable = False
    return tensors, metadata
