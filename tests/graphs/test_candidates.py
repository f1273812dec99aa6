"""Matching edges restricted to candidate labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs import MATCHES, AssignmentBatch, AssignmentGraph, Bipartite, candidate_edges, label_candidates
from gm_mlic.nn import MILMax


def test_candidates_are_labels_with_high_lift() -> None:
    # class 0 co-occurs with labels 0 and 1, class 1 with label 2; label 3 is in all images
    detected = torch.tensor([[0, -1], [0, -1], [1, -1], [1, -1]] * 5)
    score = torch.tensor([[0.9, 0.9]] * 20)
    present = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]] * 5).bool()
    assert label_candidates(detected, score, present, 2).tolist() == [
        [True, True, False, False],
        [False, False, True, True],
    ]


def test_detections_are_weighted_by_confidence() -> None:
    detected = torch.tensor([[0], [0], [1]])
    score = torch.tensor([[0.9], [0.1], [0.9]])
    present = torch.tensor([[1, 0], [0, 1], [0, 1]]).bool()
    assert label_candidates(detected, score, present, 1)[0].tolist() == [True, False]


def test_label_with_the_class_name_is_always_a_candidate() -> None:
    """A label in nearly all images has a low lift, and would not be a candidate of any class."""
    detected = torch.tensor([[0], [0], [0], [0], [1]])
    score = torch.tensor([[0.9], [0.9], [0.9], [1.0], [0.9]])
    present = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    without = label_candidates(detected, score, present, 1)
    assert without.tolist() == [[False, True, False], [False, False, True]]
    own = torch.tensor([0, -1, 1])
    table = label_candidates(detected, score, present, 1, own)
    assert table.tolist() == [
        [True, False, False],
        [False, False, True],
        [True, True, True],
    ]  # the last class is never detected
    assert label_candidates(detected, score, present, 2, own)[0].tolist() == [True, True, False]


def test_candidates_require_detected_classes() -> None:
    with pytest.raises(ConfigError, match="no instance has one"):
        label_candidates(torch.tensor([[-1]]), torch.ones(1, 1), torch.ones(1, 2).bool(), 1)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_edges_connect_candidates_and_every_label_has_an_edge(B: int, M: int, C: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(3, C, generator=generator) < 0.4
    detected = torch.randint(-1, 3, (B, M), generator=generator)
    counts = torch.randint(1, M + 1, (B,), generator=generator)
    mask = torch.arange(M) < counts[:, None]
    there = candidate_edges(table, detected, mask)
    for b in range(B):
        for i in range(M):
            for c in range(C):
                may = bool(mask[b, i]) and (int(detected[b, i]) < 0 or bool(table[detected[b, i], c]))
                others = any(int(detected[b, j]) < 0 or bool(table[detected[b, j], c]) for j in range(int(counts[b])))
                assert bool(there[b, i, c]) == (may or (not others and i == int(counts[b]) - 1))


def test_graph_and_batch_have_the_same_edges() -> None:
    table = torch.tensor([[True, False, False], [False, True, True]])
    W = torch.randn(3, 4)
    data = HeteroData()
    data["instance"].x, data["instance"].box = torch.randn(2, 5), torch.rand(2, 4).sort().values
    data["instance"].detected_label = torch.tensor([1, 0])
    graph = AssignmentGraph(W, candidates=table)(data)
    edges = graph["instance", "matches", "label"].edge_index
    assert edges.tolist() == [[0, 0, 1], [1, 2, 0]]
    mask = torch.ones(1, 2, dtype=torch.bool)
    x, box, detected = (data["instance"][name][None] for name in ("x", "box", "detected_label"))
    batch = AssignmentBatch.from_padded(x, box, mask, W, detected_label=detected, candidates=table)
    assert batch.match_mask[0].nonzero().t().tolist() == edges.tolist()


def test_invalid_candidates() -> None:
    W, data = torch.randn(3, 4), HeteroData()
    data["instance"].x, data["instance"].box = torch.randn(1, 5), torch.rand(1, 4).sort().values
    with pytest.raises(ConfigError, match="candidates must be"):
        AssignmentGraph(W, candidates=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="detected_label"):
        AssignmentGraph(W, candidates=torch.ones(2, 3, dtype=torch.bool))(data)
    data["instance"].detected_label = torch.tensor([2])
    with pytest.raises(ConfigError, match="class 2"):
        AssignmentGraph(W, candidates=torch.ones(2, 3, dtype=torch.bool))(data)


def test_max_pooling_reads_edges_only() -> None:
    table = torch.tensor([[True, False, True], [False, True, True]])
    W, x, box = torch.randn(3, 4), torch.randn(1, 2, 5), torch.rand(1, 2, 4)
    mask, detected = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0, 1]])
    net = MILMax(5, 3, width=8)
    batch = AssignmentBatch.from_padded(x, box, mask, W, detected_label=detected, candidates=table)
    everything = net(AssignmentBatch.from_padded(x, box, mask, W)).match_logits
    output = net(batch)
    assert output.argmax_instance[0, :2].tolist() == [0, 1]
    torch.testing.assert_close(output.logits[0, :2], everything[0].diagonal())
    torch.testing.assert_close(output.match_logits[0, table], everything[0, table])


def test_label_without_matching_edge_is_refused_in_a_dense_batch() -> None:
    matches = torch.tensor([[[True, False, True], [True, False, False]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    batch = AssignmentBatch(
        torch.randn(1, 2, 5), torch.rand(1, 2, 4), mask, torch.randn(3, 4), {MATCHES: Bipartite(matches)}
    )
    with pytest.raises(ConfigError, match=r"Label nodes \[1\] have no matching edge"):
        MILMax(5, 3, width=8)(batch)
