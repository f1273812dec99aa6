"""Whole-image baselines compared with loops over their papers' formulas, and properties of all models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch_geometric.data import Batch, HeteroData

from gm_mlic import create_model
from gm_mlic.errors import ConfigError
from gm_mlic.graphs import MATCHES, AssignmentBatch, AssignmentGraph
from gm_mlic.nn import (
    ADDGCN,
    CMA,
    MLGCN,
    SRN,
    SSGRL,
    TDRG,
    TSGCN,
    CTran,
    GAPLinear,
    MLDecoder,
    ModelOutput,
    Query2Label,
)
from gm_mlic.nn.baselines import LabelStatistics
from gm_mlic.nn.baselines._common import conditional_probabilities, from_map, to_map
from gm_mlic.nn.baselines.c_tran import random_known
from gm_mlic.nn.baselines.cma import similarity_loss
from gm_mlic.nn.baselines.ml_gcn import reweighted_adjacency
from gm_mlic.nn.baselines.query2label import position_encoding
from gm_mlic.nn.baselines.ssgrl import GGNNStep
from gm_mlic.nn.baselines.tdrg import cross_scale
from gm_mlic.nn.baselines.tsgcn import spatial_adjacency

D_O, D_L, C = 8, 5, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "gap_linear": {"num_labels": C},
    "ml_gcn": {"num_labels": C, "label_dim": D_L, "width": 16},
    "ssgrl": {"num_labels": C, "label_dim": D_L, "width": 12, "steps": 2},
    "query2label": {"num_labels": C, "heads": 2, "dropout": 0.0},
    "add_gcn": {"num_labels": C, "width": 12},
    "ml_decoder": {"num_labels": C, "width": 12, "groups": 2, "heads": 2, "hidden": 16, "dropout": 0.0},
    "c_tran": {"num_labels": C, "layers": 2, "heads": 2, "dropout": 0.0},
    "srn": {"num_labels": C, "width": 8, "map_size": 3},
    "tdrg": {"num_labels": C, "width": 12, "layers": 1, "heads": 2, "hidden": 16, "map_size": 3},
    "cma": {"num_labels": C, "width": 12},
    "tsgcn": {"num_labels": C, "label_dim": D_L, "width": 12},
}
#: Length of the label states of models that have some.
STATES = {
    "ssgrl": D_O,
    "query2label": D_O,
    "add_gcn": 12,
    "ml_decoder": 12,
    "c_tran": D_O,
    "tdrg": 24,
    "cma": 12,
    "tsgcn": D_O,
}
#: Models whose match logits are attention that sums to 1 over the locations.
ATTENTION = {"ssgrl", "query2label", "ml_decoder", "tsgcn"}
TARGETS = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 0, 1]])
every_model = pytest.mark.parametrize("name", SETTINGS)


def model(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    made = create_model(name, **{"instance_dim": D_O, **SETTINGS[name], **changes})
    if isinstance(made, LabelStatistics):
        made.fit(TARGETS)
    return made.double()


def batch(counts: tuple[int, ...] = (9, 9, 9), seed: int = 0, instance_dim: int = D_O) -> AssignmentBatch:
    generator = torch.Generator().manual_seed(seed)
    M = max(counts)
    corner, size = torch.rand(2, len(counts), M, 2, generator=generator, dtype=torch.float64) / 2
    return AssignmentBatch.from_padded(
        x=torch.randn(len(counts), M, instance_dim, generator=generator, dtype=torch.float64),
        box=torch.cat([corner, corner + size], dim=-1),
        mask=torch.arange(M) < torch.tensor(counts)[:, None],
        label_vectors=torch.randn(C, D_L, generator=torch.Generator().manual_seed(9), dtype=torch.float64),
        edge_types=[],
    )


def graphs(dense: AssignmentBatch) -> list[HeteroData]:
    made = []
    for x, box, mask in zip(dense.x, dense.box, dense.mask, strict=True):
        data = HeteroData()
        data["instance"].x, data["instance"].box = x[mask], box[mask]
        made.append(AssignmentGraph(dense.label_vectors, edge_types=[])(data))
    return made


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# Properties of all models


@every_model
def test_shapes(name: str) -> None:
    data = batch((9, 4, 6))
    output: ModelOutput = model(name)(data)
    assert output.logits.shape == output.argmax_instance.shape == (3, C)
    assert output.match_logits.shape == (3, 9, C)
    assert output.argmax_instance.dtype == torch.int64
    for b, count in enumerate((9, 4, 6)):
        assert torch.equal(output.argmax_instance[b], output.match_logits[b, :count].argmax(dim=0))
    states = None if output.label_states is None else output.label_states.shape
    assert states == ((3, C, STATES[name]) if name in STATES else None)
    if name in ATTENTION:
        close(output.match_logits.masked_fill(~data.mask[..., None], 0).sum(dim=1), torch.ones(3, C).double())


@every_model
def test_gradients_reach_every_parameter(name: str) -> None:
    net, data = model(name), replace(batch((9, 4, 6)), y=TARGETS[:3])
    net(data).logits.sin().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@every_model
def test_padding_does_not_change_outputs(name: str) -> None:
    net, data = model(name), batch((9, 4, 6))
    together = net(data)
    wider = AssignmentBatch(
        x=nn.functional.pad(data.x, (0, 0, 0, 5), value=7.0),
        box=nn.functional.pad(data.box, (0, 0, 0, 5), value=0.3),
        mask=nn.functional.pad(data.mask, (0, 5)),
        label_vectors=data.label_vectors,
    )
    close(net(wider).logits, together.logits)
    assert torch.equal(net(wider).argmax_instance, together.argmax_instance)
    for b, alone in enumerate(graphs(data)):
        close(net(alone).logits[0], together.logits[b])
        assert torch.equal(net(alone).argmax_instance[0], together.argmax_instance[b])


@every_model
def test_image_order_equivariance(name: str) -> None:
    net, made = model(name), graphs(batch((9, 4, 6)))
    forth, back = (net(Batch.from_data_list(order)) for order in (made, made[::-1]))
    close(forth.logits, back.logits.flip(0))
    assert torch.equal(forth.argmax_instance, back.argmax_instance.flip(0))


@every_model
def test_overfits_16_images(name: str) -> None:
    wide = 24  # a linear model fits 16 images
    net, data = model(name, instance_dim=wide).float(), batch((4,) * 16, instance_dim=wide).to(torch.float32)
    y = torch.randint(2, (16, C), generator=torch.Generator().manual_seed(1)).float()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0)
    for _ in range(250):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(net(data).logits, y)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05


@every_model
def test_save_and_load(name: str, tmp_path: Path) -> None:
    net, data = model(name).eval(), batch((9, 4))
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(4)
    other = create_model(name, instance_dim=D_O, **SETTINGS[name]).double().eval()
    assert not torch.equal(other(data).logits, net(data).logits)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(data).logits, net(data).logits)


@every_model
def test_compiled_in_one_graph(name: str) -> None:
    net, data = model(name).eval(), batch((9, 4))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    close(compiled(data).logits, net(data).logits)
    close(compiled(data).match_logits, net(data).match_logits)


@pytest.mark.parametrize("name", ["c_tran", "tdrg"])
def test_exported_with_any_number_of_images_and_locations(name: str) -> None:
    net, label_vectors = model(name).eval(), batch().label_vectors

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, box: Tensor, mask: Tensor) -> Tensor:
            logits: Tensor = self.net(AssignmentBatch(x, box, mask, label_vectors)).logits
            return logits

    def inputs(counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        data = batch(counts)
        return data.x, data.box, data.mask

    shapes = ({0: Dim("images"), 1: Dim("locations")},) * 3
    program = torch.export.export(Logits(), inputs((9, 4, 6)), dynamic_shapes=shapes)
    for counts in ((5,), (12, 3, 7, 7)):
        close(program.module()(*inputs(counts)), Logits()(*inputs(counts)))


@every_model
def test_autocast_does_not_round_logits(name: str) -> None:
    net, data = model(name).float(), batch()
    data = AssignmentBatch(data.x.float(), data.box.float(), data.mask, data.label_vectors.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(data).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    torch.testing.assert_close(logits, net(data).logits, atol=0.1, rtol=0.1)


@every_model
def test_reset_parameters_resets_every_parameter(name: str) -> None:
    net = model(name)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7.0)
    net.reset_parameters()  # type: ignore[operator]
    assert [key for key, p in net.named_parameters() if bool((p == 7.0).any())] == []


@every_model
def test_mismatching_inputs(name: str) -> None:
    net, data = model(name), batch()
    fewer = AssignmentBatch(data.x, data.box, data.mask, data.label_vectors[:3])
    with pytest.raises(ConfigError, match="3 labels, the model 4"):
        net(fewer)
    with pytest.raises(ConfigError, match="instance features have length 7"):
        net(AssignmentBatch(data.x[..., :7], data.box, data.mask, data.label_vectors))
    odd = graphs(data)[0]
    odd[MATCHES].edge_index = odd[MATCHES].edge_index[:, 1:]
    with pytest.raises(ConfigError, match="complete matching edges"):
        net(odd)


def test_repr() -> None:
    assert [repr(model(name)) for name in SETTINGS] == [
        "GAPLinear(8, 4)",
        "MLGCN(8, 5, 4, width=16)",
        "SSGRL(8, 5, 4, width=12, steps=2)",
        "Query2Label(8, 4, width=8, layers=2)",
        "ADDGCN(8, 4, width=12)",
        "MLDecoder(8, 4, width=12, groups=2)",
        "CTran(8, 4, width=8, layers=2)",
        "SRN(8, 4, width=8, map_size=3)",
        "TDRG(8, 4, width=12, layers=1, map_size=3)",
        "CMA(8, 4, width=12)",
        "TSGCN(8, 5, 4, width=12)",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GAPLinear(0, 3), "1 or more"),
        (lambda: MLGCN(4, 4, 3, width=0), "^width must be 1"),
        (lambda: MLGCN(4, 4, 3, tau=1.5), r"^tau must be in \[0, 1\]"),
        (lambda: MLGCN(4, 4, 3, p=1.0), r"^p must be in \[0, 1\)"),
        (lambda: SSGRL(4, 4, 3, steps=0), "^steps"),
        (lambda: Query2Label(4, 3, layers=0), "^layers"),
        (lambda: Query2Label(6, 3, heads=2), "^width must be a multiple of 4 and of heads=2, got 6"),
        (lambda: Query2Label(8, 3, heads=3), "of heads=3"),
        (lambda: Query2Label(8, 3, dropout=1.0), "^dropout"),
        (lambda: ADDGCN(4, 3, width=0), "^width must be 1"),
        (lambda: MLDecoder(4, 3, groups=0), "^groups"),
        (lambda: MLDecoder(4, 3, width=9), "^width must be a multiple of heads=8, got 9"),
        (lambda: MLDecoder(8, 3, dropout=1.0), "^dropout"),
        (lambda: CTran(6, 3), "^width must be a multiple of heads=4, got 6"),
        (lambda: CTran(8, 3, layers=0), "^layers"),
        (lambda: CTran(8, 3, unknown=1.5), "^unknown"),
        (lambda: CTran(8, 3, dropout=1.0), "^dropout"),
        (lambda: SRN(8, 3, map_size=0), "^map_size"),
        (lambda: TDRG(8, 3, width=9), "^width must be a multiple of heads=4, got 9"),
        (lambda: TDRG(8, 3, map_size=2), "^map_size must be 3 or more"),
        (lambda: TDRG(8, 3, dropout=1.0), "^dropout"),
        (lambda: CMA(8, 3, width=0), "^width"),
        (lambda: CMA(8, 3, threshold=2.0), "^threshold"),
        (lambda: TSGCN(8, 3, 3, width=0), "^width"),
        (lambda: TSGCN(8, 3, 3, radius=0.0), "^radius"),
    ],
)
def test_invalid_arguments(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# Maps


def grid_boxes(size: int) -> Tensor:
    """(G^2, 4), the cells of a grid by row and column."""
    cells = [(j, i, j + 1, i + 1) for i in range(size) for j in range(size)]
    return torch.tensor(cells, dtype=torch.float64) / size


def test_map_of_a_grid_is_the_grid() -> None:
    x, mask = torch.randn(2, 9, 5).double(), torch.ones(2, 9, dtype=torch.bool)
    box = grid_boxes(3).expand(2, -1, -1)
    expected = torch.stack([x[:, 3 * i + j] for i in range(3) for j in range(3)], dim=2).view(2, 5, 3, 3)
    assert torch.equal(to_map(x, box, mask, 3), expected)
    assert torch.equal(from_map(expected, box), x)
    order = torch.randperm(9)
    assert torch.equal(to_map(x[:, order], box[:, order], mask, 3), expected)
    assert torch.equal(from_map(expected, box[:, order]), x[:, order])
    # twice as many cells: each location is repeated
    assert torch.equal(to_map(x, box, mask, 6), expected.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


def test_map_of_boxes_is_the_nearest_center() -> None:
    data = batch((9, 4))
    found = to_map(data.x, data.box, data.mask, 4)
    for b, count in enumerate((9, 4)):
        centers = (data.box[b, :count, :2] + data.box[b, :count, 2:]) / 2
        for i in range(4):
            for j in range(4):
                cell = torch.tensor([(j + 0.5) / 4, (i + 0.5) / 4]).double()
                nearest = min(range(count), key=lambda k: float((centers[k] - cell).norm()))
                assert torch.equal(found[b, :, i, j], data.x[b, nearest])


# Co-occurrences


def test_cooccurrence_probabilities() -> None:
    """Label 0 is in images 0, 1, 3; label 1 in 0, 2, 3; both in 0 and 3; and so on."""
    expected = [[0, 2 / 3, 1 / 3, 1 / 3], [2 / 3, 0, 1 / 3, 2 / 3], [1 / 2, 1 / 2, 0, 1 / 2], [1 / 2, 1, 1 / 2, 0]]
    torch.testing.assert_close(conditional_probabilities(TARGETS, C), torch.tensor(expected))


def test_difficult_labels_are_not_counted() -> None:
    """A difficult pair counts neither as present nor as absent."""
    difficult = torch.zeros_like(TARGETS, dtype=torch.bool)
    difficult[1, 1] = True  # image 1 has label 0; label 1 is difficult
    P = conditional_probabilities(TARGETS, C, difficult)
    assert float(P[0, 1]) == 1.0  # 2 of 2
    assert float(P[2, 1]) == 1.0  # 1 of 1
    torch.testing.assert_close(P[1], conditional_probabilities(TARGETS, C)[1])
    difficult[:, 3] = True
    assert conditional_probabilities(TARGETS, C, difficult)[3].tolist() == [0] * C
    assert conditional_probabilities(TARGETS, C, difficult)[:, 3].tolist() == [0] * C
    with pytest.raises(ConfigError, match=r"shape \(4, 4\), the model has 5 labels"):
        conditional_probabilities(TARGETS, 5)


@pytest.mark.parametrize("name", ["ml_gcn", "ssgrl", "tsgcn"])
def test_counts_are_part_of_the_weights(name: str) -> None:
    counted, fresh = model(name), create_model(name, instance_dim=D_O, **SETTINGS[name]).double()
    assert not torch.equal(fresh.adjacency, counted.adjacency)
    fresh.load_state_dict(counted.state_dict())
    close(fresh(batch()).logits, counted(batch()).logits)
    counted.fit(torch.zeros_like(TARGETS))
    before = create_model(name, instance_dim=D_O, **SETTINGS[name]).double()
    torch.testing.assert_close(counted.adjacency, before.adjacency)  # only difficult labels: no counts


# ML-GCN


def test_reweighted_adjacency_against_a_loop() -> None:
    P = conditional_probabilities(TARGETS, C).double().numpy()
    tau, p = 0.4, 0.2
    A = np.zeros((C, C))
    for i in range(C):
        neighbors = [j for j in range(C) if j != i and P[i, j] >= tau]
        for j in neighbors:
            A[i, j] = p / len(neighbors)
        A[i, i] = 1 - p
    degree = [sum(A[i, j] for j in range(C)) for i in range(C)]
    expected = np.array([[A[i, j] / math.sqrt(degree[i] * degree[j]) for j in range(C)] for i in range(C)])
    ours = reweighted_adjacency(torch.from_numpy(P), tau, p)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)
    # Label 0 has one neighbor, label 1; label 3 has all three.
    np.testing.assert_allclose(ours[0], [0.8, 0.2, 0, 0], atol=1e-12)
    np.testing.assert_allclose(ours[3], [0.2 / 3, 0.2 / 3, 0.2 / 3, 0.8], atol=1e-12)


def test_isolated_label_keeps_its_self_loop() -> None:
    ours = reweighted_adjacency(torch.tensor([[0.0, 0.9, 0.1], [0.5, 0.0, 0.1], [0.0, 0.3, 0.0]]).double())
    np.testing.assert_allclose(ours, [[0.8, 0.2, 0], [0.2, 0.8, 0], [0, 0, 1]], atol=1e-12)


def test_ml_gcn_against_a_loop() -> None:
    net, data = model("ml_gcn"), batch((9, 4))
    A, Z = net.adjacency, data.label_vectors
    hidden = torch.stack([sum(A[i, j] * (Z[j] @ net.conv1.weight) for j in range(C)) for i in range(C)])
    hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
    W = torch.stack([sum(A[i, j] * (hidden[j] @ net.conv2.weight) for j in range(C)) for i in range(C)])
    output = net(data)
    for b, count in enumerate((9, 4)):
        close(output.logits[b], W @ data.x[b, :count].max(dim=0).values)
        close(output.match_logits[b, :count], data.x[b, :count] @ W.T)


def test_gap_linear_classifies_the_mean() -> None:
    net, data = model("gap_linear"), batch((9, 4))
    for b, count in enumerate((9, 4)):
        close(net(data).logits[b], net.classifier(data.x[b, :count].mean(dim=0)))


# SSGRL


def test_semantic_decoupling_against_a_loop() -> None:
    net, data = model("ssgrl").decoupling, batch((9, 4))
    found, attention = net(data.x, data.mask, data.label_vectors)
    for b, count in enumerate((9, 4)):
        for c in range(C):
            met = [torch.tanh(net.U(data.x[b, i]) * net.V(data.label_vectors[c])) for i in range(count)]
            weights = torch.cat([net.p(x) for x in met]).exp()
            weights = weights / weights.sum()
            close(attention[b, :count, c], weights)
            close(found[b, c], sum(w * x for w, x in zip(weights, data.x[b, :count], strict=True)))
        assert bool((attention[b, count:] == 0).all())


def test_graph_step_against_a_loop() -> None:
    torch.manual_seed(0)
    d = 3
    conv = GGNNStep(d).double()
    with torch.no_grad():
        conv.gates.bias.normal_()
        conv.candidate.bias.normal_()
    h, A = torch.randn(2, C, d).double(), torch.rand(C, C).double()
    ours = conv(h, A)
    W, b = conv.gates.weight, conv.gates.bias
    for image in range(2):
        for c in range(C):
            out_of = sum(A[c, k] * h[image, k] for k in range(C))
            into = sum(A[k, c] * h[image, k] for k in range(C))
            own = h[image, c]
            gates = 1 / (1 + torch.exp(-(W @ torch.cat([out_of, into, own]) + b)))
            z, r = gates[:d], gates[d:]
            new = torch.tanh(conv.candidate.weight @ torch.cat([out_of, into, r * own]) + conv.candidate.bias)
            close(ours[image, c], (1 - z) * own + z * new)


def test_ssgrl_equals_its_parts() -> None:
    net, data = model("ssgrl"), batch()
    first, _ = net.decoupling(data.x, data.mask, data.label_vectors)
    last = net.conv(net.conv(first, net.adjacency), net.adjacency)
    o = torch.tanh(net.out(torch.cat([last, first], dim=-1)))
    expected = torch.stack([o[:, c] @ net.classifiers.weight[c] + net.classifiers.bias[c] for c in range(C)], dim=1)
    close(net(data).logits, expected)
    close(net(data).label_states, last)


# Query2Label


def test_position_encoding() -> None:
    box = torch.tensor([[0.0, 0.5, 0.5, 1.0]]).double()  # center (0.25, 0.75)
    slow = 2 * math.pi / 100
    expected = [
        *(math.sin(1.5 * math.pi), math.cos(1.5 * math.pi), math.sin(0.75 * slow), math.cos(0.75 * slow)),
        *(math.sin(0.5 * math.pi), math.cos(0.5 * math.pi), math.sin(0.25 * slow), math.cos(0.25 * slow)),
    ]
    close(position_encoding(box, 8), torch.tensor([expected], dtype=torch.float64))


def test_decoder_layer_without_positions_equals_torch() -> None:
    """With zero positions the layer equals torch's, which also checks the sign of the mask."""
    ours = model("query2label").layers[0]
    theirs = nn.TransformerDecoderLayer(D_O, 2, 4 * D_O, dropout=0.0, batch_first=True).double()
    theirs.self_attn.load_state_dict(ours.self_attention.state_dict())
    theirs.multihead_attn.load_state_dict(ours.cross_attention.state_dict())
    for lin, mine in ((theirs.linear1, ours.mlp.lin1.lins[0]), (theirs.linear2, ours.mlp.lin2)):
        lin.load_state_dict(mine.state_dict())
    data, Q = batch((9, 4)), torch.randn(2, C, D_O).double()
    found, attention = ours(Q, data.x, torch.zeros_like(data.x), data.mask)
    close(found, theirs(Q, data.x, memory_key_padding_mask=~data.mask))
    assert bool((attention[1, 4:] == 0).all())


def test_query2label_uses_positions() -> None:
    net, data = model("query2label"), batch()
    moved = AssignmentBatch(data.x, data.box.flip(-1) / 2, data.mask, data.label_vectors)
    assert not torch.allclose(net(moved).logits, net(data).logits)
    other_words = AssignmentBatch(data.x, data.box, data.mask, -data.label_vectors)
    close(net(other_words).logits, net(data).logits)


def test_dropout_is_disabled_in_evaluation() -> None:
    net = model("query2label", dropout=0.5)
    net.train()
    assert not torch.equal(net(batch()).logits, net(batch()).logits)
    net.eval()
    assert torch.equal(net(batch()).logits, net(batch()).logits)


# ADD-GCN


def test_add_gcn_against_a_loop() -> None:
    net, data = model("add_gcn"), batch((9, 4))
    leaky = nn.functional.leaky_relu
    output = net(data)
    for b, count in enumerate((9, 4)):
        f = data.x[b, :count]
        m = f @ net.activation.weight.T
        v = [sum(torch.sigmoid(m[i, c]) * net.project(f[i]) for i in range(count)) for c in range(C)]
        W_s, W_d, A_s = net.static_conv.weight, net.dynamic_conv.weight, net.static_adjacency
        h = [v[c] + leaky(sum(A_s[c, k] * (v[k] @ W_s) for k in range(C)), 0.2) for c in range(C)]
        dynamic = net.dynamic_adjacency
        g = leaky(dynamic.whole(sum(h) / C), 0.2)
        A_d = [torch.sigmoid(dynamic.relation(torch.cat([g, h[c]]))) for c in range(C)]
        z = [v[c] + leaky(sum(A_d[c][k] * (h[k] @ W_d) for k in range(C)), 0.2) for c in range(C)]
        for c in range(C):
            score = z[c] @ net.classifiers.weight[c] + net.classifiers.bias[c]
            close(output.logits[b, c], (m[:, c].max() + score) / 2)
            close(output.label_states[b, c], z[c])
        close(output.match_logits[b, :count], m)


# ML-Decoder


def test_ml_decoder_against_a_loop() -> None:
    net, data = model("ml_decoder", heads=1, num_labels=C, groups=3), batch((9, 4))
    assert net.group.tolist() == [0, 0, 1, 1]  # 4 labels in groups of 2
    output, attention = net(data), net.layer.cross_attention
    (W_q, W_k, W_v), (b_q, b_k, b_v) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    for b, count in enumerate((9, 4)):
        F = torch.relu(net.project(data.x[b, :count]))
        for c in range(C):
            q = net.norm(2 * net.queries[c // 2])
            score = torch.stack([(W_q @ q + b_q) @ (W_k @ f + b_k) / math.sqrt(12) for f in F]).exp()
            a = score / score.sum()
            update = attention.out_proj(sum(a[i] * (W_v @ F[i] + b_v) for i in range(count)))
            q = net.layer.norms[0](q + update)
            q = net.layer.norms[1](q + net.layer.mlp(q))
            close(output.logits[b, c], q @ net.classifiers.weight[c] + net.classifiers.bias[c])
            close(output.match_logits[b, :count, c], a)


def test_ml_decoder_keeps_its_queries() -> None:
    net = model("ml_decoder")
    assert "queries" in net.state_dict()
    assert "queries" not in dict(net.named_parameters())
    before = net.queries.clone()
    net.reset_parameters()
    assert not torch.equal(net.queries, before)
    assert len(MLDecoder(4, 250, width=8).queries) == 84  # groups of 3
    assert len(MLDecoder(4, 20, width=8).queries) == 20


# C-Tran


def test_encoder_layer_equals_torch() -> None:
    """Without targets, C-Tran is torch's encoder over locations and label embeddings."""
    net, data = model("c_tran"), batch((9, 4))
    H = torch.cat([data.x, net.labels.weight.expand(2, -1, -1)], dim=1)
    H, padded = net.norm(H), torch.cat([~data.mask, torch.zeros(2, C, dtype=torch.bool)], dim=1)
    for layer in net.layers:
        theirs = nn.TransformerEncoderLayer(D_O, 2, D_O, dropout=0.0, batch_first=True).double()
        theirs.self_attn.load_state_dict(layer.cross_attention.state_dict())
        theirs.linear1.load_state_dict(layer.mlp.lin1.lins[0].state_dict())
        theirs.linear2.load_state_dict(layer.mlp.lin2.state_dict())
        theirs.norm1.load_state_dict(layer.norms[0].state_dict())
        theirs.norm2.load_state_dict(layer.norms[1].state_dict())
        H = theirs(H, src_key_padding_mask=padded)
    close(net(data).label_states, H[:, 9:])
    close(net(data).logits, (H[:, 9:] * net.classifiers.weight).sum(dim=-1) + net.classifiers.bias)


def test_known_labels_are_at_most_three_quarters() -> None:
    torch.manual_seed(0)
    difficult = torch.zeros(4000, 8, dtype=torch.bool)
    counts = random_known(difficult, 0.75).sum(dim=1)
    assert counts.unique().tolist() == list(range(7))
    torch.testing.assert_close(torch.bincount(counts) / 4000, torch.full((7,), 1 / 7), atol=0.03, rtol=0)
    difficult[:, 2] = True
    share = random_known(difficult, 0.75).float().mean(dim=0)
    assert float(share[2]) == 0
    torch.testing.assert_close(share[[0, 1, 3]], torch.full((3,), 3 / 8), atol=0.03, rtol=0)


def test_label_mask_training() -> None:
    """Given labels have no loss, and change the others; in evaluation, targets are not read."""
    torch.manual_seed(5)
    net, data = model("c_tran"), batch((9,) * 4)
    unknown = net(data).logits
    torch.manual_seed(1)
    logits = net(replace(data, y=TARGETS)).logits
    torch.manual_seed(1)
    known = random_known(torch.zeros(4, C, dtype=torch.bool), 0.75)
    assert 0 < int(known.sum()) < known.numel()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, TARGETS.double(), reduction="none")
    assert float(loss.detach()[known].max()) < 1e-8
    changed = (logits != unknown) & ~known
    assert torch.equal(changed.any(dim=1), known.any(dim=1))
    difficult = replace(data, y=TARGETS, difficult=torch.ones(4, C, dtype=torch.bool))
    close(net(difficult).logits, unknown)
    close(model("c_tran", unknown=1.0)(replace(data, y=TARGETS)).logits, unknown)
    net.eval()
    close(net(replace(data, y=TARGETS)).logits, unknown)


# SRN


def test_srn_against_a_loop() -> None:
    net, size = model("srn"), 3
    x = torch.randn(1, 9, D_O).double()
    data = AssignmentBatch(x, grid_boxes(size)[None], torch.ones(1, 9, dtype=torch.bool), batch().label_vectors)
    output = net(data)
    (one, _, three, _, last), X = net.attention, x[0].view(size, size, D_O)
    relu = torch.relu
    hidden = [[relu(one.weight[:, :, 0, 0] @ X[i, j] + one.bias) for j in range(size)] for i in range(size)]
    U = torch.zeros(C, size, size).double()
    for c in range(C):
        z = torch.zeros(size, size).double()
        for i in range(size):
            for j in range(size):
                total = three.bias.clone()
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < size and 0 <= j + dj < size:
                            total = total + three.weight[:, :, di + 1, dj + 1] @ hidden[i + di][j + dj]
                z[i, j] = last.weight[c, :, 0, 0] @ relu(total)
        a = z.exp() / z.exp().sum()
        s = X @ net.confidence.weight[c] + net.confidence.bias[c]
        close(output.auxiliary[0][0, c], (a * s).sum())
        U[c] = a / (1 + torch.exp(-s))
    close(output.match_logits[0], U.flatten(1).T)
    first, _, second, _, whole, *_ = net.regularization
    h = relu(torch.einsum("dc,cij->dij", first.weight[:, :, 0, 0], U) + first.bias[:, None, None])
    h = relu(torch.einsum("ed,dij->eij", second.weight[:, :, 0, 0], h) + second.bias[:, None, None])
    flat = torch.stack([relu((whole.weight[k, 0] * h[k // 4]).sum() + whole.bias[k]) for k in range(32)])
    close(output.logits[0], (net.classifier(x[0].mean(dim=0)) + net.regularized(flat)) / 2)


# TDRG


def test_cross_scale_adds_the_product() -> None:
    fine, coarse = torch.randn(1, 2, 3, 3).double(), torch.randn(1, 2, 1, 1).double()
    ours, small = cross_scale(fine, coarse)
    close(ours, fine * (1 + coarse))  # one cell is resized to equal cells
    close(small, coarse * (1 + fine[:, :, :1, :1]))  # and back to the corner, with aligned corners


def test_tdrg_against_a_loop() -> None:
    net, leaky = model("tdrg"), nn.functional.leaky_relu
    x = torch.randn(1, 9, D_O).double()
    data = AssignmentBatch(x, grid_boxes(3)[None], torch.ones(1, 9, dtype=torch.bool), batch().label_vectors)
    output, x = net(data), x[0]
    fine = x @ net.fine.weight[:, :, 0, 0].T + net.fine.bias
    kernel = net.coarse.weight.flatten(2)
    coarse = sum(kernel[:, :, i] @ x[i] for i in range(9)) + net.coarse.bias
    F1 = net.layers[0]((fine * (1 + coarse))[None], (fine * (1 + coarse))[None], None, None)[0][0]
    F2 = coarse * (1 + fine[0])
    F2 = net.layers[0](F2[None, None], F2[None, None], None, None)[0][0]
    structural = net.structural(torch.cat([F1.max(dim=0).values, F2[0]]))
    m = x @ net.activation.weight.T
    share = torch.sigmoid(m)
    own = [sum(share[i, c] * net.project(x[i]) for i in range(9)) for c in range(C)]
    guided = [net.guidance(sum(share[i, c] * F1[i] for i in range(9))) for c in range(C)]
    v = [torch.cat([own[c], guided[c]]) for c in range(C)]
    g = leaky(net.adjacency.whole(torch.cat([F1.mean(dim=0), F2[0]])), 0.2)
    A = [torch.sigmoid(net.adjacency.relation(torch.cat([g, v[c]]))) for c in range(C)]
    for c in range(C):
        state = v[c] + leaky(sum(A[c][k] * (v[k] @ net.conv.weight) for k in range(C)), 0.2)
        semantic = net.classifiers.weight[c] @ state + net.classifiers.bias[c]
        close(output.label_states[0, c], state)
        close(output.logits[0, c], 0.7 * structural[c] + 0.3 * semantic)
        constraint = m[:, c].max()  # 5 % of 9 cells: one
        close(torch.stack([o[0, c] for o in output.auxiliary]), torch.stack([structural[c], semantic, constraint]))
    close(output.match_logits[0], m)


# CMA


def test_similarity_loss_of_three_labels() -> None:
    """Cosines 0.6, 0 and 0.8 against weights 0.5, 0.05 and 0.7; the second pair is below the threshold of 0.1."""
    e = torch.tensor([[2.0, 0.0], [1.8, 2.4], [0.0, 5.0]], dtype=torch.float64)
    A = torch.tensor([[0.0, 0.5, 0.05], [0.5, 0.0, 0.7], [0.05, 0.7, 0.0]], dtype=torch.float64)
    close(similarity_loss(e, A, 0.1), torch.tensor(2 * (0.1**2 + 0.1**2), dtype=torch.float64))
    close(similarity_loss(e, A, 0.0), torch.tensor(2 * (0.1**2 + 0.05**2 + 0.1**2), dtype=torch.float64))


def test_embeddings_have_the_cosines_of_the_label_graph() -> None:
    net = CMA(8, C, width=6)
    before = net.embeddings.clone()
    net.fit(TARGETS)
    P = conditional_probabilities(TARGETS, C)
    unit = nn.functional.normalize(net.embeddings, dim=1)
    expected = ((P + P.T) / 2).fill_diagonal_(1)
    torch.testing.assert_close(unit @ unit.T, expected, atol=0.02, rtol=0)
    assert not torch.equal(before, net.embeddings)


def test_cma_against_a_loop() -> None:
    net, data = model("cma"), batch((9, 4))
    output = net(data)
    for b, count in enumerate((9, 4)):
        v = net.transform(data.x[b, :count])
        for c in range(C):
            e = net.embeddings[c]
            cosine = torch.stack([v[i] @ e / (v[i].norm() * e.norm()) for i in range(count)])
            z = torch.where(cosine > 0, cosine, 0) if bool((cosine > 0).any()) else torch.ones(count).double()
            h = sum(z[i] / z.sum() * v[i] for i in range(count))
            close(output.match_logits[b, :count, c], cosine)
            close(output.logits[b, c], h @ net.classifiers.weight[c] + net.classifiers.bias[c])


# TSGCN


def test_spatial_adjacency_of_three_labels() -> None:
    """Two labels at one place, and one at a distance of twice the radius."""
    position = torch.tensor([[[0.1, 0.1], [0.1, 0.1], [0.1, 0.6]]], dtype=torch.float64)
    far = math.exp(-4)
    near, alone = [1 / (2 + far), 1 / (2 + far), far / (2 + far)], [far / (1 + 2 * far)] * 2 + [1 / (1 + 2 * far)]
    close(spatial_adjacency(position, 0.25), torch.tensor([[near, near, alone]], dtype=torch.float64))


def test_tsgcn_against_a_loop() -> None:
    net, data = model("tsgcn"), batch((9, 4))
    output, Z = net(data), data.label_vectors
    leaky = nn.functional.leaky_relu
    for b, count in enumerate((9, 4)):
        x, box = data.x[b, :count], data.box[b, :count]
        weights = (x @ net.activation.weight.T).exp()
        a = weights / weights.sum(dim=0)
        center = (box[:, :2] + box[:, 2:]) / 2
        near = [sum(a[i, c] * center[i] for i in range(count)) for c in range(C)]
        kernel = torch.stack([torch.stack([torch.exp(-(p - q).square().sum() * 16) for q in near]) for p in near])
        A = kernel / kernel.sum(dim=1, keepdim=True)
        semantic = net.adjacency @ leaky(net.adjacency @ Z @ net.semantic1.weight, 0.2) @ net.semantic2.weight
        spatial = A @ leaky(A @ Z @ net.spatial1.weight, 0.2) @ net.spatial2.weight
        f = [sum(a[i, c] * x[i] for i in range(count)) for c in range(C)]
        for c in range(C):
            close(output.logits[b, c], (semantic + spatial)[c] @ f[c])
            close(output.label_states[b, c], f[c])
        close(output.match_logits[b, :count], a)
