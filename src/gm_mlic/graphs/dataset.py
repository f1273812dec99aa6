"""The assignment graphs of an instance store, one ``HeteroData`` for each image."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch_geometric.data import Dataset, HeteroData

from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ConfigError, StoreError
from gm_mlic.graphs.assignment import AssignmentGraph
from gm_mlic.graphs.schema import INSTANCE


class InstanceRows(Protocol):
    """What graphs need of an instance store: its arrays (see :class:`gm_mlic.instances.InstanceStore`)."""

    features: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    detected_labels: np.ndarray
    counts: np.ndarray
    targets: np.ndarray
    rows: np.ndarray


def instance_data(instances: Instances) -> HeteroData:
    """A ``HeteroData`` with the ``instance`` store only: what :class:`AssignmentGraph` starts from."""
    data = HeteroData()
    data[INSTANCE].x = instances.features
    data[INSTANCE].box = instances.boxes
    data[INSTANCE].score = instances.scores
    data[INSTANCE].detected_label = instances.detected_labels
    return data


class AssignmentGraphDataset(Dataset):
    """The assignment graphs of the readable images of an instance store.

    Each graph also has ``y`` (1, C) int64 in {1, 0, -1} and ``row`` (1,), the image's row in the store. It batches
    with PyG's ``DataLoader``.

    Args:
        store: an opened instance store.
        transform: an :class:`AssignmentGraph` (m and the graphs' settings live there).
        augment: take an augmented view instead of the plain one, drawn anew in each epoch (see :meth:`set_epoch`).
        seed: of that draw.
    """

    def __init__(self, store: InstanceRows, transform: AssignmentGraph, *, augment: bool = False, seed: int = 0):
        super().__init__()
        stored_m = store.features.shape[2]
        if transform.m is not None and transform.m > stored_m:
            raise StoreError(
                f"The store holds m={stored_m} instances for each image, graph.m={transform.m} asks for more: "
                f"extract again with detector.max_instances={transform.m}, or lower graph.m."
            )
        if store.targets.shape[1] != transform.label_vectors.shape[0]:
            raise StoreError(
                f"The store has {store.targets.shape[1]} labels, the label vectors {transform.label_vectors.shape[0]}."
            )
        if augment and store.features.shape[1] < 2:
            raise ConfigError("The store has no augmented views: extract with instances.views=4, or set augment off.")
        self.store = store
        self.graph = transform
        self.augment = augment
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other views from now on; the same epoch always draws the same."""
        self.epoch = epoch

    def view(self, row: int) -> int:
        """Which view of the image at ``row`` this epoch takes: 0 is the plain one."""
        if not self.augment:
            return 0
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (self.epoch << 32) | row]))
        return int(rng.integers(1, self.store.features.shape[1]))

    def len(self) -> int:
        return len(self.store.rows)

    def get(self, idx: int) -> HeteroData:
        row = int(self.store.rows[idx])
        view = self.view(row)
        count = int(self.store.counts[row, view])

        def take(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(np.array(array[row, view, :count])).to(dtype)

        data = instance_data(
            Instances(
                boxes=take(self.store.boxes, torch.float32),
                scores=take(self.store.scores, torch.float32),
                detected_labels=take(self.store.detected_labels, torch.int64),
                features=take(self.store.features, torch.float32),
            )
        )
        data.y = torch.from_numpy(self.store.targets[row].astype(np.int64))[None]
        data.row = torch.tensor([row])
        graph: HeteroData = self.graph(data)
        return graph
