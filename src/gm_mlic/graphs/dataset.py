"""The assignment graphs of an instance store: one ``HeteroData`` for each image, or a dense batch at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.utils.data
from torch import Tensor
from torch_geometric.data import Dataset, HeteroData

from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ConfigError, StoreError
from gm_mlic.graphs.assignment import AssignmentGraph
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.graphs.schema import INSTANCE
from gm_mlic.targets import normalise_targets


class InstanceRows(Protocol):
    """What graphs need of an instance store: its arrays (see :class:`gm_mlic.instances.InstanceStore`)."""

    features: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    detected_labels: np.ndarray
    counts: np.ndarray
    targets: np.ndarray
    difficult: np.ndarray | None
    rows: np.ndarray


def instance_data(instances: Instances) -> HeteroData:
    """A ``HeteroData`` with the ``instance`` store only: what :class:`AssignmentGraph` starts from."""
    data = HeteroData()
    data[INSTANCE].x = instances.features
    data[INSTANCE].box = instances.boxes
    data[INSTANCE].score = instances.scores
    data[INSTANCE].detected_label = instances.detected_labels
    return data


class _Views:
    """The readable images of a store, and which view of each an epoch takes."""

    def __init__(self, store: InstanceRows, graph: AssignmentGraph, *, augment: bool, seed: int) -> None:
        _, views, stored_m, _ = store.features.shape
        if graph.m is not None and graph.m > stored_m:
            raise StoreError(
                f"The store holds m={stored_m} instances for each image, graph.m={graph.m} asks for more: "
                f"extract again with detector.max_instances={graph.m}, or lower graph.m."
            )
        if store.targets.shape[1] != graph.label_vectors.shape[0]:
            raise StoreError(
                f"The store has {store.targets.shape[1]} labels, the label vectors are {graph.label_vectors.shape[0]}."
            )
        normalise_targets(np.asarray(store.targets), store.difficult)  # checked once, not at every step
        if augment and views < 2:
            raise ConfigError("The store has no augmented views: extract with instances.views=4, or do not augment.")
        self.store = store
        self.graph = graph
        self.augment = augment
        self.seed = seed
        # In shared memory, so that a new epoch reaches persistent workers too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw other views from now on; the same epoch always draws the same."""
        self._epoch.fill_(epoch)

    def view(self, row: int) -> int:
        """Which view of the image at ``row`` this epoch takes: 0 is the plain one."""
        if not self.augment:
            return 0
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (int(self._epoch) << 32) | row]))
        return int(rng.integers(1, self.store.features.shape[1]))


class AssignmentGraphDataset(_Views, Dataset):
    """The assignment graphs of the readable images of an instance store, one ``HeteroData`` each.

    Each graph also has ``y`` (1, C) int64 in {0, 1} and ``row`` (1,), the image's row in the store; and ``difficult``
    (1, C) bool where the store has it. It batches with PyG's ``DataLoader``.

    Args:
        store: an opened instance store.
        graph: the transform that builds the graphs; m and the graphs' settings live there.
        augment: take an augmented view instead of the plain one, drawn anew in each epoch (see :meth:`set_epoch`).
        seed: of that draw.

    Raises:
        StoreError: if the store holds fewer than m instances, or other labels.
        DataError: if its targets are not in {0, 1}.
        ConfigError: if there are no augmented views to draw from.
    """

    def __init__(self, store: InstanceRows, graph: AssignmentGraph, *, augment: bool = False, seed: int = 0) -> None:
        Dataset.__init__(self)
        _Views.__init__(self, store, graph, augment=augment, seed=seed)

    def len(self) -> int:
        return len(self.store.rows)

    def get(self, idx: int) -> HeteroData:
        row = int(self.store.rows[idx])
        view = self.view(row)
        count = int(self.store.counts[row, view])

        def take(array: np.ndarray, dtype: torch.dtype) -> Tensor:
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
        if self.store.difficult is not None:
            data.difficult = torch.tensor(self.store.difficult[row])[None]
        data.row = torch.tensor([row])
        graph: HeteroData = self.graph(data)
        return graph


class AssignmentBatchDataset(_Views, torch.utils.data.Dataset[AssignmentBatch]):
    """The same graphs as :class:`AssignmentGraphDataset`, a whole :class:`AssignmentBatch` at once.

    A ``DataLoader`` asks it for all rows of a batch together, and no object is made for a single image: give the
    loader ``collate_fn=AssignmentBatchDataset.collate``.

    Args:
        store, graph, augment, seed: as for :class:`AssignmentGraphDataset`.

    Raises:
        StoreError, ConfigError: likewise.
    """

    def __init__(self, store: InstanceRows, graph: AssignmentGraph, *, augment: bool = False, seed: int = 0) -> None:
        super().__init__(store, graph, augment=augment, seed=seed)

    def __len__(self) -> int:
        return len(self.store.rows)

    def __getitem__(self, index: int) -> AssignmentBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> AssignmentBatch:
        store, graph = self.store, self.graph
        rows = np.asarray(store.rows)[np.asarray(indices)]
        views = np.array([self.view(int(row)) for row in rows]) if self.augment else np.zeros_like(rows)
        M = store.features.shape[2] if graph.m is None else graph.m
        count = torch.from_numpy(np.asarray(store.counts[rows, views], dtype=np.int64)).clamp(max=M)
        if bool((count < 1).any()):
            raise StoreError(f"Row {int(rows[int(count.argmin())])} of the store has no instances: extract it again.")
        return AssignmentBatch.build(
            x=torch.from_numpy(store.features[rows, views, :M]).float(),
            box=torch.from_numpy(store.boxes[rows, views, :M]),
            mask=torch.arange(M) < count[:, None],
            label_vectors=graph.label_vectors,
            neighbours=graph.neighbours if graph.instance_graph else None,
            label_graph=graph.label_graph,
            relates=graph.label_lists,
            y=torch.from_numpy(store.targets[rows].astype(np.int64)),
            difficult=None if store.difficult is None else torch.from_numpy(store.difficult[rows]),
            row=torch.from_numpy(rows.astype(np.int64)),
            score=torch.from_numpy(store.scores[rows, views, :M]),
            detected_label=torch.from_numpy(store.detected_labels[rows, views, :M].astype(np.int64)),
            candidates=graph.candidates,
        )

    @staticmethod
    def collate(batch: AssignmentBatch) -> AssignmentBatch:
        """For ``DataLoader(collate_fn=...)``: the batch is one already."""
        return batch


def dense_batch(
    found: Sequence[Instances],
    graph: AssignmentGraph,
    device: str | torch.device = "cpu",
    y: Tensor | None = None,
    row: Tensor | None = None,
    difficult: Tensor | None = None,
) -> AssignmentBatch:
    """The assignment graphs of some images' instances, as one :class:`AssignmentBatch`.

    Args:
        found: of B images, at most m each.
        graph: the transform with label vectors.
        device: where the batch is wanted.
        y: (B, C) targets, row: (B,) rows, difficult: (B, C) bool, to be kept with it.
    """

    def pad(parts: list[Tensor], absent: float = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([part.to(device) for part in parts], True, absent)

    counts = torch.tensor([len(instances) for instances in found], device=device)
    return AssignmentBatch.build(
        x=pad([instances.features for instances in found]),
        box=pad([instances.boxes for instances in found]),
        mask=torch.arange(int(counts.max()), device=device) < counts[:, None],
        label_vectors=graph.label_vectors.to(device),
        neighbours=graph.neighbours if graph.instance_graph else None,
        label_graph=graph.label_graph,
        relates=None if graph.label_lists is None else graph.label_lists.to(device),
        y=y,
        difficult=difficult,
        row=row,
        score=pad([instances.scores for instances in found]),
        detected_label=pad([instances.detected_labels for instances in found], -1),
        candidates=None if graph.candidates is None else graph.candidates.to(device),
    )
