"""Prefetch and decode images, and survive images that crash the process that decodes them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from gm_mlic.datasets.base import MultiLabelDataset
from gm_mlic.errors import GMMLICError, UnreadableImage
from gm_mlic.instances.augment import crop_and_flip, view_rng
from gm_mlic.instances.store import Manifest

log = logging.getLogger(__name__)

#: What the reason of an image says that no process can decode and live.
CRASHES = "crashes the process that decodes it"

#: The 1 + r views of an image, each (H, W, 3) uint8; or why there are none.
Views = list[np.ndarray] | str | GMMLICError


class Rows(Dataset[Any]):
    """Row to its views.

    Bytes, not floats, and arrays, not tensors: from a worker they then come through a pipe at a quarter of the size,
    and need no shared memory, of which containers have little.
    """

    def __init__(self, dataset: MultiLabelDataset, job: Manifest) -> None:
        self.dataset = dataset
        self.views, self.size, self.seed = job.views, job.view_size, job.view_seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Views:
        try:
            image = self.dataset.image(i)
        except UnreadableImage as error:
            return str(error)
        except GMMLICError as error:  # raised here, a worker would bury its line in a traceback
            return error
        views = [image]
        if self.size is not None and self.seed is not None:
            for view in range(1, 1 + self.views):
                views.append(crop_and_flip(image, self.size, view_rng(self.seed, self.dataset.ids[i], view)))
        return [np.array(view, dtype=np.uint8) for view in views]


def read_batches(
    rows: Rows, batches: Sequence[list[int]], num_workers: int, trace: Path
) -> Iterator[tuple[list[int], list[Views]]]:
    """The images of every batch, each batch once, not always in order.

    Where a process died while it decoded, each image is decoded in a process of its own, and one that kills its
    process is unreadable.

    Args:
        rows: what to read.
        batches: lists of rows.
        num_workers: processes that decode ahead; 0 decodes in this one.
        trace: a file that says, while this process decodes, which batch; found at the beginning, it says at which an
            earlier one died.
    """
    suspect = -1
    with contextlib.suppress(OSError, ValueError):
        suspect = int(trace.read_text())
    for batch in (b for b in batches if b[0] == suspect):
        yield batch, [_read_apart(rows, row) for row in batch]
    batches = [b for b in batches if b[0] != suspect]
    loader = DataLoader(
        rows,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # leave the global generator alone
    )
    done = 0
    with _SigchldGuard() as alarm:
        try:
            ahead: Any = iter(loader)
            alarm.hold_back()
            for batch in batches:
                if num_workers == 0:
                    trace.write_text(str(batch[0]))
                with alarm.let_through():
                    images: list[Views] = next(ahead)
                trace.unlink(missing_ok=True)
                done += 1
                yield batch, images
        except RuntimeError as error:
            if not is_death_of_a_worker(error):
                raise
            log.warning("A process that decodes images died: from here on each image is decoded in one of its own.")
        ahead = None  # ends the other workers
        for batch in batches[done:]:
            yield batch, [_read_apart(rows, row) for row in batch]


class _SigchldGuard:
    """torch's handler of SIGCHLD, which raises as soon as a DataLoader's worker died, held back where that does harm.

    It raises wherever this process is, in the middle of writing what the detector gave, too. While this process waits
    for a batch it is needed: a worker that dies in the middle of sending one leaves a message that never ends.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._open = self._rang = False

    def __enter__(self) -> _SigchldGuard:
        return self

    def hold_back(self) -> None:
        """From here on, until the context ends; after the loader began, which is when torch sets its handler."""
        if threading.current_thread() is threading.main_thread():  # no other can set handlers
            self._handler = signal.getsignal(signal.SIGCHLD)
            if callable(self._handler):
                signal.signal(signal.SIGCHLD, self._ring)

    def _ring(self, number: int, frame: FrameType | None) -> None:
        if self._open:
            self._handler(number, frame)
        else:
            self._rang = True

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """A context in which it raises, and does so at once for what was held back."""
        self._open = True
        try:
            if self._rang:
                self._rang = False
                self._handler(signal.SIGCHLD, None)
            yield
        finally:
            self._open = False

    def __exit__(self, *error: object) -> None:
        if callable(self._handler):
            signal.signal(signal.SIGCHLD, self._handler)


def is_death_of_a_worker(error: BaseException) -> bool:
    """Whether torch's DataLoader says that one of its processes is gone."""
    text = r"DataLoader worker .*(killed by signal|exited unexpectedly)"
    return isinstance(error, RuntimeError) and re.match(text, str(error)) is not None


def _read_apart(rows: Rows, row: int) -> Views:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send, args=(ours, theirs, rows, row), daemon=True)
    process.start()
    theirs.close()  # or the end of the other process would go unnoticed
    try:
        views: Views = ours.recv()
    except (EOFError, OSError):
        process.join()
        return f"Image {rows.dataset.ids[row]} {CRASHES} (exit code {process.exitcode}): save it anew or remove it."
    process.join()
    return views


def _send(receiver: Connection, connection: Connection, rows: Rows, row: int) -> None:
    receiver.close()  # or the end of the process that reads would go unnoticed, and this one wait forever
    with contextlib.suppress(BrokenPipeError):
        connection.send(rows[row])
