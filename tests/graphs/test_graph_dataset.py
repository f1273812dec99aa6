from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader as TorchLoader
from torch_geometric.data import Batch
from torch_geometric.loader import DataLoader

from gm_mlic.errors import ConfigError, DataError, StoreError
from gm_mlic.graphs import (
    INSTANCE,
    LABEL,
    AssignmentBatch,
    AssignmentBatchDataset,
    AssignmentGraph,
    AssignmentGraphDataset,
)

N, V, M, D, C = 12, 4, 3, 5, 2


@dataclass
class Store:
    """Instance store in memory."""

    features: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    detected_labels: np.ndarray
    counts: np.ndarray
    targets: np.ndarray
    difficult: np.ndarray | None
    rows: np.ndarray


@pytest.fixture
def store() -> Store:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, M + 1, (N, V)).astype(np.int32)
    voc = np.random.default_rng(1).choice([1, 0, -1], (N, C))
    there = np.arange(M) < counts[..., None]
    return Store(
        features=(rng.normal(size=(N, V, M, D)) * there[..., None]).astype(np.float16),
        boxes=(np.sort(rng.random((N, V, M, 4)), axis=-1) * there[..., None]).astype(np.float32),
        scores=(rng.random((N, V, M)) * there).astype(np.float32),
        detected_labels=rng.integers(0, 9, (N, V, M)).astype(np.int32),
        counts=counts,
        targets=(voc == 1).astype(np.int8),
        difficult=voc == 0,
        rows=np.array([row for row in range(N) if row not in (0, 5)]),  # two unreadable images
    )


def transform(m: int | None = None) -> AssignmentGraph:
    vectors = torch.randn(C, 3, generator=torch.Generator().manual_seed(0))
    return AssignmentGraph(vectors, m=m, num_neighbors=1)


def test_graphs_equal_the_rows_of_the_store(store: Store) -> None:
    data = AssignmentGraphDataset(store, transform())
    assert len(data) == len(store.rows)
    for graph, row in zip(data, store.rows, strict=True):
        count = int(store.counts[row, 0])
        assert graph.row.tolist() == [row]
        assert graph.y.shape == (1, C)
        assert graph.y.dtype == torch.int64
        assert graph.y[0].tolist() == store.targets[row].tolist()
        assert store.difficult is not None
        assert graph.difficult.dtype == torch.bool
        assert graph.difficult[0].tolist() == store.difficult[row].tolist()
        assert graph[INSTANCE].x.dtype == torch.float32
        np.testing.assert_array_equal(graph[INSTANCE].x.numpy(), store.features[row, 0, :count])
        np.testing.assert_array_equal(graph[INSTANCE].box.numpy(), store.boxes[row, 0, :count])
        np.testing.assert_array_equal(graph[INSTANCE].score.numpy(), store.scores[row, 0, :count])
        np.testing.assert_array_equal(graph[INSTANCE].detected_label.numpy(), store.detected_labels[row, 0, :count])


@pytest.mark.parametrize("m", [None, 1, 2, M])
@pytest.mark.parametrize("augment", [False, True])
def test_both_datasets_are_equal(store: Store, m: int | None, augment: bool) -> None:
    one = AssignmentGraphDataset(store, transform(m), augment=augment, seed=3)
    all_at_once = AssignmentBatchDataset(store, transform(m), augment=augment, seed=3)
    assert len(one) == len(all_at_once)
    (ours,) = TorchLoader(all_at_once, batch_size=N, collate_fn=AssignmentBatchDataset.collate)
    theirs = Batch.from_data_list(list(one))
    assert isinstance(ours, AssignmentBatch)
    assert ours.num_graphs == len(store.rows)
    assert torch.equal(ours.x[ours.mask], theirs[INSTANCE].x)
    assert torch.equal(ours.box[ours.mask], theirs[INSTANCE].box)
    assert ours.y is not None
    assert torch.equal(ours.y, theirs.y)
    assert ours.difficult is not None
    assert torch.equal(ours.difficult, theirs.difficult)
    converted = AssignmentBatch.from_hetero_data(theirs)
    assert torch.equal(converted.difficult, theirs.difficult)
    for part, mask in zip(ours.split(2), ours.difficult.split(2), strict=True):
        assert torch.equal(part.difficult, mask)
    assert ours.row is not None
    assert torch.equal(ours.row, theirs.row)
    assert torch.equal(ours.label_vectors, theirs[LABEL].x[:C])


def test_row_without_instances_is_refused(store: Store) -> None:
    store.counts[3, 0] = 0
    with pytest.raises(StoreError, match="Row 3 of the store has no instances"):
        AssignmentBatchDataset(store, transform()).__getitems__([0, 1, 2])


def test_more_instances_than_the_store_has(store: Store) -> None:
    for kind in (AssignmentGraphDataset, AssignmentBatchDataset):
        with pytest.raises(StoreError, match=r"`m=4` is more than the 3 instances"):
            kind(store, transform(4))


def test_different_number_of_labels(store: Store) -> None:
    with pytest.raises(StoreError, match="has 3 labels, but the graph 2"):
        AssignmentGraphDataset(replace(store, targets=np.zeros((N, 3), np.int8), difficult=None), transform())


def test_no_augmented_views(store: Store) -> None:
    plain = replace(store, **{name: getattr(store, name)[:, :1] for name in ("features", "boxes", "scores", "counts")})
    AssignmentGraphDataset(plain, transform())
    with pytest.raises(ConfigError, match="augment needs a store with augmented views"):
        AssignmentGraphDataset(plain, transform(), augment=True)


def views(store: Store, seed: int, epoch: int) -> list[int]:
    data = AssignmentGraphDataset(store, transform(), augment=True, seed=seed)
    data.set_epoch(epoch)
    return data.rows_and_views(range(len(data)))[1].tolist()


def test_views_are_drawn_by_seed_and_epoch(store: Store) -> None:
    assert views(store, 1, 0) == views(store, 1, 0)
    assert views(store, 1, 0) != views(store, 1, 1)
    assert views(store, 1, 0) != views(store, 2, 0)
    drawn = {view for epoch in range(20) for view in views(store, 1, epoch)}
    assert drawn == {0, 1, 2, 3}  # 0 is the original image


def test_only_the_original_view_without_augmentation(store: Store) -> None:
    data = AssignmentGraphDataset(store, transform())
    data.set_epoch(3)
    assert set(data.rows_and_views(range(len(data)))[1]) == {0}


@pytest.mark.parametrize("kind", [AssignmentGraphDataset, AssignmentBatchDataset])
def test_passes_of_an_epoch_are_epochs_of_one_pass(store: Store, kind: type) -> None:
    one, three = (kind(store, transform(), augment=True, seed=1) for _ in range(2))
    three.passes = 3
    three.set_epoch(2)
    assert len(three) == 3 * len(one)
    rows, views = three.rows_and_views(range(len(three)))
    for n, (some_rows, some_views) in enumerate(zip(np.split(rows, 3), np.split(views, 3), strict=True)):
        one.set_epoch(6 + n)
        expected = one.rows_and_views(range(len(one)))
        assert np.array_equal(some_rows, expected[0])
        assert np.array_equal(some_views, expected[1])
    last = three[len(three) - 1]
    assert int(last.row) == store.rows[-1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(store: Store, workers: int) -> None:
    data = AssignmentGraphDataset(store, transform(), augment=True)
    data.set_epoch(2)
    batches = list(DataLoader(data, batch_size=4, num_workers=workers))
    assert torch.cat([batch.row for batch in batches]).tolist() == store.rows.tolist()
    expected = Batch.from_data_list(list(data))
    assert torch.equal(torch.cat([batch[INSTANCE].x for batch in batches]), expected[INSTANCE].x)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", [AssignmentGraphDataset, AssignmentBatchDataset])
def test_set_epoch_reaches_workers(store: Store, kind: type, persistent: bool) -> None:
    data = kind(store, transform(), augment=True)
    loader = (DataLoader if kind is AssignmentGraphDataset else TorchLoader)(
        data,
        batch_size=N,
        num_workers=1,
        persistent_workers=persistent,
        **({} if kind is AssignmentGraphDataset else {"collate_fn": AssignmentBatchDataset.collate}),
    )

    def features() -> torch.Tensor:
        (batch,) = loader
        return batch.x if isinstance(batch, AssignmentBatch) else batch[INSTANCE].x

    first = features()
    data.set_epoch(1)
    second = features()
    assert first.shape != second.shape or not torch.equal(first, second)


@pytest.mark.parametrize("kind", [AssignmentGraphDataset, AssignmentBatchDataset])
def test_without_a_mask_of_difficult_labels(store: Store, kind: Any) -> None:
    data = kind(replace(store, difficult=None), transform())
    assert getattr(data[0], "difficult", None) is None


@pytest.mark.parametrize("kind", [AssignmentGraphDataset, AssignmentBatchDataset])
def test_targets_are_checked_once(store: Store, kind: Any) -> None:
    with pytest.raises(DataError, match="targets contain -1"):
        kind(replace(store, targets=2 * store.targets - 1), transform())
