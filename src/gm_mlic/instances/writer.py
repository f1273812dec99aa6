"""Writer of an incomplete instance store, the folder ``<path>.partial``.

Each block is one file that is written atomically. A block is complete if its file exists; others are extracted again.
The folder also contains ``block-NNNNN.lock`` for each block that a process is extracting. The system releases these
locks when a process dies. A lock without a process shows that an image of the block may have crashed it.

Locks and the folder itself change only under the lock ``.NAME.lock``, next to the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import save

from gm_mlic.datasets.base import MultiLabelDataset
from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ConfigError, DataError, StoreError, UnreadableImage
from gm_mlic.instances.image_loader import CRASHES
from gm_mlic.instances.manifest import MANIFEST, TARGETS, Manifest, block_name
from gm_mlic.instances.store import REMEDY, InstanceStore, partial_path, read_tensors
from gm_mlic.io import sha256, write_file

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreWriter:
    """Writer for the blocks of one store. Several processes can write different blocks.

    Attributes:
        path: folder of the complete store.
        partial: folder of the incomplete store.
        job: manifest of the store, without ``skipped`` and ``files``.
        blocks: rows of each block.
    """

    def __init__(self, path: Path, job: Manifest) -> None:
        self.path, self.partial, self.job = path, partial_path(path), job
        self.blocks = job.blocks()
        self._json = job.to_json().encode()
        self._guard = FileLock(path.with_name(f".{path.name}.lock"))
        self._claimed: dict[int, FileLock] = {}
        self._tensors: dict[str, np.ndarray] = {}
        self._skipped: dict[str, str] = {}

    def begin(self, dataset: MultiLabelDataset, blocks: Iterable[int], overwrite: bool) -> None:
        """Create the partial store, or resume an existing one.

        Args:
            dataset: the images and labels.
            blocks: blocks of this process. Those that are damaged, or have images that can be read now, are removed.
            overwrite: replace a complete store, and discard a partial store of another job.

        Raises:
            StoreError: if ``path`` is something else, the partial store is of another job, or the disk is full or
                read-only.
        """
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._guard:
                complete = (self.path / MANIFEST).is_file()
                if complete and not overwrite:
                    return
                if self.path.exists() and not complete and not (self.path.is_dir() and not any(self.path.iterdir())):
                    raise StoreError(f"{self.path} exists and is not an instance store: choose another `path`.")
                if (difference := self._difference()) is not None:
                    written = any(self.partial.glob("block-*.safetensors"))
                    claimed = any(map(_is_locked, self.partial.glob("block-*.lock")))
                    if claimed or (written and not overwrite):
                        raise StoreError(
                            f"The incomplete store {self.partial} is of another job: {difference}; {REMEDY}."
                        )
                    self._create(dataset)
                for block in blocks:
                    if self._file(block).is_file() and not self._is_usable(block, dataset):
                        self._file(block).unlink()

    def count(self, blocks: Iterable[int]) -> int:
        """Number of images in blocks."""
        return sum(len(self.blocks[block]) for block in blocks)

    def missing(self, blocks: Iterable[int]) -> list[int]:
        """Those blocks that are not written; none if another process has completed the store."""
        exists = (self.partial / MANIFEST).is_file()
        return [block for block in blocks if exists and not self._file(block).is_file()]

    def claim(self, blocks: Iterable[int]) -> Iterator[tuple[list[int], bool]]:
        """Claim missing blocks that no other process has claimed, one after the other.

        Yields:
            The rows of each batch, and whether an earlier process died while it extracted this block.
        """
        for block in blocks:
            lock = FileLock(self._file(block).with_suffix(".lock"))
            with self._writing(), self._guard:
                if not self.missing([block]):
                    continue
                if (difference := self._difference()) is not None:
                    raise StoreError(f"Another process has replaced {self.partial}: {difference}.")
                died = Path(lock.lock_file).exists()
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                self._claimed[block] = lock
            rows = self.blocks[block]
            for start in range(0, len(rows), self.job.batch_size):
                yield list(rows[start : start + self.job.batch_size]), died

    def add(self, rows: Sequence[int], results: Sequence[Sequence[Instances] | str]) -> None:
        """Add consecutive rows of a claimed block: V views per row, or the reason why its image is unreadable.

        The block is written, and released, with its last row.

        Raises:
            StoreError: if features are too large for float16 (the message names the image), or the disk is full.
        """
        block = rows[0] // self.job.block_size
        block_rows = self.blocks[block]
        if rows[0] == block_rows[0]:
            specs = self.job.block_specs(len(block_rows))
            self._tensors, self._skipped = {name: np.zeros(*spec) for name, spec in specs.items()}, {}
            self._tensors["detected_labels"][:] = -1
        for row, result in zip(rows, results, strict=True):
            image = self.job.ids[row]
            if isinstance(result, str):
                self._skipped[image] = result
                continue
            for view, instances in enumerate(result):
                self._fill((row - block_rows[0], view), instances, f"image {image!r}, view {view}")
        if rows[-1] == block_rows[-1]:
            with self._writing():
                write_file(self._file(block), save(self._tensors, {"skipped": json.dumps(self._skipped)}))
            self.release([block])

    def _fill(self, view: tuple[int, int], instances: Instances, image: str) -> None:
        """Copy ``instances`` into the slots of one view."""
        self._tensors["counts"][view] = len(instances)
        for name in ("features", "boxes", "scores", "detected_labels"):  # not the fields of a subclass
            slots = self._tensors[name][view][: len(instances)]
            with np.errstate(over="ignore"):  # values above 65504 overflow float16 to inf
                slots[...] = getattr(instances, name).detach().cpu().numpy()
            if not np.isfinite(slots).all():
                raise StoreError(
                    f"The detector {self.job.detector} returned, for {image}, {name} that are too large for float16: "
                    "check its weights."
                )

    def release(self, blocks: Sequence[int] | None = None) -> None:
        """Release claimed blocks; default: all, after an error."""
        for block in list(self._claimed) if blocks is None else blocks:
            with self._writing(), self._guard:
                lock = self._claimed.pop(block)
                lock.release()
                Path(lock.lock_file).unlink(missing_ok=True)

    def finish(self) -> InstanceStore | None:
        """Complete the store and open it; an existing store at ``path`` is replaced.

        It can be interrupted and called again, also by another process.

        Returns:
            The store; None if blocks are missing.

        Raises:
            DataError: if no image can be read. The partial store is removed.
        """
        with self._writing(), self._guard:
            if not self.partial.is_dir():  # completed by another process
                return InstanceStore.open(self.path)
            if self.missing(range(len(self.blocks))):
                return None
            skipped: dict[str, str] = {}
            for block in range(len(self.blocks)):
                skipped |= self._read(block)
            if len(skipped) == len(self.job.ids):
                shutil.rmtree(self.partial)
                raise DataError(
                    f"None of the {len(skipped)} images can be read: check the dataset folder. The first: "
                    f"{next(iter(skipped.values()))}"
                )
            files = {name: sha256(self.partial / name) for name in self.job.file_names()}
            manifest = dataclasses.replace(self.job, skipped=skipped, files=files)
            write_file(self.partial / MANIFEST, manifest.to_json())
            for file in self.partial.iterdir():
                if file.name not in {MANIFEST, *files}:
                    file.unlink()
            old = self.path.with_name(self.path.name + ".old")
            if self.path.exists():
                shutil.rmtree(old, ignore_errors=True)
                self.path.replace(old)
            self.partial.replace(self.path)
            shutil.rmtree(old, ignore_errors=True)
        return InstanceStore.open(self.path)

    def _create(self, dataset: MultiLabelDataset) -> None:
        """Create the partial store without blocks; its manifest is written last."""
        if self.partial.exists():
            shutil.rmtree(self.partial)
        if self.job.num_bytes() > _free(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        specs = self.job.target_specs()
        arrays = {"targets": dataset.targets, "difficult": dataset.difficult}
        content = save({name: np.ascontiguousarray(arrays[name], dtype) for name, (_, dtype) in specs.items()})
        write_file(self.partial / TARGETS, content)
        write_file(self.partial / MANIFEST, self._json)

    def _difference(self) -> str | None:
        """The difference between the partial store and the job; None if there is none."""
        if (file := self.partial / MANIFEST).is_file() and file.read_bytes() == self._json:
            return None
        try:
            return next(Manifest.read(file).differences(self.job), None)
        except StoreError as error:
            return str(error)

    def _file(self, block: int) -> Path:
        return self.partial / block_name(block)

    def _read(self, block: int) -> dict[str, str]:
        """Reasons of unreadable images by id."""
        _, metadata = read_tensors(self._file(block), self.job.block_specs(len(self.blocks[block])))
        return dict(json.loads(metadata["skipped"]))

    def _is_usable(self, block: int, dataset: MultiLabelDataset) -> bool:
        """Whether the file is valid, and its unreadable images still are."""
        try:
            skipped = self._read(block)
        except (StoreError, ValueError, LookupError):
            return False
        for row in self.blocks[block]:
            if CRASHES not in skipped.get(self.job.ids[row], CRASHES):
                with contextlib.suppress(UnreadableImage):
                    dataset.image(row)
                    return False
        return True

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Context manager that converts file system errors to those of the package."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise ConfigError(
                    f"Cannot write {error.filename or self.partial}: {error.strerror}: choose another `path`."
                ) from error
            raise StoreError(
                f"Not enough disk space for the instance store {self.path} ({error.strerror}): it needs "
                f"{self.job.num_bytes() / 1e9:.3g} GB, {_free(self.path) / 1e9:.3g} GB are free: free some space and "
                "run the same command again to resume, choose another `path`, or lower `m` or `views`."
            ) from error


def _is_locked(file: Path) -> bool:
    try:
        with FileLock(file).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _free(path: Path) -> int:
    return shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free
