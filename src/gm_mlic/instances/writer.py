"""An instance store while it is being made: the folder ``<path>.partial``, its journal, and how it becomes a store.

Beside the arrays of :mod:`gm_mlic.instances.store` at their full size, the folder holds

- ``partial.json``: the manifest so far, i.e. which job this is; written when the arrays are in place;
- ``state.npy`` (N,) uint8: the journal, one :class:`State` for each row, written after the row's data is on disk;
- ``skipped.jsonl``: why each unreadable image is so;
- ``shard-I-of-N.lock`` and ``.pid``: which processes are at work (:mod:`gm_mlic.instances.extraction`).

So a process can die at any moment: rows that the journal calls finished are, and all others are done again. Files are
written through ordinary writes, never through a memory map, where a full disk would end the process with SIGBUS.
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

_JOB = "partial.json"
_SKIPPED = "skipped.jsonl"
_STATE = "state.npy"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# macOS has no fdatasync
_sync = getattr(os, "fdatasync", os.fsync)


class State(enum.IntEnum):
    """What the journal says of a row."""

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
    """The manifest of a store that is still to be made (no ``skipped``, no checksums)."""
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
    """Writes the rows of one store, from any number of processes that write different rows.

    Attributes:
        path: the folder of the store to be.
        partial: the folder of the unfinished store.
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
        """Begin the store ``path``, or go on with the one that was begun there.

        To be called by one process at a time.

        Args:
            path: folder of the store to be.
            manifest: the job, from :func:`plan`.
            targets: (N, C) in {0, 1}.
            difficult: (N, C) bool, or None, as the manifest says.
            overwrite: discard an unfinished store of another job, and replace a finished one at the end.
            in_use: another process is writing there: discard nothing.

        Raises:
            StoreError: if the unfinished store is of another job, or the disk is full or read-only.
        """
        writer = cls(path, manifest)
        partial = writer.partial
        if path.exists() and not (path / MANIFEST).is_file() and not _is_empty_folder(path):
            raise StoreError(f"{path} exists and is not an instance store: choose another `path`.")
        found = None
        for name in (MANIFEST, _JOB):
            if (partial / name).is_file():
                found = Manifest.read(partial / name)
                break
        if found is not None:
            difference = next(differences(found, manifest), None)
            if difference is None:
                return writer
            # one without a finished row has nothing to lose
            worthless = not (partial / MANIFEST).is_file() and not _states(partial).any()
            if in_use or not (overwrite or worthless):
                raise StoreError(
                    f"The unfinished store {partial} was begun for something else: {difference}; {REMEDY}."
                )
        with writer.writing():
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir(parents=True)
            try:
                writer._allocate(targets, difficult)
            except BaseException:
                # nothing is in it: give the space back
                shutil.rmtree(partial, ignore_errors=True)
                raise
        return writer

    def _allocate(self, targets: np.ndarray, difficult: np.ndarray | None) -> None:
        """Create the files at their full size, so that a disk too small is found now and not after hours."""
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
        _write_text(self.partial / _JOB, self.manifest.to_json())

    def states(self) -> np.ndarray:
        """(N,) uint8: the :class:`State` of each row, as it is now on disk (other processes write there too)."""
        if (self.partial / MANIFEST).is_file():
            return np.full(len(self.manifest.ids), State.DONE, np.uint8)  # only the last step, finish(), is left
        return _states(self.partial)

    def write(self, start: int, rows: Sequence[Sequence[Instances] | str]) -> None:
        """Write rows ``start``, ``start + 1``, ...: of each its V views, or why its image is unreadable.

        Raises:
            StoreError: if an instance is not what the protocol promises (naming the image), or the disk is full.
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
                    # a line that an earlier death cut short must not swallow this one
                    _write_all(file, ("\n" + skipped).encode())
                    _sync(file.fileno())
            for name, block in blocks.items():
                self._put(name, start, block)
            for file, _ in self._files.values():
                _sync(file.fileno())
            self._put("state", start, states)

    def _fill(self, slots: dict[str, np.ndarray], instances: Instances, image: str, view: int) -> None:
        """Copy ``instances`` into the (1, m, ...) slots of one view, checking them."""
        where = f"The detector {self.manifest.detector} gave, for image {image!r}, view {view},"
        m, D = slots["features"].shape[1:]
        M = len(instances)
        if not 1 <= M <= m:
            raise StoreError(f"{where} {M} instances, expected 1 to {m}: it breaks the InstanceExtractor protocol.")
        values = {name: getattr(instances, name) for name in ("features", "boxes", "scores", "detected_labels")}
        shapes = {"features": (M, D), "boxes": (M, 4), "scores": (M,), "detected_labels": (M,)}
        slots["counts"][...] = M
        for name, value in values.items():
            if tuple(value.shape) != shapes[name]:
                raise StoreError(f"{where} {name} of shape {tuple(value.shape)}, expected {shapes[name]}.")
            array = value.detach().cpu().numpy()
            # float16 ends at 65504: what does not fit becomes inf, which the next check finds
            with np.errstate(over="ignore"):
                slots[name][0, :M] = array
            if name != "detected_labels" and not np.isfinite(slots[name]).all():
                kind = "too large for float16" if np.isfinite(array).all() else "NaN or infinite"
                raise StoreError(f"{where} {name} that are {kind}: check its weights and its training.")
        if (np.diff(slots["scores"][0, :M]) > 0).any():
            raise StoreError(f"{where} instances that do not stand highest score first: the store is sliced by it.")

    def finish(self) -> InstanceStore:
        """Turn the unfinished store into the finished one, and open it.

        To be called by one process, when no row is pending and nobody writes. May be interrupted and called again.
        A store that stood at ``path`` is replaced.
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
                _write_text(self.partial / MANIFEST, manifest.to_json())
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
        """Remove the unfinished store."""
        self.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def close(self) -> None:
        """Close the files; what was written stays."""
        for file, _ in self._files.values():
            file.close()
        self._files.clear()

    def reasons(self) -> dict[str, str]:
        """Id to reason of the unreadable images, in the order of the rows."""
        reasons: dict[int, str] = {}
        if (self.partial / _SKIPPED).is_file():
            for line in (self.partial / _SKIPPED).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # blank, or cut short by a death
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
        """Turn what the file system refuses into a :class:`~gm_mlic.errors.StoreError` that says what to do."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise StoreError(
                    f"Cannot write {error.filename or self.partial}: {error.strerror}: choose another `path`."
                ) from error
            need = sum(int(np.prod(s, dtype=np.int64)) * d.itemsize for s, d in self.manifest.specs().values())
            raise StoreError(
                f"No room for the instance store {self.path} ({error.strerror}): it needs {need / 1e9:.3g} GB, "
                f"{_free(self.path) / 1e9:.3g} GB are free: free some and run the same command again (it continues), "
                "choose another `path`, or lower `m` or `views`."
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
    """Give the file ``size`` bytes, with their blocks on disk where the system can."""
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


def _write_text(file: Path, text: str) -> None:
    """Write a small file so that it is there whole or not at all."""
    new = file.with_name(file.name + ".new")
    with new.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
