from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch, HeteroData
from torch_geometric.transforms import Compose, ToDevice

from gm_mlic.errors import ConfigError
from gm_mlic.graphs import (
    INSTANCE,
    LABEL,
    MATCHES,
    SEMANTIC,
    SPATIAL,
    AssignmentBatch,
    AssignmentGraph,
    knn_edge_index,
    label_edge_index,
    label_neighbors,
)


def brute_force(boxes: Tensor, neighbors: int) -> list[tuple[int, int]]:
    edges = []
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        ranked = []
        for j, (a1, b1, a2, b2) in enumerate(boxes.tolist()):
            if i != j:
                ranked.append((((a1 + a2) / 2 - (x1 + x2) / 2) ** 2 + ((b1 + b2) / 2 - (y1 + y2) / 2) ** 2, j))
        edges += [(j, i) for _, j in sorted(ranked)[:neighbors]]
    return edges


def instances(M: int, D: int = 3) -> HeteroData:
    data = HeteroData()
    generator = torch.Generator().manual_seed(M)
    data[INSTANCE].x = torch.randn(M, D, generator=generator)
    data[INSTANCE].box = torch.rand(M, 4, generator=generator)
    data[INSTANCE].score = torch.rand(M, generator=generator)
    data[INSTANCE].detected_label = torch.arange(M)
    return data


W = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))

# Eighths: distances are exact, and ties are common.
eighths = st.integers(0, 8).map(lambda n: n / 8)
some_boxes = st.lists(st.tuples(eighths, eighths, eighths, eighths), min_size=1, max_size=8).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64)
)


@settings(max_examples=60, deadline=None)
@given(boxes=some_boxes, neighbors=st.integers(1, 9))
def test_nearest_neighbors_equal_brute_force(boxes: Tensor, neighbors: int) -> None:
    edges = knn_edge_index(boxes, neighbors)
    assert edges.shape == (2, len(boxes) * min(neighbors, len(boxes) - 1))
    assert [tuple(edge) for edge in edges.t().tolist()] == brute_force(boxes, neighbors)


@settings(max_examples=40, deadline=None)
@given(images=st.lists(some_boxes, min_size=1, max_size=3), neighbors=st.integers(1, 4))
def test_dense_batch_has_the_same_neighbors(images: list[Tensor], neighbors: int) -> None:
    M = max(map(len, images))
    box, mask = torch.zeros(len(images), M, 4).double(), torch.zeros(len(images), M, dtype=torch.bool)
    for b, boxes in enumerate(images):
        box[b, : len(boxes)], mask[b, : len(boxes)] = boxes, True
    batch = AssignmentBatch.from_padded(torch.zeros(len(images), M, 1), box, mask, W, num_neighbors=neighbors)
    lists, attr = batch.edge_index_dict[SPATIAL], batch.edge_attr_dict[SPATIAL]
    for b, boxes in enumerate(images):
        edges = [
            (int(lists.index[b, i, s]), i)
            for i in range(M)
            for s in range(lists.index.shape[2])
            if bool(lists.mask[b, i, s])
        ]
        assert edges == brute_force(boxes, neighbors)
        for j, i in edges:
            slot = lists.index[b, i].tolist().index(j)
            assert torch.equal(attr[b, i, slot], torch.cat([boxes[j], boxes[i]]))


def test_identical_boxes_are_ordered_by_index() -> None:
    edges = knn_edge_index(torch.full((4, 4), 0.5), 2)
    assert edges.tolist() == [[1, 2, 0, 2, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3]]


def test_single_instance_has_no_neighbor() -> None:
    assert knn_edge_index(torch.rand(1, 4), 5).shape == (2, 0)


def test_label_edges() -> None:
    complete = label_edge_index(4)
    assert sorted(map(tuple, complete.t().tolist())) == [(j, i) for j in range(4) for i in range(4) if i != j]
    assert complete[1].tolist() == sorted(complete[1].tolist())
    for k in (None, 3, 99):
        assert label_neighbors(W, k) is None
    assert label_edge_index(1).shape == (2, 0)
    similarity = torch.nn.functional.cosine_similarity(W[:, None], W[None], dim=2)
    for k in (1, 2):
        neighbors = label_neighbors(W, k)
        assert neighbors is not None
        source, target = label_edge_index(4, neighbors)
        for i in range(4):
            expected = sorted((j for j in range(4) if j != i), key=lambda j: -float(similarity[i, j]))[:k]
            assert source[target == i].tolist() == neighbors[i].tolist() == expected


def test_graph_of_equations_1_to_3() -> None:
    data = instances(3)
    x, box = data[INSTANCE].x, data[INSTANCE].box
    graph = AssignmentGraph(W, num_neighbors=1, edge_attr=True)(data)
    assert torch.equal(graph[LABEL].x, W)
    ends = {SPATIAL: (box, box), SEMANTIC: (W, W), MATCHES: (x, W)}
    for edge_type, (source, target) in ends.items():
        edge_index, attr = graph[edge_type].edge_index, graph[edge_type].edge_attr
        for e, (j, i) in enumerate(edge_index.t().tolist()):
            assert torch.equal(attr[e], torch.cat([source[j], target[i]]))
    assert graph[MATCHES].edge_index.t().tolist() == [[i, c] for i in range(3) for c in range(4)]
    assert graph[SPATIAL].edge_index.shape == (2, 3)
    assert graph[SEMANTIC].edge_index.shape == (2, 12)
    graph.validate()


def test_m_keeps_the_most_confident() -> None:
    graph = AssignmentGraph(W, m=2)(instances(5))
    assert graph[INSTANCE].detected_label.tolist() == [0, 1]
    assert all(len(graph[INSTANCE][name]) == 2 for name in ("x", "box", "score"))
    assert graph[MATCHES].edge_index.shape == (2, 8)
    assert graph[SPATIAL].edge_index.shape == (2, 2)
    assert AssignmentGraph(W, m=9)(instances(5))[INSTANCE].x.shape[0] == 5


def test_label_vectors_and_attributes_have_the_dtype_of_the_features() -> None:
    data = instances(3)
    data[INSTANCE].x = data[INSTANCE].x.to(torch.bfloat16)
    graph = AssignmentGraph(W, edge_attr=True)(data)
    assert graph[LABEL].x.dtype == torch.bfloat16
    assert all(graph[edge_type].edge_attr.dtype == torch.bfloat16 for edge_type in graph.edge_types)


def test_input_is_not_modified() -> None:
    data = instances(5)
    before = copy.deepcopy(data.to_dict())
    AssignmentGraph(W, m=2)(data)
    after = data.to_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[INSTANCE][name], value) for name, value in before[INSTANCE].items())


def test_ablations_omit_edge_types() -> None:
    assert AssignmentGraph(W, edge_types=["spatial", "matches"])(instances(3)).edge_types == [SPATIAL, MATCHES]
    assert AssignmentGraph(W, edge_types=["semantic"])(instances(3)).edge_types == [SEMANTIC, MATCHES]
    assert AssignmentGraph(W, edge_types=[])(instances(3)).edge_types == [MATCHES]


def test_works_in_a_pipeline() -> None:
    graph = Compose([AssignmentGraph(W), ToDevice("cpu")])(instances(3))
    assert graph[MATCHES].edge_index.shape == (2, 12)
    assert "edge_attr" not in graph[MATCHES]
    assert repr(AssignmentGraph(W, m=2)) == "AssignmentGraph(C=4, m=2, num_neighbors=5, num_label_neighbors=None)"


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (torch.zeros(4), {}, r"\(C, D_l\)"),
        (torch.zeros(0, 3), {}, "C >= 1"),
        (torch.tensor([[1.0], [float("nan")], [float("inf")]]), {}, r"labels \[1, 2\]"),
        (W.numpy(), {}, r"\(C, D_l\)"),
        (W, {"m": 0}, "^m must be a whole number of 1 or more, got 0"),
        (W, {"m": 2.5}, "^m .* got 2.5"),
        (W, {"m": -3}, "^m must"),
        (W, {"num_neighbors": 0}, "^num_neighbors"),
        (W, {"num_neighbors": None}, "^num_neighbors .* got None"),
        (W, {"num_label_neighbors": 0}, "^num_label_neighbors"),
    ],
)
def test_invalid_arguments(vectors: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AssignmentGraph(vectors, **options)


def test_image_without_instances() -> None:
    with pytest.raises(ConfigError, match="without instances"):
        AssignmentGraph(W)(instances(0))


@pytest.mark.parametrize("name", ["x", "box"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values(name: str, value: float) -> None:
    data = instances(3)
    data[INSTANCE][name][1, 0] = value
    with pytest.raises(ConfigError, match=rf"data\['instance'\]\.{name} holds NaN or infinite"):
        AssignmentGraph(W)(data)


@pytest.mark.parametrize("name", ["x", "box"])
def test_missing_instance_attributes(name: str) -> None:
    data = instances(3)
    del data[INSTANCE][name]
    with pytest.raises(ConfigError, match=rf"needs data\['instance'\]\.{name}"):
        AssignmentGraph(W)(data)


@pytest.mark.parametrize("neighbors", [None, torch.tensor([[1], [0], [0]])])
def test_split_batch_has_the_same_images(neighbors: Tensor | None) -> None:
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True], [True, False]])
    batch = AssignmentBatch.from_padded(
        torch.randn(5, 2, 4),
        torch.rand(5, 2, 4),
        mask,
        torch.randn(3, 6),
        label_neighbors=neighbors,
        row=torch.arange(5),
    )
    parts = batch.split(2)
    assert [part.num_graphs for part in parts] == [2, 2, 1]
    for name in ("x", "box", "mask", "row"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    for name in ("index", "mask"):
        lists = [getattr(part.edge_index_dict[SPATIAL], name) for part in parts]
        assert torch.equal(torch.cat(lists), getattr(batch.edge_index_dict[SPATIAL], name))
    assert torch.equal(torch.cat([part.edge_attr_dict[SPATIAL] for part in parts]), batch.edge_attr_dict[SPATIAL])
    for part in parts:
        assert part.label_vectors is batch.label_vectors
        assert part.edge_index_dict[SEMANTIC].index is batch.edge_index_dict[SEMANTIC].index
        assert part.y is None


def test_equal_numbers_of_images_and_labels_are_split_by_image() -> None:
    mask, neighbors = torch.ones(3, 2, dtype=torch.bool), torch.tensor([[1], [0], [0]])
    batch = AssignmentBatch.from_padded(
        torch.randn(3, 2, 4), torch.rand(3, 2, 4), mask, torch.randn(3, 6), label_neighbors=neighbors
    )
    for part in batch.split(1):
        assert part.label_vectors.shape == (3, 6)
        assert part.edge_index_dict[SEMANTIC].index.shape == (1, 3, 1)


def test_dtype_and_device() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    batch = AssignmentBatch.from_padded(
        torch.randn(1, 2, 4), torch.rand(1, 2, 4), mask, torch.randn(3, 6), row=torch.arange(1)
    )
    half = batch.to(torch.float16)
    assert half.x.dtype == half.label_vectors.dtype == half.edge_attr_dict[SPATIAL].dtype == torch.float16
    assert half.row.dtype == half.edge_index_dict[SPATIAL].index.dtype == torch.int64
    assert half.mask.dtype == torch.bool
    meta = batch.to("meta")
    assert {t.device.type for t in (meta.x, meta.row, meta.edge_attr_dict[SPATIAL])} == {"meta"}


def joined(*graphs: HeteroData) -> HeteroData:
    return Batch.from_data_list(list(graphs))


def test_graphs_without_a_dense_form() -> None:
    """The error has the reason and the alternative."""
    graph = AssignmentGraph(W)
    cases = [
        (joined(graph(instances(2)), AssignmentGraph(W + 1)(instances(2))), "images differ in labels"),
        (AssignmentGraph(W, edge_attr=True)(instances(2)), "matches label edges carry attributes"),
        (joined(graph(instances(2)), AssignmentGraph(W, num_label_neighbors=1)(instances(2))), "label edges"),
    ]
    twice = graph(instances(2))
    twice[MATCHES].edge_index = twice[MATCHES].edge_index[:, [0, *range(8)]]
    crossed = joined(graph(instances(2)), graph(instances(3)))
    crossed[MATCHES].edge_index[0, 0] = 3
    other = graph(instances(2))
    other["label", "of", "topic"].edge_index = torch.zeros(2, 1, dtype=torch.int64)
    cases += [(twice, "an edge occurs twice"), (crossed, "connects two images"), (other, "other node types")]
    for data, reason in cases:
        with pytest.raises(ConfigError, match=rf"no dense form: .*{reason}.*pass the HeteroData itself"):
            AssignmentBatch.from_hetero_data(data)
