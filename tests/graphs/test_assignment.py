from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.transforms import Compose, ToDevice

from gm_mlic.errors import ConfigError
from gm_mlic.graphs import (
    INSTANCE,
    LABEL,
    MATCHES,
    NEAR,
    RELATES,
    AssignmentBatch,
    AssignmentGraph,
    label_relations,
    nearest_neighbours,
)


def brute_force(boxes: Tensor, neighbours: int) -> list[tuple[int, int]]:
    edges = []
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        ranked = []
        for j, (a1, b1, a2, b2) in enumerate(boxes.tolist()):
            if i != j:
                ranked.append((((a1 + a2) / 2 - (x1 + x2) / 2) ** 2 + ((b1 + b2) / 2 - (y1 + y2) / 2) ** 2, j))
        edges += [(j, i) for _, j in sorted(ranked)[:neighbours]]
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
@given(boxes=some_boxes, neighbours=st.integers(1, 9))
def test_nearest_neighbours_equal_brute_force(boxes: Tensor, neighbours: int) -> None:
    edges = nearest_neighbours(boxes, neighbours)
    assert edges.shape == (2, len(boxes) * min(neighbours, len(boxes) - 1))
    assert [tuple(edge) for edge in edges.t().tolist()] == brute_force(boxes, neighbours)


@settings(max_examples=40, deadline=None)
@given(images=st.lists(some_boxes, min_size=1, max_size=3), neighbours=st.integers(1, 4))
def test_a_dense_batch_has_the_same_neighbours(images: list[Tensor], neighbours: int) -> None:
    M = max(map(len, images))
    box, mask = torch.zeros(len(images), M, 4).double(), torch.zeros(len(images), M, dtype=torch.bool)
    for b, boxes in enumerate(images):
        box[b, : len(boxes)], mask[b, : len(boxes)] = boxes, True
    batch = AssignmentBatch.build(torch.zeros(len(images), M, 1), box, mask, W, neighbours=neighbours)
    assert batch.near is not None
    assert batch.near_mask is not None
    assert batch.near_attr is not None
    for b, boxes in enumerate(images):
        edges = [
            (int(batch.near[b, i, s]), i)
            for i in range(M)
            for s in range(batch.near.shape[2])
            if bool(batch.near_mask[b, i, s])
        ]
        assert edges == brute_force(boxes, neighbours)
        for j, i in edges:
            slot = batch.near[b, i].tolist().index(j)
            assert torch.equal(batch.near_attr[b, i, slot], torch.cat([boxes[j], boxes[i]]))


def test_identical_boxes_go_by_number() -> None:
    edges = nearest_neighbours(torch.full((4, 4), 0.5), 2)
    assert edges.tolist() == [[1, 2, 0, 2, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2, 3, 3]]


def test_one_instance_has_no_neighbour() -> None:
    assert nearest_neighbours(torch.rand(1, 4), 5).shape == (2, 0)


def test_label_relations() -> None:
    complete = label_relations(W, None)
    assert sorted(map(tuple, complete.t().tolist())) == [(j, i) for j in range(4) for i in range(4) if i != j]
    assert complete[1].tolist() == sorted(complete[1].tolist())
    assert torch.equal(label_relations(W, 3), complete)
    assert torch.equal(label_relations(W, 99), complete)
    assert label_relations(W[:1], None).shape == (2, 0)
    similarity = torch.nn.functional.cosine_similarity(W[:, None], W[None], dim=2)
    for k in (1, 2):
        source, target = label_relations(W, k)
        for i in range(4):
            expected = sorted((j for j in range(4) if j != i), key=lambda j: -float(similarity[i, j]))[:k]
            assert source[target == i].tolist() == expected


def test_the_graph_of_equations_1_to_3() -> None:
    data = instances(3)
    x, box = data[INSTANCE].x, data[INSTANCE].box
    graph = AssignmentGraph(W, neighbours=1, edge_attr=True)(data)
    assert torch.equal(graph[LABEL].x, W)
    ends = {NEAR: (box, box), RELATES: (W, W), MATCHES: (x, W)}
    for edge_type, (source, target) in ends.items():
        edge_index, attr = graph[edge_type].edge_index, graph[edge_type].edge_attr
        for e, (j, i) in enumerate(edge_index.t().tolist()):
            assert torch.equal(attr[e], torch.cat([source[j], target[i]]))
    assert graph[MATCHES].edge_index.t().tolist() == [[i, c] for i in range(3) for c in range(4)]
    assert graph[NEAR].edge_index.shape == (2, 3)
    assert graph[RELATES].edge_index.shape == (2, 12)
    graph.validate()


def test_m_keeps_the_most_confident() -> None:
    graph = AssignmentGraph(W, m=2)(instances(5))
    assert graph[INSTANCE].detected_label.tolist() == [0, 1]
    assert all(len(graph[INSTANCE][name]) == 2 for name in ("x", "box", "score"))
    assert graph[MATCHES].edge_index.shape == (2, 8)
    assert graph[NEAR].edge_index.shape == (2, 2)
    assert AssignmentGraph(W, m=9)(instances(5))[INSTANCE].x.shape[0] == 5


def test_the_input_is_left_as_it_was() -> None:
    data = instances(5)
    before = copy.deepcopy(data.to_dict())
    AssignmentGraph(W, m=2)(data)
    after = data.to_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[INSTANCE][name], value) for name, value in before[INSTANCE].items())


def test_ablations_leave_edge_types_out() -> None:
    assert AssignmentGraph(W, label_graph=False)(instances(3)).edge_types == [NEAR, MATCHES]
    assert AssignmentGraph(W, instance_graph=False)(instances(3)).edge_types == [RELATES, MATCHES]


def test_works_in_a_pipeline() -> None:
    graph = Compose([AssignmentGraph(W), ToDevice("cpu")])(instances(3))
    assert graph[MATCHES].edge_index.shape == (2, 12)
    assert "edge_attr" not in graph[MATCHES]
    assert repr(AssignmentGraph(W, m=2)) == "AssignmentGraph(C=4, m=2, neighbours=5, label_neighbours=None)"


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (torch.zeros(4), {}, r"\(C, D_l\)"),
        (torch.zeros(0, 3), {}, "C >= 1"),
        (torch.tensor([[1.0], [float("nan")], [float("inf")]]), {}, r"labels \[1, 2\]"),
        (W.numpy(), {}, r"\(C, D_l\)"),
        (W, {"m": 0}, "graph.m must be a whole number of 1 or more, got 0"),
        (W, {"m": 2.5}, "graph.m .* got 2.5"),
        (W, {"m": -3}, "graph.m"),
        (W, {"neighbours": 0}, "graph.neighbours"),
        (W, {"neighbours": None}, "graph.neighbours .* got None"),
        (W, {"label_neighbours": 0}, "graph.label_neighbours"),
    ],
)
def test_errors(vectors: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AssignmentGraph(vectors, **options)


def test_an_image_without_instances() -> None:
    with pytest.raises(ConfigError, match="without instances"):
        AssignmentGraph(W)(instances(0))


@pytest.mark.parametrize("name", ["x", "box"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(name: str, value: float) -> None:
    data = instances(3)
    data[INSTANCE][name][1, 0] = value
    with pytest.raises(ConfigError, match=rf"data\['instance'\]\.{name} holds NaN or infinite"):
        AssignmentGraph(W)(data)


@pytest.mark.parametrize("name", ["x", "box"])
def test_an_instance_store_that_lacks_something(name: str) -> None:
    data = instances(3)
    del data[INSTANCE][name]
    with pytest.raises(ConfigError, match=rf"needs data\['instance'\]\.{name}"):
        AssignmentGraph(W)(data)


@pytest.mark.parametrize("relates", [None, torch.tensor([[1], [0], [0]])])
def test_a_split_batch_has_the_same_images(relates: Tensor | None) -> None:
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True], [True, False]])
    batch = AssignmentBatch.build(
        torch.randn(5, 2, 4), torch.rand(5, 2, 4), mask, torch.randn(3, 6), relates=relates, row=torch.arange(5)
    )
    parts = batch.split(2)
    assert [part.num_graphs for part in parts] == [2, 2, 1]
    for name in ("x", "box", "mask", "near", "near_mask", "near_attr", "row"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    for part in parts:
        assert part.label_vectors is batch.label_vectors
        assert part.relates is batch.relates
        assert part.y is None
