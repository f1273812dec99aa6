"""Run a detector over a split, once, into an instance store: resumable, in one process or in several.

Work goes in fixed batches: batch b is rows bB to bB + B - 1, whatever was done before and whoever does it, so that the
store's bytes do not depend on where extraction was interrupted or how it was split. A batch is done again unless the
journal says that all its rows are finished.

Who does what is settled with two kinds of file locks, which the system releases when a process dies: one beside the
store (``.NAME.lock``), held while the unfinished store is created, claimed or finished, and one for each shard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from gm_mlic.datasets.base import MultiLabelDataset, check_targets
from gm_mlic.detection.protocol import InstanceExtractor, Instances
from gm_mlic.errors import ArgumentError, ConfigError, DataError, GMMLICError, StoreError, UnreadableImage
from gm_mlic.instances.image_loader import CRASHES, Rows, Views, read_batches
from gm_mlic.instances.store import MANIFEST, InstanceStore, Manifest, check_sizes, differences, partial_path
from gm_mlic.instances.writer import State, StoreWriter, plan

log = logging.getLogger(__name__)

#: Seconds between two looks at whether another process has finished, and between two log lines without a terminal.
POLL_S = 0.5
LOG_S = 10.0
#: Seconds for which a shard's lock may be held before that is an error: a killed process's DataLoader workers inherit
#: its locks and notice its death only after some seconds.
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
    """Make the instance store ``path``, go on with it where it was interrupted, or open it if it is there.

    Args:
        dataset: one split.
        extractor: the detector.
        path: the store's folder; ``<path>.partial`` while it is unfinished.
        m: instances to keep for each view, by confidence.
        views: r, augmented views (random crop, resized, random flip) to keep beside the plain image.
        view_size: their side in pixels.
        view_seed: their seed.
        batch_size: images to one call of the extractor.
        num_workers: processes that decode images; 0 decodes in this one. An image that crashes its decoder ends this
            process once; the same call then finds out which one it was and leaves it out. With workers it does so at
            once.
        overwrite: replace a finished store, and discard an unfinished one of another job. A finished store stays in
            place until its replacement is complete; an unfinished one of this very job is continued.
        shard: (i, n): do every n-th batch from the i-th on. Start n processes, i = 0 ... n-1, with the same other
            arguments; the last to end makes the store complete.
        together: the n processes need the store: each waits until it is complete, and does what those that died left.
        progress: show a bar (without a terminal: a log line every 10 s).

    Returns:
        The store; None if shards of other processes are still pending (never with ``together``).

    Raises:
        StoreError: if a store is there that was made for something else or is damaged, if the detector gives
            what cannot be stored (NaN, say; the message names the image), or if the disk is full or read-only. What
            was done stays.
        DataError: if no image at all can be read, or the dataset is empty or contradicts itself.
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
        raise ArgumentError("shard", f"is ({index}, {shards}): give (i, n) with 0 <= i < n.")
    check_targets(dataset.ids, dataset.labels, dataset.targets, dataset.difficult)
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

    def do(index: int, shards: int, overwrite: bool) -> InstanceStore | None:
        claim = _ShardLock(path, job, dataset, overwrite, index, shards, patient=together)
        with claim:
            if claim.writer is None:
                return finished()
            try:
                _fill(claim.writer, dataset, extractor, num_workers, index, shards, progress)
            except KeyboardInterrupt:
                log.warning("Stopped. The same command continues %s where it stopped.", path)
                raise
            return claim.finish()

    store = do(index, shards, overwrite)
    if store is None and together:
        # Waits for all who work on it. Nobody does: whoever had a part and did not do it, is gone or late.
        store = do(0, 1, False)
    if store is None:
        return None
    skipped = store.manifest.skipped
    if skipped:
        log.warning(
            "%d of %d images could not be read and have no instances in %s (all are listed in its manifest.json): %s%s",
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
    """Do this shard's batches that the journal does not call finished."""
    job = writer.manifest
    N, B = len(job.ids), job.batch_size
    states = writer.states()
    # an image that was mended since gets its chance: no state is worth keeping that a second look contradicts
    unreadable = np.flatnonzero(states == State.UNREADABLE).tolist()
    reasons = writer.reasons() if unreadable else {}
    for row in unreadable:
        if CRASHES in reasons[job.ids[row]]:
            continue
        with contextlib.suppress(UnreadableImage):
            dataset.image(row)
            states[row] = State.PENDING
    batches = [list(range(start, min(start + B, N))) for start in range(index * B, N, shards * B)]
    pending = [rows for rows in batches if (states[rows] == State.PENDING).any()]
    total, left = sum(map(len, batches)), sum(map(len, pending))
    if 0 < left < total:
        log.info("Continuing %s: %d of %d images are done.", writer.path, total - left, total)
    trace = writer.partial / f"shard-{index}-of-{shards}.reading"
    with _Meter(f"{job.dataset}/{job.split}", total, total - left, progress) as meter:
        for rows, images in read_batches(Rows(dataset, job), pending, num_workers, trace):
            writer.write(rows[0], _detect(extractor, images, job))
            meter.advance(len(rows))


def _detect(extractor: InstanceExtractor, rows: Sequence[Views], job: Manifest) -> list[list[Instances] | str]:
    """The instances of each view of each readable row; of the others, the reason."""
    for row in rows:
        if isinstance(row, GMMLICError):
            raise row
    found: list[list[Instances] | str] = [row if isinstance(row, str) else [] for row in rows]
    readable = [(row, out) for row, out in zip(rows, found, strict=True) if isinstance(row, list)]
    for view in range(1 + job.views if readable else 0):
        images = [_to_tensor(row[view]) for row, _ in readable]
        try:
            with torch.no_grad():
                instances = extractor(images, job.m)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"The detector {job.detector} ran out of memory with `batch_size={job.batch_size}`: lower it."
            ) from error
        if len(instances) != len(images):
            raise StoreError(f"The detector {job.detector} gave {len(instances)} results for {len(images)} images.")
        for (_, out), result in zip(readable, instances, strict=True):
            out.append(result)  # type: ignore[union-attr]
    return found


def _to_tensor(image: np.ndarray) -> Tensor:
    # as gm_mlic.datasets.images.to_tensor, after the pipe
    return torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div(255)


class _ShardLock:
    """A context in which this process alone works on its shard of the unfinished store.

    Attributes:
        writer: to the unfinished store; None if another process finished it while this one waited.
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
        # One process waits for another as long as that works; of shards given by hand, a clash is a mistake.
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
                    if self._is_made(waiting):
                        return self
                    holders = self._holders()
                    rivals = [name for name in holders if name == self.name or not name.endswith(f"-of-{self.shards}")]
                    if not rivals:
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
                            f"Process {holders[rivals[0]]} is extracting {self.path} as {rivals[0]}: wait for it, or "
                            "give each process its own `shard` of the same number of shards."
                        )
                if not waiting:
                    numbers = [self._number(file) for file in sorted(self.partial.glob("*.pid"))]
                    by = ", ".join(numbers) or "of unknown number"
                    log.warning("Waiting for %s, which another process is extracting (process %s).", self.path, by)
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
        """Make the store complete if nothing is pending in any shard."""
        assert self.writer is not None
        with self.guard:
            if not self.partial.is_dir():  # the process of another shard was faster
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
                    f"None of the {len(states)} images can be read: check the folder of the dataset. The first: {first}"
                )
            return self.writer.finish()

    def _is_made(self, waited: bool) -> bool:
        """Whether the store is there and need not be overwritten, or not again: we waited for who just made it."""
        if not (self.path / MANIFEST).is_file():
            return False
        if not self.overwrite:
            return True
        if not waited or self.partial.is_dir():
            return False
        return next(differences(Manifest.read(self.path / MANIFEST), self.job), None) is None

    def _holders(self) -> dict[str, str]:
        """Shard to process number, for each shard that a living process works on. Only under the guard."""
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
            return "of unknown number"


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} images/s" if task.speed else "")


class _Meter:
    """Images done, of how many, images/s and time left: as a bar on a terminal, else as a log line every 10 s."""

    def __init__(self, what: str, total: int, done: int, show: bool) -> None:
        self.what, self.total, self.done, self.show = what, total, done, show
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if show and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed())
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
        self.began = self.logged = time.monotonic()
        self.resumed = done

    def __enter__(self) -> _Meter:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, images: int) -> None:
        self.done += images
        now = time.monotonic()
        if self.bar is not None:
            self.bar.advance(self.task, images)
        elif self.show and (now - self.logged > LOG_S or self.done == self.total):
            speed = (self.done - self.resumed) / max(now - self.began, 1e-9)
            log.info(
                "%s: %d of %d images, %.1f images/s, %.0f s left",
                self.what,
                self.done,
                self.total,
                speed,
                (self.total - self.done) / speed,
            )
            self.logged = now
