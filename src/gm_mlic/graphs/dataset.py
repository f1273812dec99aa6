"""Assignment graphs of an instance store: a ``HeteroData`` for each image, or a dense batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.data
from torch import Tensor
from torch_geometric.data import Dataset, HeteroData

from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ArgumentError, ConfigError, StoreError
from gm_mlic.graphs.assignment import AssignmentGraph, check_instances
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.graphs.schema import INSTANCE
from gm_mlic.targets import normalize_targets


class InstanceArrays(Protocol):
    """The arrays of an instance store that graphs are built from (see :class:`gm_mlic.instances.InstanceStore`)."""

    features: Any  # this and the next three: arrays, or blocks that are indexed as arrays
    boxes: Any
    scores: Any
    detected_labels: Any
    counts: np.ndarray
    targets: np.ndarray
    difficult: np.ndarray | None
    rows: np.ndarray


def to_hetero_data(instances: Instances) -> HeteroData:
    """A ``HeteroData`` with the ``instance`` store only, the input of :class:`AssignmentGraph`."""
    data = HeteroData()
    data[INSTANCE].x = instances.features
    data[INSTANCE].box = instances.boxes
    data[INSTANCE].score = instances.scores
    data[INSTANCE].detected_label = instances.detected_labels
    return data


class _StoreGraphs:
    """The readable images of a store, and the view of each in an epoch.

    Attributes:
        passes: how often each image occurs in an epoch, each time with another view (default: 1).
    """

    passes = 1

    def __init__(self, store: InstanceArrays, graph: AssignmentGraph, *, augment: bool = False, seed: int = 0) -> None:
        super().__init__()
        _, views, stored_m, _ = store.features.shape
        if graph.m is not None and graph.m > stored_m:
            raise StoreError(
                f"`m={graph.m}` is more than the {stored_m} instances of each image in the store: extract again with "
                "more, or lower `m`."
            )
        if store.targets.shape[1] != graph.label_vectors.shape[0]:
            raise StoreError(
                f"The store has {store.targets.shape[1]} labels, but the graph {graph.label_vectors.shape[0]}."
            )
        normalize_targets(np.asarray(store.targets), store.difficult)  # checked once, not at every step
        if augment and views < 2:
            raise ArgumentError("augment", "needs a store with augmented views: extract again with some.")
        self.store, self.graph, self.augment, self.seed = store, graph, augment, seed
        # In shared memory, so that a new epoch reaches persistent workers too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of this epoch. They depend on seed and epoch only."""
        self._epoch.fill_(epoch)

    def rows_and_views(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the store and views of the images at some indices; view 0 is the original image."""
        passed, image = np.divmod(np.asarray(indices), len(self.store.rows))
        rows = np.asarray(self.store.rows)[image]
        if not self.augment:
            return rows, np.zeros_like(rows)
        first = int(self._epoch) * self.passes
        keys = [(first + int(n) << 32) | int(row) for n, row in zip(passed, rows, strict=True)]
        draws = [np.random.Generator(np.random.Philox(key=[self.seed, key])) for key in keys]
        return rows, np.array([draw.integers(self.store.features.shape[1]) for draw in draws], dtype=np.int64)


class AssignmentGraphDataset(_StoreGraphs, Dataset):
    """The assignment graphs of the readable images of an instance store, one ``HeteroData`` each.

    Each graph also has ``y`` (1, C) int64 in {0, 1}, ``row`` (1,), the image's row in the store, and ``difficult``
    (1, C) bool where the store has it. Batch them with PyG's ``DataLoader``.

    Args:
        store: an opened instance store.
        graph: the transform that builds the graphs.
        augment: take the original or an augmented view, drawn in each epoch (see :meth:`set_epoch`).
        seed: seed of that draw.

    Raises:
        StoreError: if the store holds fewer than m instances, or other labels.
        DataError: if its targets are not in {0, 1}.
        ArgumentError: if there are no augmented views.
    """

    def len(self) -> int:
        return self.passes * len(self.store.rows)

    def get(self, idx: int) -> HeteroData:
        store, (rows, views) = self.store, self.rows_and_views([idx])
        row, view = int(rows[0]), int(views[0])

        def take(array: np.ndarray, dtype: type = np.float32) -> Tensor:
            return torch.from_numpy(array[row, view, : store.counts[row, view]].astype(dtype))

        boxes, scores, features = map(take, (store.boxes, store.scores, store.features))
        data = to_hetero_data(Instances(boxes, scores, take(store.detected_labels, np.int64), features))
        data.y = torch.from_numpy(store.targets[row].astype(np.int64))[None]
        if store.difficult is not None:
            data.difficult = torch.tensor(store.difficult[row])[None]
        data.row = torch.tensor([row])
        graph: HeteroData = self.graph(data)
        return graph


class AssignmentBatchDataset(_StoreGraphs, torch.utils.data.Dataset[AssignmentBatch]):
    """The same graphs as :class:`AssignmentGraphDataset`, as an :class:`AssignmentBatch` of many images.

    A ``DataLoader`` fetches all rows of a batch in one call. Pass ``collate_fn=AssignmentBatchDataset.collate`` to it.
    Arguments and errors are those of :class:`AssignmentGraphDataset`.
    """

    def __len__(self) -> int:
        return self.passes * len(self.store.rows)

    def __getitem__(self, index: int) -> AssignmentBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> AssignmentBatch:
        store, graph = self.store, self.graph
        rows, views = self.rows_and_views(indices)
        M = store.features.shape[2] if graph.m is None else graph.m
        count = torch.from_numpy(np.asarray(store.counts[rows, views], dtype=np.int64)).clamp(max=M)
        if bool((count < 1).any()):
            raise StoreError(f"Row {int(rows[int(count.argmin())])} of the store has no instances: extract it again.")
        return AssignmentBatch.from_padded(
            x=torch.from_numpy(store.features[rows, views, :M]).float(),
            box=torch.from_numpy(store.boxes[rows, views, :M]),
            mask=torch.arange(M) < count[:, None],
            y=torch.from_numpy(store.targets[rows].astype(np.int64)),
            difficult=None if store.difficult is None else torch.from_numpy(store.difficult[rows]),
            row=torch.from_numpy(rows.astype(np.int64)),
            score=torch.from_numpy(store.scores[rows, views, :M]),
            detected_label=torch.from_numpy(store.detected_labels[rows, views, :M].astype(np.int64)),
            **_settings(graph),
        )

    @staticmethod
    def collate(batch: AssignmentBatch) -> AssignmentBatch:
        """For ``DataLoader(collate_fn=...)``: the input is already a batch."""
        return batch


def collate_instances(
    instances: Sequence[Instances], graph: AssignmentGraph, device: str | torch.device = "cpu", **others: Any
) -> AssignmentBatch:
    """The assignment graphs of the instances of B images, as one :class:`AssignmentBatch`.

    Args:
        instances: instances of each image; the first m of each are kept.
        graph: the transform with label vectors.
        device: device of the batch.
        **others: ``y``, ``difficult`` and ``row`` of the images.

    Raises:
        ConfigError: without images, and for what :class:`AssignmentGraph` refuses.
    """
    if not all(map(len, instances)) or not len(instances):
        raise ConfigError("A batch needs at least one image, and each image an instance, e.g. the whole image.")

    def pad(parts: list[Tensor], padding: float = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([part[: graph.m].to(device) for part in parts], True, padding)

    x, box = pad([found.features for found in instances]), pad([found.boxes for found in instances])
    check_instances(x, box)
    counts = torch.tensor([len(found) for found in instances], device=device)
    return AssignmentBatch.from_padded(
        x=x,
        box=box,
        mask=torch.arange(x.shape[1], device=device) < counts[:, None],
        score=pad([found.scores for found in instances]),
        detected_label=pad([found.detected_labels for found in instances], -1),
        **_settings(graph, device),
        **others,
    )


def _settings(graph: AssignmentGraph, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Arguments of :meth:`AssignmentBatch.from_padded` that make the same graphs as ``graph``."""
    names = ("label_vectors", "label_neighbors", "candidates", "class_labels", "label_counts")
    tables = {name: None if (table := getattr(graph, name)) is None else table.to(device) for name in names}
    return {"num_neighbors": graph.num_neighbors, "edge_types": graph.edge_types, "views": graph.views, **tables}
