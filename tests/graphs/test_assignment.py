from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.data import Batch, HeteroData
from torch_geometric.transforms import Compose, ToDevice

from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ConfigError
from gm_mlic.graphs import (
    INSTANCE,
    LABEL,
    MATCHES,
    SEMANTIC,
    SPATIAL,
    AssignmentBatch,
    AssignmentGraph,
    collate_instances,
    knn_edge_index,
    label_edge_index,
    label_neighbors,
    to_hetero_data,
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
    data[INSTANCE].box = torch.rand(M, 4, generator=generator).sort(dim=1).values
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
        (W.numpy(), {}, r"\(C, D_l\) with C >= 1, got ndarray \(4, 2\)\.$"),
        (W, {"m": 0}, "^m must be an integer of at least 1, or None; got 0"),
        (W, {"m": 2.5}, "^m .* got 2.5"),
        (W, {"m": True}, "^m .* got True"),
        (W, {"edge_types": None}, "^edge_types must be names among"),
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
    with pytest.raises(ConfigError, match="has no instances: pass at least one"):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, box: (x, 100 * box), "divided by image width and height"),
        (lambda x, box: (x, box.flip(1)), "with x1 <= x2 and y1 <= y2"),
        (lambda x, box: (x[0], box), r"must be \(M, D_o\) and .box \(M, 4\), got \(3,\) and \(3, 4\)"),
        (lambda x, box: (x, box[:2]), r"got \(3, 3\) and \(2, 4\)"),
    ],
)
def test_invalid_instances(change: Any, message: str) -> None:
    data = instances(3)
    data[INSTANCE].x, data[INSTANCE].box = change(data[INSTANCE].x, data[INSTANCE].box)
    with pytest.raises(ConfigError, match=message):
        AssignmentGraph(W)(data)


def test_m_of_numpy() -> None:
    assert AssignmentGraph(W, m=np.int64(3)).m == 3


# Instances of several images


def found(M: int, seed: int = 0) -> Instances:
    generator = torch.Generator().manual_seed(seed)
    boxes, features = torch.rand(M, 4, generator=generator).sort(dim=1).values, torch.randn(M, 3, generator=generator)
    return Instances(boxes, torch.linspace(0.9, 0.1, M), torch.zeros(M, dtype=torch.int64), features)


def test_collated_instances_are_at_most_m() -> None:
    few, one = found(2), found(5, 1)
    graph = AssignmentGraph(W, m=3)
    batch = collate_instances([few, one], graph)
    expected = AssignmentBatch.collate([graph(to_hetero_data(image)) for image in (few, one)])
    for name in ("x", "box", "mask", "score"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    assert batch.edge_index_dict[SPATIAL].index.shape == (2, 3, 2)


def test_collated_instances_are_checked() -> None:
    graph, bad = AssignmentGraph(W), found(2)
    bad.features[1, 0] = float("nan")
    with pytest.raises(ConfigError, match="x holds NaN or infinite"):
        collate_instances([found(3), bad], graph)
    for images in ([], [found(2), found(0)]):
        with pytest.raises(ConfigError, match="at least one image, and each image an instance"):
            collate_instances(images, graph)
    with pytest.raises(ConfigError, match="at least one graph"):
        AssignmentBatch.collate([])


def test_padded_label_vectors_and_boxes_get_the_dtype_of_the_features() -> None:
    graph, images = AssignmentGraph(W.double()), [found(3), found(2, 1)]
    batch = collate_instances(images, graph)
    assert batch.label_vectors.dtype == batch.edge_attr_dict[SPATIAL].dtype == torch.float32
    x = batch.x.to(torch.bfloat16)
    half = AssignmentBatch.from_padded(x, batch.box, batch.mask, W.double())
    assert half.label_vectors.dtype == half.edge_attr_dict[SPATIAL].dtype == torch.bfloat16


def test_unknown_edge_types_of_padded_instances() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="edge_types must be names among"):
        AssignmentBatch.from_padded(torch.randn(1, 2, 4), torch.rand(1, 2, 4), mask, W, edge_types=["near"])


@pytest.mark.parametrize("targets", [False, True])
def test_images_with_different_numbers_of_labels(targets: bool) -> None:
    """There is no layout for them, so PyG's loader is not the advice."""
    graphs = [AssignmentGraph(W)(instances(2)), AssignmentGraph(W[:3])(instances(2))]
    for graph in graphs:
        if targets:
            graph.y = torch.ones(1, len(graph[LABEL].x))
    with pytest.raises(
        ConfigError, match=r"^All images of a batch must have the same number of labels, got \[4, 3\]\.$"
    ):
        AssignmentBatch.collate(graphs)
    if not targets:
        with pytest.raises(ConfigError, match=r"the same number of labels, got \[4, 3\]\.$"):
            AssignmentBatch.from_hetero_data(joined(*graphs))


def test_conversion_as_in_torch() -> None:
    batch = collate_instances([found(3)], AssignmentGraph(W))
    for converted in (
        batch.to("cpu", torch.float64),
        batch.to(device="cpu", dtype=torch.float64),
        batch.to(torch.zeros(1, dtype=torch.float64)),
        batch.cpu().to(torch.float64, non_blocking=True),
    ):
        assert converted.x.dtype == converted.edge_attr_dict[SPATIAL].dtype == torch.float64
        assert converted.detected_label.dtype == converted.edge_index_dict[SPATIAL].index.dtype == torch.int64
        assert converted.mask.dtype == torch.bool
    assert batch.to(device="meta").edge_index_dict[SPATIAL].mask.device.type == "meta"
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
            batch.cuda()


def test_short_repr() -> None:
    text = repr(collate_instances([found(3)], AssignmentGraph(W)))
    assert text.startswith(
        "AssignmentBatch(x=[1, 3, 3], box=[1, 3, 4], mask=[1, 3], label_vectors=[4, 2], edge_index_dict="
    )
    assert "NeighborLists(index=[1, 3, 2], mask=[1, 3, 2])" in text
    assert "views=1" in text
    assert "tensor" not in text
    assert "None" not in text
    assert len(text) < 500
