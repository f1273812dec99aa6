"""On-line mode: images for detection in every training step, with new augmentations per epoch, without a store."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gm_mlic.datasets.base import MultiLabelDataset, check_targets
from gm_mlic.datasets.images import to_tensor
from gm_mlic.errors import UnreadableImage
from gm_mlic.instances.augment import crop_and_flip, view_rng

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnlineBatch:
    """Batch of B readable images for the extractor; B may be 0.

    Attributes:
        rows: (B,) int64 rows of the dataset.
        images: B tensors (3, H, W) float32 in [0, 1].
        targets: (B, C) int8 in {0, 1}.
        difficult: (B, C) bool; None if the dataset has no mask of difficult labels.
    """

    rows: Tensor
    images: list[Tensor]
    targets: Tensor
    difficult: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


class OnlineImages(Dataset[tuple[int, Tensor | None]]):
    """Dataset of ``(i, image)``, with random crop, resize and flip for training.

    The augmentation depends only on (``seed``, epoch, image id), not on workers, order or batch. Call :meth:`set_epoch`
    before each epoch. Unreadable images give None and are logged once; :meth:`collate` (the ``collate_fn`` of a
    DataLoader) drops them.

    Args:
        dataset: one split.
        train: augment images.
        size: size of augmented images in pixels.
        seed: seed of the augmentation.

    Attributes:
        passes: how often each image occurs in an epoch, each time augmented differently (default: 1).

    Raises:
        DataError: if the dataset is inconsistent, or its targets are not in {0, 1}.
    """

    passes = 1

    def __init__(self, dataset: MultiLabelDataset, train: bool, size: int = 448, seed: int = 0) -> None:
        check_targets(dataset.ids, dataset.labels, dataset.targets, dataset.difficult)
        self.dataset = dataset
        self.train = train
        self.size = size
        self.seed = seed
        # shared with DataLoader workers, including persistent ones
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self.passes * len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines random crops and flips."""
        self._epoch.fill_(epoch)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Ids of unreadable images so far."""
        return tuple(self.dataset.ids[i] for i in torch.nonzero(self._unreadable).flatten().tolist())

    def __getitem__(self, i: int) -> tuple[int, Tensor | None]:
        passed, i = divmod(i, len(self.dataset))
        try:
            image = self.dataset.image(i)
        except UnreadableImage as error:
            if not self._unreadable[i]:
                self._unreadable[i] = True
                log.warning("Skipped image %s: %s", self.dataset.ids[i], error)
            return i, None
        if self.train:
            epoch = int(self._epoch) * self.passes + passed
            image = crop_and_flip(image, self.size, view_rng(self.seed, self.dataset.ids[i], epoch))
        return i, to_tensor(image)

    def collate(self, samples: list[tuple[int, Tensor | None]]) -> OnlineBatch:
        """Collate samples to a batch without unreadable images."""
        kept = [(row, image) for row, image in samples if image is not None]
        rows = [row for row, _ in kept]
        difficult = self.dataset.difficult
        return OnlineBatch(
            rows=torch.tensor(rows, dtype=torch.int64),
            images=[image for _, image in kept],
            targets=torch.from_numpy(np.asarray(self.dataset.targets[rows], dtype=np.int8)),
            difficult=None if difficult is None else torch.from_numpy(difficult[rows]),
        )
