"""Instance extraction: run a detector over a split and write an instance store, resumable and in several processes.

Batches and blocks are fixed: batch b is rows bB to bB + B - 1, and a block is a number of batches. The store's bytes
therefore do not depend on interruptions or on the number of shards.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gm_mlic._version import __version__
from gm_mlic.datasets.base import MultiLabelDataset, check_targets
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection.protocol import InstanceExtractor, Instances, LookupExtractor, check_detected, detect
from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.instances.image_loader import ImageViews, Views, read_batches
from gm_mlic.instances.manifest import MANIFEST, Manifest, job_fields
from gm_mlic.instances.store import InstanceStore
from gm_mlic.instances.writer import StoreWriter
from gm_mlic.io import Progress
from gm_mlic.schema import Natural, Positive, checked

log = logging.getLogger(__name__)

#: Seconds between checks whether another process has finished.
POLL_S = 0.5


@checked
def extract(
    dataset: MultiLabelDataset,
    extractor: InstanceExtractor,
    path: str | Path,
    *,
    m: Positive,
    views: Natural = 0,
    view_size: Positive = 448,
    view_seed: Natural = 0,
    batch_size: Positive = 8,
    num_workers: Natural = 0,
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
        shard: (i, n): process every n-th block, starting at the i-th. Start n processes, i = 0 ... n-1, with otherwise
            equal arguments; the last to end completes the store.
        together: also process blocks of other shards that no process has begun, and wait until the store is complete.
        progress: show a progress bar (without a terminal: a log line every 10 s).

    Returns:
        The store, or None if shards of other processes are pending (never with ``together``).

    Raises:
        StoreError: if an existing store is damaged or of another job, if the detector returns invalid values (such as
            NaN; the message names the image), or if the disk is full. Written blocks are kept.
        DataError: if no image can be read, or the dataset is empty or inconsistent.
        ConfigError: if a number is out of range, or ``path`` cannot be written.
    """
    path = Path(path)
    index, shards = shard
    if not 0 <= index < shards:
        raise ArgumentError("shard", f"is ({index}, {shards}): expected (i, n) with 0 <= i < n.")
    check_targets(dataset.ids, dataset.labels, dataset.targets, dataset.difficult)
    if isinstance(extractor, LookupExtractor):
        if views:
            problem = f"is {views}: instances of augmented views cannot be looked up in files. Set it to 0."
            raise ArgumentError("views", problem)
        extractor.check_ids(dataset.ids)
    store: InstanceStore | None
    if (path / MANIFEST).is_file() and not overwrite:
        store = InstanceStore.open(path)
        store.check(dataset, extractor, m=m, views=views, view_size=view_size, view_seed=view_seed)
        store.verify_once()
        return store
    job = Manifest(
        **job_fields(dataset, extractor),
        m=m,
        views=views,
        view_size=view_size if views else None,
        view_seed=view_seed if views else None,
        batch_size=batch_size,
        versions={"gm_mlic": __version__} | {name: version(name) for name in ("torch", "torchvision", "numpy")},
    )
    writer = StoreWriter(path, job)
    every = range(len(writer.blocks))
    own = every[index::shards]
    try:
        writer.begin(dataset, own, overwrite)
        blocks = [*own, *(block for block in every if together and block not in own)]
        _extract(writer, dataset, extractor, blocks, num_workers, progress)
        store = writer.finish()
    except KeyboardInterrupt:
        log.warning("Interrupted. Run the same command again to resume %s.", path)
        raise
    finally:
        writer.release()
    if store is None:
        log.info("Shard %d of %d of %s is done; images are pending in other shards.", index, shards, path)
        return None
    store.check(dataset, extractor, m=m, views=views, view_size=view_size, view_seed=view_seed)
    if reasons := list(store.manifest.skipped.values()):
        log.warning(
            "%d of %d images are unreadable and have no instances in %s (see its manifest.json): %s%s",
            len(reasons), len(store), path, "; ".join(reasons[:3]), "; ..." if len(reasons) > 3 else "",
        )  # fmt: skip
    return store


def _extract(
    writer: StoreWriter,
    dataset: MultiLabelDataset,
    extractor: InstanceExtractor,
    blocks: Sequence[int],
    num_workers: int,
    progress: bool,
) -> None:
    """Write the missing ones of ``blocks``; wait for those that other processes are extracting."""
    job = writer.job
    images = ImageViews(dataset, job, not isinstance(extractor, LookupExtractor) or extractor.needs_sizes)
    total, missing = writer.count(blocks), writer.missing(blocks)
    done = total - writer.count(missing)
    if 0 < done < total:
        log.info("Resuming %s: %d of %d images are done.", writer.path, done, total)
    waited = False
    with Progress(f"{job.dataset}/{job.split}", "images", total, done, log, progress) as bar:
        while missing:
            before = bar.done
            with contextlib.closing(read_batches(images, writer.claim(missing), num_workers)) as batches:
                for rows, views in batches:
                    writer.add(rows, _instances(extractor, [job.ids[row] for row in rows], views, job))
                    bar.advance(len(rows))
            missing = writer.missing(blocks)
            if by_others := total - writer.count(missing) - bar.done:
                bar.advance(by_others)
            if missing and bar.done == before:
                if not waited:
                    log.warning("Waiting for other processes that are extracting %s.", writer.path)
                waited = True
                time.sleep(POLL_S)
    if isinstance(extractor, LookupExtractor):
        extractor.log_corrections()


def _instances(
    extractor: InstanceExtractor, ids: Sequence[str], images: Sequence[Views], job: Manifest
) -> list[list[Instances] | str]:
    """Instances of each view of each image, or the reason why it has none."""
    results: list[Any] = [image if isinstance(image, str) else [] for image in images]
    readable = {i: image for i, image in enumerate(images) if not isinstance(image, str)}
    if isinstance(extractor, LookupExtractor):
        sizes = [(image[0].shape[1], image[0].shape[0]) if image else None for image in readable.values()]
        looked_up = extractor.look_up([ids[i] for i in readable], sizes, job.m)
        for i, found in zip(readable, looked_up, strict=True):
            results[i] = found if isinstance(found, str) else [found]
            if not isinstance(found, str):
                check_detected(extractor, found, job.m, f"image {ids[i]!r}")
        return results
    for view in range(1 + job.views if readable else 0):
        batch = [to_tensor(image[view]) for image in readable.values()]
        names = [f"image {ids[i]!r}{f', augmented view {view}' if view else ''}" for i in readable]
        try:
            with torch.no_grad():
                detected = detect(extractor, batch, job.m, names)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"The detector {job.detector} is out of memory with `batch_size={job.batch_size}`: lower it."
            ) from error
        for i, instances in zip(readable, detected, strict=True):
            results[i].append(instances)
    return results
