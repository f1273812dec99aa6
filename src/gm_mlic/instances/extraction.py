"""Instance extraction: run a detector over a split and write an instance store, resumable and in several processes.

Batches are fixed: batch b is rows bB to bB + B - 1. The store's bytes therefore do not depend on interruptions or on
the number of shards. A batch is repeated unless the journal records all its rows as finished.

Processes are coordinated by two kinds of file locks, which the system releases when a process dies: ``.NAME.lock`` next
to the store, held while the partial store is created, claimed or finished, and one lock per shard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from gm_mlic.datasets.base import MultiLabelDataset, check_targets
from gm_mlic.detection.protocol import InstanceExtractor, Instances, LookupExtractor
from gm_mlic.errors import ArgumentError, ConfigError, DataError, GMMLICError, StoreError, UnreadableImage
from gm_mlic.instances.image_loader import CRASHES, Rows, Views, read_batches
from gm_mlic.instances.store import MANIFEST, InstanceStore, Manifest, check_sizes, differences, partial_path
from gm_mlic.instances.writer import State, StoreWriter, plan
from gm_mlic.io import Progress

log = logging.getLogger(__name__)

#: Seconds between checks whether another process has finished.
POLL_S = 0.5
#: Seconds to wait for a shard's lock: DataLoader workers of a killed process inherit its locks and exit only after some
#: seconds.
PATIENCE_S = 15.0


def extract(
    dataset: MultiLabelDataset,
    extractor: InstanceExtractor,
    path: str | Path,
    *,
    m: int,
    views: int = 0,
    view_size: int = 448,
    view_seed: int = 0,
    batch_size: int = 8,
    num_workers: int = 0,
    overwrite: bool = False,
    shard: tuple[int, int] = (0, 1),
    together: bool = False,
    progress: bool = True,
) -> InstanceStore | None:
    """Create the instance store ``path``, resume an interrupted extraction, or open an existing store.

    Args:
        dataset: one split.
        extractor: the detector.
        path: folder of the store; ``<path>.partial`` while it is incomplete.
        m: number of instances to keep per view, by confidence.
        views: r, number of augmented views (random crop, resize, random flip) besides the original image.
        view_size: size of augmented views in pixels.
        view_seed: seed of the augmentation.
        batch_size: images per call of the extractor.
        num_workers: number of decoder processes. With 0, an image that crashes the decoder ends this process; the next
            call identifies and skips it. With workers, it is skipped at once.
        overwrite: replace a finished store, and discard a partial one of another job. A finished store is kept until
            its replacement is complete; a partial one of the same job is resumed.
        shard: (i, n): process every n-th batch, starting at the i-th. Start n processes, i = 0 ... n-1, with otherwise
            equal arguments; the last to end completes the store.
        together: wait until the store is complete, and process the remaining batches of processes that died.
        progress: show a progress bar (without a terminal: a log line every 10 s).

    Returns:
        The store, or None if shards of other processes are pending (never with ``together``).

    Raises:
        StoreError: if an existing store is damaged or of another job, if the detector returns invalid values (such as
            NaN; the message names the image), or if the disk is full or read-only. Finished rows are kept.
        DataError: if no image can be read, or the dataset is empty or inconsistent.
        ConfigError: if a number is out of range.
    """
    path = Path(path)
    index, shards = shard
    check_sizes(m=m, views=views)
    for argument, value, minimum in (
        ("batch_size", batch_size, 1),
        ("view_size", view_size, 1),
        ("num_workers", num_workers, 0),
        ("view_seed", view_seed, 0),
    ):
        if value < minimum:
            raise ArgumentError(argument, f"must be {minimum} or more, got {value}.")
    if not 0 <= index < shards:
        raise ArgumentError("shard", f"is ({index}, {shards}): expected (i, n) with 0 <= i < n.")
    check_targets(dataset.ids, dataset.labels, dataset.targets, dataset.difficult)
    if isinstance(extractor, LookupExtractor):
        if views:
            raise ArgumentError(
                "views", f"is {views}: instances of augmented views cannot be looked up in files. Set it to 0."
            )
        extractor.check_ids(dataset.ids)
    job = plan(
        dataset,
        extractor,
        m=m,
        views=views,
        view_size=view_size,
        view_seed=view_seed,
        batch_size=batch_size,
    )

    def finished() -> InstanceStore:
        store = InstanceStore.open(path)
        store.check(dataset, extractor, m=m, views=views, view_size=view_size, view_seed=view_seed)
        store.verify_once()
        return store

    if (path / MANIFEST).is_file() and not overwrite:
        return finished()

    def process_shard(index: int, shards: int, overwrite: bool) -> InstanceStore | None:
        lock = _ShardLock(path, job, dataset, overwrite, index, shards, patient=together)
        with lock:
            if lock.writer is None:
                return finished()
            try:
                _fill(lock.writer, dataset, extractor, num_workers, index, shards, progress)
            except KeyboardInterrupt:
                log.warning("Interrupted. Run the same command again to resume %s.", path)
                raise
            return lock.finish()

    store = process_shard(index, shards, overwrite)
    if store is None and together:
        # Waits for all other shards, then processes what they left.
        store = process_shard(0, 1, False)
    if store is None:
        return None
    skipped = store.manifest.skipped
    if skipped:
        log.warning(
            "%d of %d images are unreadable and have no instances in %s (see its manifest.json): %s%s",
            len(skipped),
            len(store),
            path,
            "; ".join(list(skipped.values())[:3]),
            "; ..." if len(skipped) > 3 else "",
        )
    return store


def _fill(
    writer: StoreWriter,
    dataset: MultiLabelDataset,
    extractor: InstanceExtractor,
    num_workers: int,
    index: int,
    shards: int,
    progress: bool,
) -> None:
    """Process the pending batches of this shard."""
    job = writer.manifest
    N, B = len(job.ids), job.batch_size
    states = writer.states()
    # retry unreadable images, which may have been replaced
    unreadable = np.flatnonzero(states == State.UNREADABLE).tolist()
    reasons = writer.reasons() if unreadable else {}
    for row in unreadable:
        if CRASHES in reasons[job.ids[row]]:
            continue
        if isinstance(extractor, LookupExtractor):
            states[row] = State.PENDING  # an entry may have been added
            continue
        with contextlib.suppress(UnreadableImage):
            dataset.image(row)
            states[row] = State.PENDING
    batches = [list(range(start, min(start + B, N))) for start in range(index * B, N, shards * B)]
    pending = [rows for rows in batches if (states[rows] == State.PENDING).any()]
    total, left = sum(map(len, batches)), sum(map(len, pending))
    if 0 < left < total:
        log.info("Resuming %s: %d of %d images are done.", writer.path, total - left, total)
    trace = writer.partial / f"shard-{index}-of-{shards}.reading"
    with Progress(f"{job.dataset}/{job.split}", "images", total, total - left, log, progress) as bar:
        if isinstance(extractor, LookupExtractor) and not extractor.needs_sizes:
            batches_read: Iterable[tuple[list[int], list[Views]]] = ((rows, [[] for _ in rows]) for rows in pending)
        else:
            batches_read = read_batches(Rows(dataset, job), pending, num_workers, trace)
        for rows, images in batches_read:
            if isinstance(extractor, LookupExtractor):
                found = _look_up(extractor, [job.ids[row] for row in rows], images, job.m)
            else:
                found = _detect(extractor, images, job)
            writer.write(rows[0], found)
            bar.advance(len(rows))
    if isinstance(extractor, LookupExtractor):
        extractor.log_corrections()


def _look_up(
    extractor: LookupExtractor, ids: Sequence[str], images: Sequence[Views], m: int
) -> list[list[Instances] | str]:
    """Looked-up instances of each image, or the reason why it is left out.

    Args:
        extractor: looks them up.
        ids: ids of the images.
        images: the image of each id, for its size; an empty list if no sizes are needed.
        m: instances per image.
    """
    for image in images:
        if isinstance(image, GMMLICError):
            raise image
    found: dict[int, list[Instances] | str] = {i: image for i, image in enumerate(images) if isinstance(image, str)}
    readable = [(i, image) for i, image in enumerate(images) if isinstance(image, list)]
    sizes = [(image[0].shape[1], image[0].shape[0]) if image else None for _, image in readable]
    looked_up = extractor.look_up([ids[i] for i, _ in readable], sizes, m)
    for (i, _), instances in zip(readable, looked_up, strict=True):
        found[i] = instances if isinstance(instances, str) else [instances]
    return [found[i] for i in range(len(ids))]


def _detect(extractor: InstanceExtractor, rows: Sequence[Views], job: Manifest) -> list[list[Instances] | str]:
    """Instances of each view of each readable row; the reason for unreadable rows."""
    for row in rows:
        if isinstance(row, GMMLICError):
            raise row
    results: list[list[Instances] | str] = [row if isinstance(row, str) else [] for row in rows]
    readable = [(row, out) for row, out in zip(rows, results, strict=True) if isinstance(row, list)]
    for view in range(1 + job.views if readable else 0):
        images = [_to_tensor(row[view]) for row, _ in readable]
        try:
            with torch.no_grad():
                instances = extractor(images, job.m)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"The detector {job.detector} is out of memory with `batch_size={job.batch_size}`: lower it."
            ) from error
        if len(instances) != len(images):
            raise StoreError(f"The detector {job.detector} returned {len(instances)} results for {len(images)} images.")
        for (_, out), result in zip(readable, instances, strict=True):
            out.append(result)  # type: ignore[union-attr]
    return results


def _to_tensor(image: np.ndarray) -> Tensor:
    # equals gm_mlic.datasets.images.to_tensor
    return torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div(255)


class _ShardLock:
    """Context manager with an exclusive lock on one shard of the partial store.

    Attributes:
        writer: writer of the partial store; None if another process completed the store meanwhile.
    """

    writer: StoreWriter | None = None

    def __init__(
        self,
        path: Path,
        job: Manifest,
        dataset: MultiLabelDataset,
        overwrite: bool,
        index: int,
        shards: int,
        *,
        patient: bool,
    ) -> None:
        self.path, self.job, self.dataset, self.overwrite = path, job, dataset, overwrite
        # A single process waits for a running one; conflicting manual shards are an error.
        self.patient = patient or shards == 1
        self.partial = partial_path(path)
        self.guard = FileLock(path.with_name(f".{path.name}.lock"))
        self.name = f"shard-{index}-of-{shards}"
        self.lock = FileLock(self.partial / f"{self.name}.lock")
        self.index, self.shards = index, shards

    def __enter__(self) -> _ShardLock:
        began = time.monotonic()
        waiting = False
        with StoreWriter(self.path, self.job).writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                with contextlib.suppress(Timeout), self.guard.acquire(timeout=0):
                    if self._is_complete(waiting):
                        return self
                    holders = self._holders()
                    conflicts = [
                        name for name in holders if name == self.name or not name.endswith(f"-of-{self.shards}")
                    ]
                    if not conflicts:
                        self.writer = StoreWriter.begin(
                            self.path,
                            self.job,
                            self.dataset.targets,
                            self.dataset.difficult,
                            overwrite=self.overwrite,
                            in_use=bool(holders),
                        )
                        self.lock.acquire(timeout=0)
                        (self.partial / f"{self.name}.pid").write_text(f"{os.getpid()}\n")
                        return self
                    if not self.patient and time.monotonic() - began > PATIENCE_S:
                        raise StoreError(
                            f"Process {holders[conflicts[0]]} is extracting {self.path} as {conflicts[0]}: wait for "
                            "it, or give each process a different `shard` with the same number of shards."
                        )
                if not waiting:
                    numbers = [self._number(file) for file in sorted(self.partial.glob("*.pid"))]
                    by = ", ".join(numbers) or "unknown"
                    log.warning("Waiting for another process (%s) that is extracting %s.", by, self.path)
                    waiting = True
                time.sleep(POLL_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()
            (self.partial / f"{self.name}.pid").unlink(missing_ok=True)
        self.lock.release()

    def finish(self) -> InstanceStore | None:
        """Complete the store if no row is pending in any shard."""
        assert self.writer is not None
        with self.guard:
            if not self.partial.is_dir():  # completed by the process of another shard
                return InstanceStore.open(self.path)
            states = self.writer.states()
            if (pending := int((states == State.PENDING).sum())) > 0:
                log.info(
                    "Shard %d of %d of %s is done; %d of %d images are pending in other shards.",
                    self.index,
                    self.shards,
                    self.path,
                    pending,
                    len(states),
                )
                return None
            self.lock.release()
            if (states == State.UNREADABLE).all():
                first = next(iter(self.writer.reasons().values()))
                self.writer.discard()
                raise DataError(
                    f"None of the {len(states)} images can be read: check the dataset folder. The first: {first}"
                )
            return self.writer.finish()

    def _is_complete(self, waited: bool) -> bool:
        """Whether the store exists and need not be overwritten; not again if another process just completed it."""
        if not (self.path / MANIFEST).is_file():
            return False
        if not self.overwrite:
            return True
        if not waited or self.partial.is_dir():
            return False
        return next(differences(Manifest.read(self.path / MANIFEST), self.job), None) is None

    def _holders(self) -> dict[str, str]:
        """Process id by shard, for shards with a running process. Call it only with the guard held."""
        holders = {}
        for file in sorted(self.partial.glob("shard-*.lock")):
            try:
                with FileLock(file).acquire(timeout=0):
                    pass
            except Timeout:
                holders[file.stem] = self._number(file.with_suffix(".pid"))
        return holders

    @staticmethod
    def _number(file: Path) -> str:
        try:
            return file.read_text().strip()
        except OSError:
            return "unknown"
