"""Data loaders whose order depends on seed and epoch only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch_geometric.data import Batch


class EpochSampler(DistributedSampler[Any]):
    """Distributed sampler with a permutation per (seed, epoch); also sets the epoch of the dataset.

    A resumed run reads the same images in the same order and with the same augmentation as an uninterrupted one.

    Args:
        dataset: a dataset; its ``set_epoch(epoch)`` is called if it has one.
        seed, rank, num_replicas: see :class:`torch.utils.data.DistributedSampler`.
        first: (epoch, n): skip the first n images of that epoch.
    """

    def __init__(
        self, dataset: Dataset[Any], seed: int, rank: int = 0, num_replicas: int = 1, first: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.first = first
        # On resume, Lightning starts to prefetch before it sets the sampler's epoch.
        self.set_epoch(first[0])

    def __iter__(self) -> Iterator[Any]:
        epoch, seen = self.first
        return itertools.islice(super().__iter__(), seen if self.epoch == epoch else 0, None)

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class GraphData(LightningDataModule):
    """Data module with the loaders of a run: batches of graphs, or of images, by split.

    ``batch_size`` is that of each process, ``seed`` that of the order of training images, and ``first`` the (epoch,
    step) at which training starts.
    """

    def __init__(
        self,
        splits: Mapping[str, Dataset[Any]],
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        first: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.splits = splits
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.first = first

    def train_dataloader(self) -> DataLoader[Any]:
        epoch, steps = self.first
        first = (epoch, steps * self.batch_size)
        return self._loader("train", EpochSampler(self.splits["train"], self.seed, *self._rank(), first=first))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation_loader("val")

    def evaluation_loader(self, split: str) -> DataLoader[Any]:
        """Loader of all images of a split, in order; processes share them, so none is counted twice."""
        rank, world_size = self._rank()
        return self._loader(split, range(rank, len(self.splits[split]), world_size))  # type: ignore[arg-type]

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(self, split: str, sampler: Any) -> DataLoader[Any]:
        return DataLoader(
            self.splits[split],
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=getattr(self.splits[split], "collate", Batch.from_data_list),
        )
