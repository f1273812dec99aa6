"""Whole-image baselines compared with loops over their papers' formulas, and properties of all models."""

from __future__ import annotations

import functools
import itertools
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
    CNNRNN,
    KDWSD,
    MLGCN,
    PLA,
    SRN,
    SSGRL,
    TDRG,
    TSGCN,
    CTran,
    GAPLinear,
    MLDecoder,
    ModelOutput,
    Query2Label,
    RNNAttention,
)
from gm_mlic.nn.baselines import LabelStatistics
from gm_mlic.nn.baselines._common import DecoderLayer, conditional_probabilities, from_map, to_map
from gm_mlic.nn.baselines._sequence import NO_TARGET, label_paths, log_odds
from gm_mlic.nn.baselines.c_tran import random_known
from gm_mlic.nn.baselines.cma import similarity_loss
from gm_mlic.nn.baselines.kd_wsd import detection_log_scores, windows
from gm_mlic.nn.baselines.ml_gcn import reweighted_adjacency
from gm_mlic.nn.baselines.pla import align, assignment
from gm_mlic.nn.baselines.query2label import position_encoding
from gm_mlic.nn.baselines.rnn_attention import region_constraints, sample_region
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
    "cnn_rnn": {"num_labels": C, "width": 12, "hidden": 16},
    "rnn_attention": {"num_labels": C, "width": 12, "regions": 3, "region_size": 2, "map_size": 3},
    "pla": {"num_labels": C, "width": 12, "hidden": 16},
    "kd_wsd": {"num_labels": C, "width": 12, "dropout": 0.0, "map_size": 3},
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
ATTENTION = {"ssgrl", "query2label", "ml_decoder", "tsgcn", "pla"}
TARGETS = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 0, 1]])
every_model = pytest.mark.parametrize("name", SETTINGS)


@functools.cache
def statistics(name: str, **changes: Any) -> dict[str, Tensor]:
    """What the model counts in TARGETS; the embedding of CMA takes 500 gradient steps."""
    made = create_model(name, **{"instance_dim": D_O, **SETTINGS[name], **changes})
    before = {key: buffer.clone() for key, buffer in made.named_buffers()}
    made.fit(TARGETS)
    return {key: buffer for key, buffer in made.named_buffers() if not torch.equal(buffer, before[key])}


def model(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    made = create_model(name, **{"instance_dim": D_O, **SETTINGS[name], **changes})
    if isinstance(made, LabelStatistics):
        made.load_state_dict(statistics(name, **changes), strict=False)
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


def training_loss(output: ModelOutput, y: Tensor) -> Tensor:
    """The training loss, with binary cross-entropy as the configured one."""
    logits = (output.logits, *(output.auxiliary or ()))
    terms = [nn.functional.binary_cross_entropy_with_logits(x, y.to(x.dtype)) for x in logits]
    return sum(terms, start=torch.tensor(0.0) if output.loss is None else output.loss)


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
    training_loss(net(data), TARGETS[:3]).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())] == []


@every_model
def test_padding_does_not_change_outputs(name: str) -> None:
    net, data = model(name), batch((9, 4, 6))
    if name == "srn":
        net.eval()  # batch normalization: in training, images depend on each other
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
def test_features_are_standardized(name: str) -> None:
    """Fitted statistics have the effect of standardized input, also on padded locations."""
    net, data = model(name).eval(), batch((9, 4, 6))
    features = data.x[data.mask]
    standardized = (data.x - features.mean(dim=0)) / features.std(dim=0, correction=0)
    expected = net(replace(data, x=standardized.masked_fill(~data.mask[..., None], 0)))
    net.fit_features(features, data.label_vectors)  # type: ignore[operator]
    close(net(data).logits, expected.logits)
    assert torch.equal(net(data).argmax_instance, expected.argmax_instance)


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
    losses = []
    for step in range(1, 251):
        optimizer.zero_grad()
        training_loss(net.train()(replace(data, y=y)), y).backward()
        optimizer.step()
        if step % 25 == 0:
            losses.append(float(nn.functional.binary_cross_entropy_with_logits(net.eval()(data).logits, y).detach()))
            if losses[-1] < 0.05:
                return
    raise AssertionError(f"losses after 25, 50, ... steps: {losses}")


@every_model
def test_save_and_load(name: str, tmp_path: Path) -> None:
    net, data = model(name).eval(), batch((9, 4))
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(4)
    other = create_model(name, instance_dim=D_O, **SETTINGS[name]).double().eval()
    assert not torch.equal(other(data).logits, net(data).logits)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(data).logits, net(data).logits)


@pytest.mark.slow
@every_model
def test_compiled_in_one_graph(name: str) -> None:
    net, data = model(name).eval(), batch((9, 4))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    close(compiled(data).logits, net(data).logits)
    close(compiled(data).match_logits, net(data).match_logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["c_tran", "tdrg", "cnn_rnn", "rnn_attention", "pla", "kd_wsd"])
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
    with torch.no_grad():  # as `gm-mlic export` does
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
        "CNNRNN(8, 4, width=12, hidden=16, beams=4)",
        "RNNAttention(8, 4, width=12, regions=3, map_size=3)",
        "PLA(8, 4, width=12, hidden=16)",
        "KDWSD(8, 4, width=12, map_size=3)",
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GAPLinear(0, 3), "^instance_dim must be an integer of at least 1; got 0"),
        (lambda: MLGCN(4, 4, 3, width=0), "^width must be an integer of at least 1; got 0"),
        (lambda: MLGCN(4, 4, 3, tau=1.5), "^tau must be a number from 0 to 1; got 1.5"),
        (lambda: MLGCN(4, 4, 3, p=1.0), "^p must be a number of at least 0 and below 1; got 1.0"),
        (lambda: SSGRL(4, 4, 3, steps=0), "^steps"),
        (lambda: Query2Label(4, 3, layers=0), "^layers"),
        (lambda: Query2Label(6, 3, heads=2), "^width must be a multiple of 4 and of heads=2, got 6"),
        (lambda: Query2Label(8, 3, heads=3), "of heads=3"),
        (lambda: Query2Label(8, 3, dropout=1.0), "^dropout"),
        (lambda: ADDGCN(4, 3, width=0), "^width must be an integer of at least 1; got 0"),
        (lambda: MLDecoder(4, 3, groups=0), "^groups"),
        (lambda: MLDecoder(4, 3, width=9), "^width must be a multiple of heads=8, got 9"),
        (lambda: MLDecoder(8, 3, dropout=1.0), "^dropout"),
        (lambda: CTran(6, 3), "^width must be a multiple of heads=4, got 6"),
        (lambda: CTran(8, 3, layers=0), "^layers"),
        (lambda: CTran(8, 3, unknown=1.5), "^unknown"),
        (lambda: CTran(8, 3, dropout=1.0), "^dropout"),
        (lambda: SRN(8, 3, map_size=0), "^map_size"),
        (lambda: TDRG(8, 3, width=9), "^width must be a multiple of heads=4, got 9"),
        (lambda: TDRG(8, 3, map_size=2), "^map_size must be an integer of at least 3; got 2"),
        (lambda: TDRG(8, 3, dropout=1.0), "^dropout"),
        (lambda: CMA(8, 3, width=0), "^width"),
        (lambda: CMA(8, 3, threshold=2.0), "^threshold"),
        (lambda: TSGCN(8, 3, 3, width=0), "^width"),
        (lambda: TSGCN(8, 3, 3, radius=0.0), "^radius"),
        (lambda: CNNRNN(8, 3, beams=0), "^beams"),
        (lambda: RNNAttention(8, 3, regions=0), "^regions"),
        (lambda: PLA(8, 3, steps=0), "^steps"),
        (lambda: KDWSD(8, 3, dropout=1.0), "^dropout"),
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
    ours = DecoderLayer(D_O, 2, 0.0).double()
    theirs = nn.TransformerDecoderLayer(D_O, 2, 4 * D_O, dropout=0.0, batch_first=True).double()
    theirs.self_attn.load_state_dict(ours.self_attention.state_dict())
    theirs.multihead_attn.load_state_dict(ours.cross_attention.state_dict())
    theirs.linear1.load_state_dict(ours.mlp[0].state_dict())
    theirs.linear2.load_state_dict(ours.mlp[3].state_dict())
    data, Q = batch((9, 4)), torch.randn(2, C, D_O).double()
    found, attention = ours(Q, data.x, torch.zeros_like(data.x), data.mask)
    close(found, theirs(Q, data.x, memory_key_padding_mask=~data.mask))
    assert bool((attention[1, 4:] == 0).all())


def test_query2label_equals_its_parts() -> None:
    """Queries are added to the states in each layer, to those of locations their positions; values are without both."""
    net, data = model("query2label"), batch((9, 9))
    F, q = net.project(data.x), net.queries
    keys, Q = F + position_encoding(data.box, D_O), torch.zeros(2, C, D_O).double()
    first, second = net.layers
    Q = first.norms[0](Q + first.cross_attention((Q + q), keys, F)[0])
    Q = first.norms[1](Q + first.mlp(Q))
    Q = second.norms[0](Q + second.self_attention(Q + q, Q + q, Q)[0])
    update, attention = second.cross_attention(Q + q, keys, F)
    Q = second.norms[1](Q + update)
    Q = net.norm(second.norms[2](Q + second.mlp(Q)))
    output = net(data)
    close(output.label_states, Q)
    close(output.logits, net.classifiers(Q))
    close(output.match_logits, attention.transpose(1, 2))


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
        theirs.linear1.load_state_dict(layer.mlp[0].state_dict())
        theirs.linear2.load_state_dict(layer.mlp[3].state_dict())
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
    net, size = model("srn").eval(), 3
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        for values in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(values)
        nn.init.uniform_(norm.running_var, 0.5, 2)

    def normalized(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        return norm.weight * (x - norm.running_mean) / torch.sqrt(norm.running_var + 1e-5) + norm.bias

    x = torch.randn(1, 9, D_O).double()
    data = AssignmentBatch(x, grid_boxes(size)[None], torch.ones(1, 9, dtype=torch.bool), batch().label_vectors)
    output = net(data)
    (one, norm1, _, three, norm2, _, last), X = net.attention, x[0].view(size, size, D_O)
    relu = torch.relu
    hidden = [[relu(normalized(norm1, one.weight[:, :, 0, 0] @ X[i, j])) for j in range(size)] for i in range(size)]
    U = torch.zeros(C, size, size).double()
    for c in range(C):
        z = torch.zeros(size, size).double()
        for i in range(size):
            for j in range(size):
                total = torch.zeros(8).double()
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < size and 0 <= j + dj < size:
                            total = total + three.weight[:, :, di + 1, dj + 1] @ hidden[i + di][j + dj]
                z[i, j] = last.weight[c, :, 0, 0] @ relu(normalized(norm2, total))
        a = z.exp() / z.exp().sum()
        s = X @ net.confidence.weight[c] + net.confidence.bias[c]
        close(output.auxiliary[0][0, c], (a * s).sum())
        U[c] = a / (1 + torch.exp(-s))
    close(output.match_logits[0], U.flatten(1).T)
    first, norm1, _, second, norm2, _, whole, *_ = net.regularization
    h = relu(normalized(norm1, torch.einsum("dc,cij->ijd", first.weight[:, :, 0, 0], U)))
    h = relu(normalized(norm2, torch.einsum("ed,ijd->ije", second.weight[:, :, 0, 0], h))).permute(2, 0, 1)
    flat = torch.stack([relu((whole.weight[k, 0] * h[k // 4]).sum() + whole.bias[k]) for k in range(32)])
    classified, regularized = net.classifier(x[0].mean(dim=0)), net.regularized(flat)
    close(output.logits[0], (classified + regularized) / 2)
    close(torch.stack(output.auxiliary[1:])[:, 0], torch.stack([classified, regularized]))


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


# Sequences of labels


def test_label_paths() -> None:
    """Labels by rank, then END (4); at most two labels in the second case."""
    rank, P = torch.tensor([2, 0, 3, 1]), NO_TARGET
    present = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]) > 0
    assert label_paths(present, rank, 4).tolist() == [[1, 3, 0, 4], [2, 4, P, P], [4, P, P, P]]
    assert label_paths(present, rank, 2).tolist() == [[1, 3, 4], [2, 4, P], [4, P, P]]


def test_log_odds() -> None:
    scores = torch.randn(3, 5).double()
    p = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
    close(log_odds(scores), torch.log(p / (1 - p)))
    large = torch.tensor([[100.0, 0.0, -100.0]], requires_grad=True)
    torch.testing.assert_close(log_odds(large).detach(), torch.tensor([[100.0, -100.0, -200.0]]))
    log_odds(large).sum().backward()
    assert large.grad is not None
    assert bool(large.grad.isfinite().all())


def lstm_step(cell: nn.LSTMCell, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


# CNN-RNN


def path_probabilities(net: Any, image: Tensor, path: tuple[int, ...]) -> list[Tensor]:
    """The softmax over labels and END at each step of a path, one step after the other."""
    h = c = torch.zeros(16).double()
    found, U = [], net.labels.weight
    for label in (C, *path):
        h, c = lstm_step(net.lstm, U[label], h, c)
        s = U @ torch.relu(net.output.weight @ h + net.image.weight @ image)
        found.append(s.exp() / s.exp().sum())
    return found


@pytest.mark.parametrize("steps", [4, 2])
def test_beam_search_against_all_paths(steps: int) -> None:
    """With as many beams as unfinished paths the search is exhaustive; with fewer, it finds no better path."""
    wide, narrow = (model("cnn_rnn", steps=steps, beams=beams) for beams in (24, 1))
    for parameter in wide.parameters():
        parameter.data.mul_(4)  # less uniform probabilities, so that the best paths are long
    narrow.load_state_dict(wide.state_dict())
    data = batch((9, 4, 6), seed=2)
    images = [data.x[b, :count].mean(dim=0) for b, count in enumerate((9, 4, 6))]
    paths = [path for n in range(steps + 1) for path in itertools.permutations(range(C), n)]
    found, odds = wide.search(torch.stack(images) @ wide.image.weight.T)
    greedy, _ = narrow.search(torch.stack(images) @ wide.image.weight.T)
    assert bool((greedy <= found + 1e-9).all())
    lengths = set()
    for b, image in enumerate(images):
        p = {path: path_probabilities(wide, image, path) for path in paths}
        value = {path: sum(p[path][t][label].log() for t, label in enumerate((*path, C))) for path in paths}
        best = max(paths, key=lambda path: float(value[path].detach()))
        largest = torch.stack(p[best]).amax(dim=0)[:C]
        close(found[b], value[best])
        close(odds[b], torch.log(largest / (1 - largest)))
        lengths.add(len(best))
    assert lengths - {0}
    close(wide(data).logits, odds)


def test_cnn_rnn_learns_labels_by_frequency() -> None:
    """TARGETS have 3, 3, 2 and 2 images with the labels: 0, 1, 2, 3."""
    net, y = model("cnn_rnn"), TARGETS[:3]
    assert net.rank.tolist() == [0, 1, 2, 3]
    net.fit(TARGETS.flip(1))
    assert net.rank.tolist() == [2, 3, 0, 1]
    data = batch((9, 4, 6))
    images = [data.x[b, :count].mean(dim=0) for b, count in enumerate((9, 4, 6))]
    paths = [(0, 1), (2, 0), (2, 3, 1)]
    terms = [
        -p[label].log()
        for image, path in zip(images, paths, strict=True)
        for label, p in zip((*path, C), path_probabilities(net, image, path), strict=True)
    ]
    output = net(replace(data, y=y))
    close(output.loss, sum(terms) / len(terms))
    assert not output.logits.requires_grad
    close(output.logits, net.eval()(replace(data, y=y)).logits)
    assert net(replace(data, y=y)).loss is None


def test_difficult_labels_are_unknown_in_paths() -> None:
    net, data = model("cnn_rnn"), batch((9,))
    difficult = torch.tensor([[False, True, False, False]])
    output = net(replace(data, y=TARGETS[:1], difficult=difficult))
    p = path_probabilities(net, data.x[0].mean(dim=0), (0,))
    close(output.loss, -sum((q[label] / (1 - q[1])).log() for label, q in zip((0, C), p, strict=True)) / 2)


# RNN-Attention


def bilinear(X: Tensor, x: float, y: float) -> Tensor:
    """The value of a map (d, G, G) at a place, in cells from the center of the first one; zero outside."""
    total, G = torch.zeros(X.shape[0]).double(), X.shape[-1]
    for i in range(math.floor(y), math.floor(y) + 2):
        for j in range(math.floor(x), math.floor(x) + 2):
            if 0 <= i < G and 0 <= j < G:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * X[:, i, j]
    return total


def sampled(X: Tensor, region: Tensor, size: int) -> Tensor:
    """``sample_region`` for one map."""
    sx, sy, tx, ty = region.tolist()
    place = [-1 + (2 * k + 1) / size for k in range(size)]
    G = X.shape[-1]
    rows = [
        [bilinear(X, ((sx * u + tx + 1) * G - 1) / 2, ((sy * v + ty + 1) * G - 1) / 2) for u in place] for v in place
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)


def test_sampled_regions() -> None:
    X = torch.randn(3, 2, 4, 4).double()
    whole, part, outside = [1, 1, 0, 0], [0.3, 0.6, -0.5, 0.2], [0.5, -0.4, 0.9, -0.8]
    regions = torch.tensor([whole, part, outside], dtype=torch.float64)
    found = sample_region(X, regions, 4)
    for b in range(3):
        close(found[b], sampled(X[b], regions[b], 4))
    close(found[0], X[0])


def test_region_constraints_of_two_images() -> None:
    """Anchors of three regions: the center, and two points on the circle of radius sqrt(1 / 2)."""
    r = math.sqrt(0.5)
    good = [[0.5, 0.2, 0, 0], [0.3, 0.4, 0, r], [0.1, 0.1, 0, -r]]
    bad = [[0.7, 0.2, 0, 0.4], [-0.9, 0.05, 0, r], [0.1, 0.1, 0.2, -r]]
    expected = 0.2**2 + 0.4**2 + 0.01 * (0.4**2 + 0.2**2) / 2 + 0.1 * (1.0 + 0.05)
    found = region_constraints(torch.tensor([good, bad], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(expected / 2).double(), rtol=1e-6, atol=1e-6)


def test_rnn_attention_against_a_loop() -> None:
    net, relu = model("rnn_attention"), torch.relu
    nn.init.normal_(net.localization.weight, std=0.3)
    x, box = torch.randn(1, 9, D_O).double(), grid_boxes(3)
    data = AssignmentBatch(x, box[None], torch.ones(1, 9, dtype=torch.bool), batch().label_vectors)
    output = net(data)
    X = (x[0] @ net.project.weight.T + net.project.bias).T.view(12, 3, 3)
    region, h, c = torch.tensor([1.0, 1.0, 0.0, 0.0]).double(), torch.zeros(12).double(), torch.zeros(12).double()
    scores, regions = [], []
    for k in range(4):
        f = relu(net.region.weight @ sampled(X, region, 2).flatten() + net.region.bias)
        h, c = lstm_step(net.lstm, f, h, c)
        z = relu(net.hidden.weight @ h + net.hidden.bias)
        if k > 0:
            scores.append(net.scores.weight @ z + net.scores.bias)
            regions.append(region)
        region = net.localization.weight @ z + net.localization.bias
    close(output.logits[0], torch.stack(scores).amax(dim=0))
    close(output.loss, 0.1 * region_constraints(torch.stack(regions)[None]))
    for label in range(C):
        sx, sy, tx, ty = regions[int(torch.stack(scores)[:, label].argmax())].tolist()
        cells = [((j - 1) * 2 / 3, (i - 1) * 2 / 3) for i in range(3) for j in range(3)]
        expected = [-(((u - tx) / max(abs(sx), 0.1)) ** 2) - ((v - ty) / max(abs(sy), 0.1)) ** 2 for u, v in cells]
        close(output.match_logits[0, :, label], torch.tensor(expected, dtype=torch.float64))


# PLA


@pytest.mark.parametrize("size", range(7))
def test_assignment_against_all_permutations(size: int) -> None:
    generator = np.random.default_rng(size)
    for cost in (generator.normal(size=(size, size)), generator.integers(3, size=(size, size)).astype(float)):
        found = assignment(cost)
        assert sorted(found) == list(range(size))
        best = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(size)))
        assert sum(cost[i, j] for i, j in enumerate(found)) == pytest.approx(best)


def test_alignment_against_all_permutations() -> None:
    """Of the orders that keep predicted labels at the first steps that predict them, the one of the least loss."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 5, 5, generator=generator).double()
    present = torch.rand(40, 4, generator=generator) < 0.7
    paths = label_paths(present, torch.arange(4), 4)
    kept = 0
    for score, path, found in zip(scores, paths.tolist(), align(scores, paths).tolist(), strict=True):
        n = path.index(4)
        first: dict[int, int] = {}
        for step, label in enumerate(score[:n].argmax(dim=1).tolist()):
            if label in path[:n]:
                first.setdefault(label, step)
        allowed = [o for o in itertools.permutations(path[:n]) if all(o[t] == label for label, t in first.items())]
        loss = {order: -sum(score[t].log_softmax(0)[label] for t, label in enumerate(order)) for order in allowed}
        assert found[n:] == path[n:]
        assert tuple(found[:n]) in loss
        assert loss[tuple(found[:n])] == pytest.approx(float(min(loss.values())))
        kept += len(first)
    assert kept > 20


def test_pla_against_a_loop() -> None:
    net, data, relu = model("pla"), batch((9, 4, 6)), torch.relu
    with torch.no_grad():
        net.scores.bias[C] = -1  # more than one step
    output, y = net(replace(data, y=TARGETS[:3])), TARGETS
    terms = []
    for b, count in enumerate((9, 4, 6)):
        x = data.x[b, :count]
        h, c = net.start_h(x.mean(dim=0)), net.start_c(x.mean(dim=0))
        label, ended, probabilities, attentions, scores = C, False, [], [], []
        for _ in range(C + 1):
            weight = torch.stack([net.attention(relu(net.location(f) + net.query(h)))[0] for f in x]).exp()
            a = weight / weight.sum()
            seen = torch.sigmoid(net.gate(h)) * sum(a[i] * x[i] for i in range(count))
            h, c = lstm_step(net.lstm, torch.cat([net.labels.weight[label], seen]), h, c)
            s = net.scores(h)
            scores.append(s)
            if not ended:
                probabilities.append(s.exp() / s.exp().sum())
                attentions.append(a)
            label = int(s.argmax())
            ended = ended or label == C
        p = torch.stack(probabilities)[:, :C]
        largest, step = p.max(dim=0)
        close(output.logits[b], torch.log(largest / (1 - largest)))
        close(output.match_logits[b, :count], torch.stack([attentions[t] for t in step], dim=1))
        path = align(torch.stack(scores)[None], label_paths(y[b : b + 1] > 0, torch.arange(C), C))[0].tolist()
        terms += [-s.log_softmax(0)[label] for s, label in zip(scores, path, strict=False)]
    assert not output.logits.requires_grad
    close(output.loss, sum(terms) / len(terms))


# KD-WSD


def test_windows_of_a_map() -> None:
    """Of 4 x 4 cells: the whole map, 3 x 3 windows of two cells, and 16 single cells."""
    X = torch.randn(2, 3, 4, 4).double()
    squares = [(0, 0, 4), *((i, j, 2) for i in range(3) for j in range(3))]
    squares += [(i, j, 1) for i in range(4) for j in range(4)]
    expected = [X[:, :, i : i + side, j : j + side].amax(dim=(2, 3)) for i, j, side in squares]
    close(windows(X), torch.stack(expected, dim=1))


def test_windows_cover_the_map() -> None:
    """Of 10 x 10 cells: sides of 10, 5 and 2 cells; the last cell is in a window of each size."""
    X = torch.zeros(1, 1, 10, 10)
    X[..., -1, -1] = 1
    found = windows(X)[0, :, 0]
    assert found.shape == (1 + 4**2 + 9**2,)
    assert [int(part.sum()) for part in found.split([1, 16, 81])] == [1, 1, 1]


def test_detection_scores_against_a_loop() -> None:
    x, y = torch.randn(2, 2, 5, 3).double()
    found = detection_log_scores(x, y).exp()
    for b in range(2):
        for c in range(3):
            of_class = [x[b, r, c].exp() / x[b, r].exp().sum() for r in range(5)]
            of_region = [y[b, r, c].exp() / y[b, :, c].exp().sum() for r in range(5)]
            close(found[b, c], sum(p * q for p, q in zip(of_class, of_region, strict=True)))


def test_kd_wsd_against_a_loop() -> None:
    net, relu = model("kd_wsd"), torch.relu
    x = torch.randn(1, 9, D_O).double()
    data = AssignmentBatch(x, grid_boxes(3)[None], torch.ones(1, 9, dtype=torch.bool), batch().label_vectors)
    output = net(data)

    def features(part: Any, cells: list[int]) -> Tensor:
        (lin1, _, _, lin2, _, _) = part.layers
        maps = [relu(part.map[0](x[0, i])) for i in cells]
        return relu(lin2(relu(lin1(torch.stack(maps).amax(dim=0)))))

    regions = [list(range(9)), *([3 * i + j for i in (a, a + 1) for j in (b, b + 1)] for a in (0, 1) for b in (0, 1))]
    regions += [[i] for i in range(9)]  # sides of 3, 2 and 1 cells
    v, u = (torch.stack([features(part, cells) for cells in regions]) for part in (net.teacher, net.student))
    close(output.logits[0], net.classifier(u[0]))
    close(output.match_logits[0], net.classifier(u[5:]))
    p = detection_log_scores(net.classes(v)[None], net.proposals(v)[None]).exp()[0]
    close(output.auxiliary[0][0], torch.log(p / (1 - p)))
    soft = detection_log_scores(2 * net.classes(v)[None], 2 * net.proposals(v)[None]).exp()[0]
    own = torch.sigmoid(output.logits[0] / 5)
    entropy = -(soft * own.log() + (1 - soft) * (1 - own).log()).mean()
    close(output.loss, (u - v).square().mean() + entropy)


def test_distillation_does_not_train_the_teacher() -> None:
    net, data = model("kd_wsd"), batch()
    net(data).loss.backward()
    assert all(p.grad is None for part in (net.teacher, net.classes, net.proposals) for p in part.parameters())
    assert all(p.grad is not None for part in (net.student, net.classifier) for p in part.parameters())
    output = net.eval()(data)
    assert output.auxiliary is None
    assert output.loss is None
