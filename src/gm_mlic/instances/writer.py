"""Writer of an incomplete instance store: the folder ``<path>.partial`` and its journal.

Besides the arrays of :mod:`gm_mlic.instances.store` at full size, the folder contains

- ``partial.json``: the manifest of the job, written after the arrays are allocated;
- ``state.npy`` (N,) uint8: the journal, one :class:`State` per row, written after the row's data is on disk;
- ``skipped.jsonl``: reasons of unreadable images;
- ``shard-I-of-N.lock`` and ``.pid``: running processes (:mod:`gm_mlic.instances.extraction`).

A process can die at any time: rows that are finished in the journal are complete, all others are repeated. Files are
written with ordinary writes, not through memory maps, where a full disk would end the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from gm_mlic._version import __version__
from gm_mlic.datasets.base import MultiLabelDataset
from gm_mlic.detection.protocol import InstanceExtractor, Instances
from gm_mlic.errors import StoreError
from gm_mlic.instances.store import (
    MANIFEST,
    REMEDY,
    InstanceStore,
    Manifest,
    dataset_fields,
    differences,
    extractor_fields,
    partial_path,
    sha256,
)
from gm_mlic.io import write_file

_JOB = "partial.json"
_SKIPPED = "skipped.jsonl"
_STATE = "state.npy"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# macOS has no fdatasync
_sync = getattr(os, "fdatasync", os.fsync)


class State(enum.IntEnum):
    """State of a row in the journal."""

    PENDING = 0
    DONE = 1
    UNREADABLE = 2


def plan(
    dataset: MultiLabelDataset,
    extractor: InstanceExtractor,
    *,
    m: int,
    views: int,
    view_size: int,
    view_seed: int,
    batch_size: int,
) -> Manifest:
    """Manifest of a new store (without ``skipped`` and checksums)."""
    return Manifest(
        **dataset_fields(dataset),
        **extractor_fields(extractor),
        m=m,
        views=views,
        view_size=view_size if views else None,
        view_seed=view_seed if views else None,
        batch_size=batch_size,
        versions={"gm_mlic": __version__} | {name: version(name) for name in ("torch", "torchvision", "numpy")},
    )


class StoreWriter:
    """Writer for the rows of one store. Several processes can write different rows.

    Attributes:
        path: folder of the complete store.
        partial: folder of the incomplete store.
        manifest: the job.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.partial = partial_path(path)
        self.manifest = manifest
        self._shapes = {name: spec for name, spec in manifest.specs().items() if name not in ("targets", "difficult")}
        self._files: dict[str, tuple[io.FileIO, int]] = {}

    @classmethod
    def begin(
        cls,
        path: Path,
        manifest: Manifest,
        targets: np.ndarray,
        difficult: np.ndarray | None = None,
        overwrite: bool = False,
        in_use: bool = False,
    ) -> StoreWriter:
        """Create the partial store of ``path``, or resume an existing one.

        Only one process may call this at a time.

        Args:
            path: folder of the complete store.
            manifest: the job, from :func:`plan`.
            targets: (N, C) in {0, 1}.
            difficult: (N, C) bool, or None, consistent with the manifest.
            overwrite: discard a partial store of another job, and replace a complete one at the end.
            in_use: another process is writing: discard nothing.

        Raises:
            StoreError: if the partial store is of another job, or the disk is full or read-only.
        """
        writer = cls(path, manifest)
        partial = writer.partial
        if path.exists() and not (path / MANIFEST).is_file() and not _is_empty_folder(path):
            raise StoreError(f"{path} exists and is not an instance store: choose another `path`.")
        stored = None
        for name in (MANIFEST, _JOB):
            if (partial / name).is_file():
                stored = Manifest.read(partial / name)
                break
        if stored is not None:
            difference = next(differences(stored, manifest), None)
            if difference is None:
                return writer
            empty = not (partial / MANIFEST).is_file() and not _states(partial).any()
            if in_use or not (overwrite or empty):
                raise StoreError(f"The incomplete store {partial} is of another job: {difference}; {REMEDY}.")
        with writer.writing():
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            try:
                writer._allocate(targets, difficult)
            except BaseException:
                # free the disk space
                shutil.rmtree(partial, ignore_errors=True)
                raise
        return writer

    def _allocate(self, targets: np.ndarray, difficult: np.ndarray | None) -> None:
        """Create the files at full size, so that lack of disk space is detected at the start."""
        specs = self.manifest.specs() | {"state": ((len(self.manifest.ids),), np.dtype("u1"))}
        sizes = {name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for name, (shape, dtype) in specs.items()}
        free = shutil.disk_usage(self.partial).free
        if sum(sizes.values()) > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, (shape, dtype) in specs.items():
            with (self.partial / f"{name}.npy").open("wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                file.flush()
                _reserve(file.fileno(), file.tell() + sizes[name])
        for name, values in (("targets", targets), ("difficult", difficult)):
            if values is None:
                continue
            with (self.partial / f"{name}.npy").open("r+b") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                file.write(np.ascontiguousarray(values, dtype=specs[name][1]).tobytes())
                file.flush()
                os.fsync(file.fileno())
        write_file(self.partial / _JOB, self.manifest.to_json())

    def states(self) -> np.ndarray:
        """(N,) uint8 :class:`State` of each row, read from disk, since other processes write too."""
        if (self.partial / MANIFEST).is_file():
            return np.full(len(self.manifest.ids), State.DONE, np.uint8)  # only finish() remains
        return _states(self.partial)

    def write(self, start: int, rows: Sequence[Sequence[Instances] | str]) -> None:
        """Write rows ``start``, ``start + 1``, ...: V views per row, or the reason why its image is unreadable.

        Raises:
            StoreError: if instances violate the protocol (the message names the image), or the disk is full.
        """
        n = len(rows)
        blocks = {name: np.zeros((n, *shape[1:]), dtype) for name, (shape, dtype) in self._shapes.items()}
        blocks["detected_labels"][:] = -1
        states = np.full(n, State.DONE, np.uint8)
        skipped = ""
        for r, row in enumerate(rows):
            image = self.manifest.ids[start + r]
            if isinstance(row, str):
                states[r] = State.UNREADABLE
                skipped += json.dumps([start + r, row]) + "\n"
                continue
            for v, instances in enumerate(row):
                self._fill({name: block[r, v : v + 1] for name, block in blocks.items()}, instances, image, v)
        with self.writing():
            if skipped:
                with (self.partial / _SKIPPED).open("ab", buffering=0) as file:
                    # start a new line, since a killed process may have left an incomplete one
                    _write_all(file, ("\n" + skipped).encode())
                    _sync(file.fileno())
            for name, block in blocks.items():
                self._put(name, start, block)
            for file, _ in self._files.values():
                _sync(file.fileno())
            self._put("state", start, states)

    def _fill(self, slots: dict[str, np.ndarray], instances: Instances, image: str, view: int) -> None:
        """Check ``instances`` and copy them into the (1, m, ...) slots of one view."""
        where = f"The detector {self.manifest.detector} returned, for image {image!r}, view {view},"
        m, D = slots["features"].shape[1:]
        M = len(instances)
        if not 1 <= M <= m:
            raise StoreError(f"{where} {M} instances, expected 1 to {m} by the InstanceExtractor protocol.")
        values = {name: getattr(instances, name) for name in ("features", "boxes", "scores", "detected_labels")}
        shapes = {"features": (M, D), "boxes": (M, 4), "scores": (M,), "detected_labels": (M,)}
        slots["counts"][...] = M
        for name, value in values.items():
            if tuple(value.shape) != shapes[name]:
                raise StoreError(f"{where} {name} of shape {tuple(value.shape)}, expected {shapes[name]}.")
            array = value.detach().cpu().numpy()
            # values above 65504 overflow float16 to inf, detected below
            with np.errstate(over="ignore"):
                slots[name][0, :M] = array
            if name != "detected_labels" and not np.isfinite(slots[name]).all():
                kind = "too large for float16" if np.isfinite(array).all() else "NaN or infinite"
                raise StoreError(f"{where} {name} that are {kind}: check its weights.")
        if (np.diff(slots["scores"][0, :M]) > 0).any():
            raise StoreError(f"{where} instances that are not sorted by descending score.")

    def finish(self) -> InstanceStore:
        """Complete the store and open it.

        Only one process may call this, when no row is pending and no process writes. It can be interrupted and called
        again. An existing store at ``path`` is replaced.
        """
        self.close()
        with self.writing():
            if not (self.partial / MANIFEST).is_file():
                arrays = {
                    name: {
                        "shape": list(shape),
                        "dtype": dtype.str,
                        "sha256": sha256(self.partial / f"{name}.npy"),
                    }
                    for name, (shape, dtype) in self.manifest.specs().items()
                }
                manifest = dataclasses.replace(self.manifest, skipped=self.reasons(), arrays=arrays)
                write_file(self.partial / MANIFEST, manifest.to_json())
            keep = {MANIFEST} | {f"{name}.npy" for name in self.manifest.specs()}
            for file in self.partial.iterdir():
                if file.name not in keep:
                    file.unlink()
            old = self.path.with_name(self.path.name + ".old")
            if self.path.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.path.replace(old)
            self.partial.replace(self.path)
            shutil.rmtree(old, ignore_errors=True)
        return InstanceStore.open(self.path)

    def discard(self) -> None:
        """Remove the incomplete store."""
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def close(self) -> None:
        """Close the files; written data is kept."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def reasons(self) -> dict[str, str]:
        """Reason by id of unreadable images, in row order."""
        reasons: dict[int, str] = {}
        if (self.partial / _SKIPPED).is_file():
            for line in (self.partial / _SKIPPED).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # blank or incomplete line
                    row, reason = json.loads(line)
                    reasons[row] = reason
        unreadable = np.flatnonzero(_states(self.partial) == State.UNREADABLE)
        return {self.manifest.ids[row]: reasons.get(row, "unreadable") for row in unreadable.tolist()}

    def _put(self, name: str, start: int, block: np.ndarray) -> None:
        if name not in self._files:
            file = io.FileIO(self.partial / f"{name}.npy", "r+")
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._files[name] = (file, file.tell())
        file, offset = self._files[name]
        file.seek(offset + start * (block.nbytes // len(block)))
        _write_all(file, block.tobytes())

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Context manager that converts file system errors to :class:`~gm_mlic.errors.StoreError`."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise StoreError(
                    f"Cannot write {error.filename or self.partial}: {error.strerror}: choose another `path`."
                ) from error
            need = sum(int(np.prod(s, dtype=np.int64)) * d.itemsize for s, d in self.manifest.specs().values())
            raise StoreError(
                f"Not enough disk space for the instance store {self.path} ({error.strerror}): it needs "
                f"{need / 1e9:.3g} GB, {_free(self.path) / 1e9:.3g} GB are free: free some space and run the same "
                "command again to resume, choose another `path`, or lower `m` or `views`."
            ) from error


def _states(partial: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(partial / _STATE, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"The journal {partial / _STATE} is damaged ({error}): delete {partial}.") from error


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _free(path: Path) -> int:
    return shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free


def _reserve(descriptor: int, size: int) -> None:
    """Allocate ``size`` bytes for a file, with disk blocks if supported."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(descriptor, size)


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]
