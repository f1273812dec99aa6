"""Image loader: decode images in advance, in processes that may crash."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import queue
import signal
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np
import torch

from gm_mlic.datasets.base import MultiLabelDataset, rgb_image
from gm_mlic.errors import UnreadableImage
from gm_mlic.instances.augment import crop_and_flip, view_rng
from gm_mlic.instances.manifest import Manifest

#: Part of the reason for images that crash the decoder process.
CRASHES = "crashes the decoder process"

#: The 1 + r views of an image, each (H, W, 3) uint8; or the reason why it is unreadable.
Views = list[np.ndarray] | str


class ImageViews:
    """The views of each image of a dataset by row; none unless ``needed``, for extractors that need no images."""

    def __init__(self, dataset: MultiLabelDataset, job: Manifest, needed: bool = True) -> None:
        self.dataset, self.needed = dataset, needed
        self.views, self.size, self.seed = job.views, job.view_size, job.view_seed

    def __getitem__(self, row: int) -> Views:
        if not self.needed:
            return []
        try:
            images = [rgb_image(self.dataset, row)]
        except UnreadableImage as error:
            return str(error)
        if self.size is not None and self.seed is not None:
            for view in range(1, 1 + self.views):
                rng = view_rng(self.seed, self.dataset.ids[row], view)
                images.append(crop_and_flip(images[0], self.size, rng))
        return [np.array(image, dtype=np.uint8) for image in images]


class Decoder:
    """A process that decodes images. It is started again if an image crashes it; that image is unreadable."""

    def __init__(self, images: ImageViews) -> None:
        self.images = images
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_serve, args=(theirs, self.pipe, self.images), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of either process closes the pipe

    def __getitem__(self, row: int) -> Views:
        for _ in range(2):  # the system may have killed the process for lack of memory
            try:
                self.pipe.send(row)
                views: Views | Exception = self.pipe.recv()
            except (EOFError, OSError):
                self.close()
                code = self.process.exitcode
                self._start()
                continue
            if isinstance(views, Exception):
                raise views
            return views
        image = self.images.dataset.ids[row]
        return f"Image {image} {CRASHES} (exit code {code}): save it again or remove it."

    def close(self) -> None:
        """End the process. It may not see the end of the pipe, of which later processes have copies."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, theirs: Connection, images: ImageViews) -> None:
    """Send the views of received rows until the pipe is closed."""
    theirs.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches this process too; the main process closes the pipe
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # the threads of the main process do not exist here
    with contextlib.suppress(EOFError, OSError):
        while True:
            row = pipe.recv()
            try:
                views: Views | Exception = images[row]
            except Exception as error:  # raised in the main process
                views = error
            pipe.send(views)


def read_batches(
    images: ImageViews, batches: Iterable[tuple[list[int], bool]], num_workers: int
) -> Generator[tuple[list[int], list[Views]], None, None]:
    """Yield the images of each batch, in order. An image that crashes a decoder process is unreadable.

    Args:
        images: the images.
        batches: lists of rows, and whether one of them may crash its decoder.
        num_workers: number of decoder processes, which decode as many batches in advance. With 0, images are decoded in
            this process, except those that may crash it.
    """
    with contextlib.ExitStack() as stack:
        if num_workers == 0:
            source: ImageViews | Decoder = images
            for rows, may_crash in batches:
                if may_crash and source is images:
                    source = stack.enter_context(contextlib.closing(Decoder(images)))
                yield rows, [source[row] if may_crash else images[row] for row in rows]
            return
        decoders: queue.SimpleQueue[Decoder] = queue.SimpleQueue()
        for _ in range(num_workers):
            decoders.put(stack.enter_context(contextlib.closing(Decoder(images))))

        def read(row: int) -> Views:
            decoder = decoders.get()
            try:
                return decoder[row]
            finally:
                decoders.put(decoder)

        pool = ThreadPoolExecutor(num_workers)
        stack.callback(pool.shutdown, cancel_futures=True)
        ahead: deque[tuple[list[int], list[Future[Views]]]] = deque()
        for rows, _ in itertools.chain(batches, [([], False)] * num_workers):
            ahead.append((rows, [pool.submit(read, row) for row in rows]))
            if len(ahead) > num_workers:
                rows, futures = ahead.popleft()
                yield rows, [future.result() for future in futures]
