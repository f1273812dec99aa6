"""The confidence of matching edges, and the number of training images of labels."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, HeteroData

from gm_mlic.detection import Instances
from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs import (
    INSTANCE,
    LABEL,
    MATCHES,
    AssignmentBatch,
    AssignmentBatchDataset,
    AssignmentGraph,
    AssignmentGraphDataset,
    collate_instances,
    drop_edges,
)
from gm_mlic.graphs.classes import class_confidence
from gm_mlic.graphs.dense import Bipartite, edge_dot
from gm_mlic.zoo.explain import _without

CLASSES = 3
#: The second class is no label, the third is both labels 1 and 2.
TABLE = torch.tensor([[True, False, False], [False, False, False], [False, True, True]])
COUNTS = torch.tensor([5, 0, 120])


def confidence(table: Tensor, detected: list[int], score: list[float]) -> list[list[float]]:
    """Confidences (M, C) by the definition."""
    rows = zip(detected, score, strict=True)
    return [[s if d >= 0 and bool(table[d, c]) else 0.0 for c in range(table.shape[1])] for d, s in rows]


def found(M: int, seed: int = 0) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(M, 2, generator=generator) / 2
    score = torch.rand(M, generator=generator).sort(descending=True).values
    detected = torch.randint(-1, CLASSES, (M,), generator=generator)
    return Instances(torch.cat([corner, corner + 0.3], dim=1), score, detected, torch.randn(M, 4, generator=generator))


def instances(M: int, seed: int = 0) -> HeteroData:
    data, values = HeteroData(), found(M, seed)
    data[INSTANCE].x, data[INSTANCE].box = values.features, values.boxes
    data[INSTANCE].score, data[INSTANCE].detected_label = values.scores, values.detected_labels
    return data


def transform(**options: Any) -> AssignmentGraph:
    W = torch.randn(3, 2, generator=torch.Generator().manual_seed(3))
    return AssignmentGraph(W, num_neighbors=2, **{"class_labels": TABLE, "label_counts": COUNTS, **options})


@given(
    st.lists(st.tuples(st.integers(-1, CLASSES - 1), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=6),
    st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=CLASSES, max_size=CLASSES),
)
@settings(max_examples=40, deadline=None)
def test_confidence_of_each_match(pairs: list[tuple[int, float]], rows: list[list[bool]]) -> None:
    detected, score = (list(values) for values in zip(*pairs, strict=True))
    table, expected = torch.tensor(rows), confidence(torch.tensor(rows), detected, score)
    assert class_confidence(table, torch.tensor(detected), torch.tensor(score)).tolist() == expected
    batched = class_confidence(table, torch.tensor([detected] * 2), torch.tensor([score] * 2).half())
    assert batched.dtype == torch.float16
    assert batched.tolist() == [expected] * 2


def test_counts_of_labels_without_a_class_are_infinite() -> None:
    table = torch.tensor([[False, False, True], [False, False, False], [False, True, False]])
    assert transform(class_labels=table)(instances(2))[LABEL].count.tolist() == [float("inf"), 0.0, 120.0]
    assert transform(class_labels=None)(instances(2))[LABEL].count.tolist() == [5.0, 0.0, 120.0]


def test_class_beyond_the_table() -> None:
    with pytest.raises(ConfigError, match="class 3, but the table is of classes 0 to 2"):
        class_confidence(TABLE, torch.tensor([0, 3]), torch.ones(2))


@pytest.mark.parametrize("candidates", [None, torch.tensor([[True, False, True], [False] * 3, [False, True, False]])])
def test_each_edge_of_a_graph_has_its_confidence(candidates: Tensor | None) -> None:
    graph = transform(candidates=candidates)
    for seed in range(5):
        data = graph(instances(4, seed))
        values = found(4, seed)
        q = torch.tensor(confidence(TABLE, values.detected_labels.tolist(), values.scores.tolist()))
        source, target = data[MATCHES].edge_index
        assert torch.equal(data[MATCHES].confidence, q[source, target])
        assert data[LABEL].count.tolist() == [5.0, 0.0, 120.0]
        batch = AssignmentBatch.from_hetero_data(data)
        assert batch.confidence is not None
        assert torch.equal(batch.confidence[0][source, target], q[source, target])
        assert batch.confidence.count_nonzero() == data[MATCHES].confidence.count_nonzero()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_all_ways_to_a_batch_are_equal(counts: list[int]) -> None:
    """Lists of graphs, PyG batches, and padded instances; three images have as many images as labels."""
    graph = transform()
    graphs = [graph(instances(M, seed)) for seed, M in enumerate(counts)]
    collated = AssignmentBatch.collate(graphs)
    others = [
        AssignmentBatch.from_hetero_data(Batch.from_data_list(graphs)),
        collate_instances([found(M, seed) for seed, M in enumerate(counts)], graph),
        next(iter(DataLoader(graphs, batch_size=len(graphs), collate_fn=AssignmentBatch.collate))),
    ]
    assert collated.confidence is not None
    assert collated.confidence.shape == (len(counts), max(counts), 3)
    for other in others:
        assert other.confidence is not None
        torch.testing.assert_close(other.confidence, collated.confidence)
        assert other.label_counts is not None
        assert other.label_counts.tolist() == [5, 0, 120]
    for b, (M, data) in enumerate(zip(counts, graphs, strict=True)):
        assert not collated.confidence[b, M:].any()
        assert torch.equal(collated.confidence[b, :M].flatten(), data[MATCHES].confidence)


@pytest.mark.parametrize("images", [2, 3, 5])
def test_parts_of_a_batch(images: int) -> None:
    """The counts belong to labels, even where there are as many images."""
    graph = transform()
    batch = AssignmentBatch.collate([graph(instances(2 + seed % 3, seed)) for seed in range(images)])
    assert batch.confidence is not None
    for size in (1, 2):
        parts = batch.split(size)
        assert [part.num_graphs for part in parts] == [min(size, images - start) for start in range(0, images, size)]
        for start, part in zip(range(0, images, size), parts, strict=True):
            assert torch.equal(part.confidence, batch.confidence[start : start + size])
            assert part.label_counts is not None
            assert part.label_counts.tolist() == [5, 0, 120]


def test_dtype_and_device_of_a_batch() -> None:
    batch = collate_instances([found(3), found(2, 1)], transform())
    half, meta = batch.to(torch.float16), batch.to("meta")
    assert half.confidence is not None
    assert half.confidence.dtype == torch.float16
    assert half.confidence.shape == (2, 3, 3)
    assert meta.confidence is not None
    assert meta.label_counts is not None
    assert meta.confidence.device.type == meta.label_counts.device.type == "meta"
    doubled = batch.map(lambda value: value * 2 if value.is_floating_point() else value)
    assert torch.equal(doubled.confidence, 2 * batch.confidence)


def test_confidence_has_the_dtype_of_the_features() -> None:
    data = instances(3)
    data[INSTANCE].x = data[INSTANCE].x.double()
    assert transform()(data)[MATCHES].confidence.dtype == torch.float64
    values = found(3)
    batch = AssignmentBatch.from_padded(
        values.features.double()[None],
        values.boxes[None],
        torch.ones(1, 3, dtype=torch.bool),
        torch.randn(3, 2).double(),
        class_labels=TABLE,
        detected_label=values.detected_labels[None],
        score=values.scores[None],
    )
    assert batch.confidence is not None
    assert batch.confidence.dtype == torch.float64


def test_padded_scores_have_no_confidence() -> None:
    batch = AssignmentBatch.from_padded(
        torch.randn(1, 2, 4),
        torch.rand(1, 2, 4),
        torch.tensor([[True, False]]),
        torch.randn(3, 2),
        class_labels=TABLE,
        detected_label=torch.tensor([[0, 0]]),
        score=torch.tensor([[0.5, float("nan")]]),
    )
    assert batch.confidence is not None
    assert batch.confidence.tolist() == [[[0.5, 0, 0], [0, 0, 0]]]


def test_graphs_without_tables_have_neither() -> None:
    data = transform(class_labels=None, label_counts=None)(instances(3))
    assert "confidence" not in data[MATCHES]
    assert "count" not in data[LABEL]
    batch = AssignmentBatch.from_hetero_data(data)
    assert batch.confidence is None
    assert batch.label_counts is None


def test_both_layouts_of_a_store_have_the_same_confidence() -> None:
    rng = np.random.default_rng(0)
    N, M = 7, 4
    counts = rng.integers(1, M + 1, (N, 1))
    store: Any = SimpleNamespace(
        features=rng.normal(size=(N, 1, M, 4)).astype(np.float16),
        boxes=np.sort(rng.random((N, 1, M, 4)), axis=-1).astype(np.float32),
        scores=rng.random((N, 1, M)).astype(np.float32),
        detected_labels=rng.integers(-1, CLASSES, (N, 1, M)).astype(np.int32),
        counts=counts,
        targets=np.zeros((N, 3), dtype=np.int8),
        difficult=None,
        rows=np.arange(N),
    )
    graph = transform(m=3)
    dense = AssignmentBatchDataset(store, graph).__getitems__(range(N))
    sparse = AssignmentBatch.collate([AssignmentGraphDataset(store, graph)[i] for i in range(N)])
    assert dense.confidence is not None
    assert sparse.confidence is not None
    M = sparse.confidence.shape[1]
    torch.testing.assert_close(dense.confidence[:, :M], sparse.confidence)
    for i, j in itertools.product(range(N), range(M)):
        there = j < min(int(counts[i, 0]), 3)
        detected, score = int(store.detected_labels[i, 0, j]), float(store.scores[i, 0, j])
        expected = confidence(TABLE, [detected], [score])[0] if there else [0, 0, 0]
        assert dense.confidence[i, j].tolist() == pytest.approx(expected)


def test_removed_edges_keep_the_others_aligned() -> None:
    data = transform()(instances(4))
    edge_index, q = data[MATCHES].edge_index, data[MATCHES].confidence
    for edge in range(edge_index.shape[1]):
        smaller = _without(data, MATCHES, edge)
        kept = [e for e in range(edge_index.shape[1]) if e != edge]
        assert torch.equal(smaller[MATCHES].edge_index, edge_index[:, kept])
        assert torch.equal(smaller[MATCHES].confidence, q[kept])
        assert data[MATCHES].confidence.shape == q.shape
        batch = AssignmentBatch.from_hetero_data(smaller)
        assert batch.confidence is not None
        assert batch.confidence[0, edge_index[0, edge], edge_index[1, edge]] == 0
        assert batch.confidence.sum() == pytest.approx(float(q[kept].sum()))
    assert len(drop_edges(data, MATCHES)[MATCHES].confidence) == 0  # type: ignore[index]


def test_inner_product_of_the_ends_of_each_edge() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, 4, generator=generator), torch.randn(1, 5, 4, generator=generator)
    dense = edge_dot(Bipartite(torch.ones(2, 3, dtype=torch.bool)), x, w)
    edge_index = torch.tensor([[0, 2, 1], [4, 0, 3]])
    sparse = edge_dot(edge_index, x[1], w[0])
    assert dense.shape == (2, 3, 5)
    for e, (i, c) in enumerate(edge_index.T.tolist()):
        expected = sum(float(x[1, i, k]) * float(w[0, c, k]) for k in range(4))
        assert float(sparse[e]) == pytest.approx(expected, abs=1e-5)
        assert float(dense[1, i, c]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_labels": TABLE.float()}, "class_labels must be a bool table of classes and 3 labels"),
        ({"class_labels": TABLE[:, :2]}, "class_labels must be a bool table of classes and 3 labels"),
        ({"candidates": TABLE[0]}, "candidates must be a bool table of classes and 3 labels"),
        ({"label_counts": COUNTS[:2]}, "label_counts must be 3 numbers of images"),
        ({"label_counts": -COUNTS}, "label_counts must be 3 numbers of images"),
    ],
)
def test_invalid_tables(options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        transform(**options)


@pytest.mark.parametrize("missing", ["score", "detected_label"])
def test_instances_without_detections(missing: str) -> None:
    data = instances(2)
    del data[INSTANCE][missing]
    with pytest.raises(ConfigError, match="Class labels need"):
        transform()(data)
    values = {"score": torch.ones(1, 2), "detected_label": torch.zeros(1, 2, dtype=torch.int64)}
    del values[missing]
    with pytest.raises(ConfigError, match="Class labels need"):
        AssignmentBatch.from_padded(
            torch.randn(1, 2, 4),
            torch.rand(1, 2, 4),
            torch.ones(1, 2, dtype=torch.bool),
            torch.randn(3, 2),
            class_labels=TABLE,
            **values,
        )
