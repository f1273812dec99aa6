"""Image loader: prefetch and decode images; survive images that crash the decoder process."""

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

#: Part of the reason for images that crash the decoder process.
CRASHES = "crashes the decoder process"

#: The 1 + r views of an image, each (H, W, 3) uint8; or the error.
Views = list[np.ndarray] | str | GMMLICError


class Rows(Dataset[Any]):
    """Dataset of views by row.

    Views are uint8 arrays: workers send them through a pipe at a quarter of the size of floats, and without shared
    memory, which is small in containers.
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
        except GMMLICError as error:  # returned, since workers raise with a long traceback
            return error
        views = [image]
        if self.size is not None and self.seed is not None:
            for view in range(1, 1 + self.views):
                views.append(crop_and_flip(image, self.size, view_rng(self.seed, self.dataset.ids[i], view)))
        return [np.array(view, dtype=np.uint8) for view in views]


def read_batches(
    rows: Rows, batches: Sequence[list[int]], num_workers: int, trace: Path
) -> Iterator[tuple[list[int], list[Views]]]:
    """Yield every batch of images once, not necessarily in order.

    After a crash of the decoder process, each image is decoded in a separate process; images that crash it are
    unreadable.

    Args:
        rows: the images.
        batches: lists of rows.
        num_workers: number of decoder processes; 0 decodes in this process.
        trace: file with the first row of the batch being decoded in this process; if it exists at the start, an earlier
            process crashed in that batch.
    """
    suspect = -1
    with contextlib.suppress(OSError, ValueError):
        suspect = int(trace.read_text())
    for batch in (b for b in batches if b[0] == suspect):
        yield batch, [_read_isolated(rows, row) for row in batch]
    batches = [b for b in batches if b[0] != suspect]
    loader = DataLoader(
        rows,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # do not use the global generator
    )
    done = 0
    with _SigchldGuard() as guard:
        try:
            prefetched: Any = iter(loader)
            guard.defer()
            for batch in batches:
                if num_workers == 0:
                    trace.write_text(str(batch[0]))
                with guard.deliver():
                    images: list[Views] = next(prefetched)
                trace.unlink(missing_ok=True)
                done += 1
                yield batch, images
        except RuntimeError as error:
            if not is_worker_crash(error):
                raise
            log.warning("A decoder process died: the remaining images are decoded in separate processes.")
        prefetched = None  # terminates the other workers
        for batch in batches[done:]:
            yield batch, [_read_isolated(rows, row) for row in batch]


class _SigchldGuard:
    """Context manager that defers torch's SIGCHLD handler, which raises when a DataLoader worker dies.

    The handler could interrupt writing to the store. It is delivered only while waiting for a batch, where it is needed
    to end a wait for a worker that died while sending.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._delivering = self._pending = False

    def __enter__(self) -> _SigchldGuard:
        return self

    def defer(self) -> None:
        """Defer the handler from now on. Call it after the loader has started, when torch has set its handler."""
        if threading.current_thread() is threading.main_thread():  # only the main thread can set handlers
            self._handler = signal.getsignal(signal.SIGCHLD)
            if callable(self._handler):
                signal.signal(signal.SIGCHLD, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._delivering:
            self._handler(number, frame)
        else:
            self._pending = True

    @contextlib.contextmanager
    def deliver(self) -> Iterator[None]:
        """Context in which the handler runs, immediately for a deferred signal."""
        self._delivering = True
        try:
            if self._pending:
                self._pending = False
                self._handler(signal.SIGCHLD, None)
            yield
        finally:
            self._delivering = False

    def __exit__(self, *error: object) -> None:
        if callable(self._handler):
            signal.signal(signal.SIGCHLD, self._handler)


def is_worker_crash(error: BaseException) -> bool:
    """Whether an error of torch's DataLoader is the death of a worker."""
    text = r"DataLoader worker .*(killed by signal|exited unexpectedly)"
    return isinstance(error, RuntimeError) and re.match(text, str(error)) is not None


def _read_isolated(rows: Rows, row: int) -> Views:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.Process(target=_send, args=(receiver, sender, rows, row), daemon=True)
    process.start()
    sender.close()  # so that the end of the child process closes the pipe
    try:
        views: Views = receiver.recv()
    except (EOFError, OSError):
        process.join()
        return f"Image {rows.dataset.ids[row]} {CRASHES} (exit code {process.exitcode}): save it again or remove it."
    process.join()
    return views


def _send(receiver: Connection, sender: Connection, rows: Rows, row: int) -> None:
    receiver.close()  # so that the end of the parent process closes the pipe
    with contextlib.suppress(BrokenPipeError):
        sender.send(rows[row])
