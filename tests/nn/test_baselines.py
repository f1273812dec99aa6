"""The image-level baselines: shapes, gradients, padding, what their papers' equations say, and that they can learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gm_mlic.errors import ConfigError
from gm_mlic.graphs import AssignmentBatch, AssignmentGraph
from gm_mlic.nn import MLGCN, SSGRL, GlobalPool, LabelCompany, Query2Label, create_model, registry
from gm_mlic.nn.query2label import place_encoding

D, C, W, M = 8, 5, 6, 7
MODELS = {
    "resnet101": lambda: create_model("resnet101", instance_dim=D, num_labels=C),
    "ml_gcn": lambda: create_model("ml_gcn", instance_dim=D, num_labels=C, label_dim=W, width=16),
    "ssgrl": lambda: create_model("ssgrl", instance_dim=D, num_labels=C, label_dim=W, width=16),
    "query2label": lambda: create_model("query2label", instance_dim=D, num_labels=C, width=16, dropout=0.0),
}
every = pytest.mark.parametrize("name", MODELS)


def company(model: torch.nn.Module, targets: Tensor) -> None:
    for part in model.modules():
        if isinstance(part, LabelCompany):
            part.count(targets)


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double()
    generator = torch.Generator().manual_seed(1)
    company(model, torch.where(torch.rand(40, C, generator=generator) < 0.5, 1, -1))
    return model.eval()


def batch(images: int = 3, seed: int = 0) -> AssignmentBatch:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    counts = torch.tensor([M, 1, 4, 6, 2, 3])[torch.arange(images) % 6]
    mask = torch.arange(M) < counts[:, None]
    return AssignmentBatch.build(random(images, M, D) - 0.5, random(images, M, 4), mask, random(C, W), neighbours=None)


@every
def test_shapes_and_gradients(name: str):
    model, data = made(name).train(), batch()
    out = model(data)
    assert out.logits.shape == out.winners.shape == (3, C)
    assert out.matches.shape == (3, M, C)
    assert (out.winners < data.mask.sum(dim=1, keepdim=True)).all()  # nobody who is not there wins
    out.logits.square().sum().backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter
        # softmaxes do not hear a constant: the bias of the keys has no gradient beyond rounding
        if "in_proj_bias" not in parameter:
            assert value.grad.abs().max() > 0, parameter


@every
def test_an_image_is_judged_by_itself(name: str):
    """Whatever the batch around it, its padding, and the form of the graph."""
    model, data = made(name), batch()
    whole = model(data).logits
    for i in range(3):
        n = int(data.mask[i].sum())
        alone = AssignmentBatch.build(
            data.x[i : i + 1, :n],
            data.box[i : i + 1, :n],
            data.mask[i : i + 1, :n],
            data.label_vectors,
            neighbours=None,
        )
        torch.testing.assert_close(model(alone).logits[0], whole[i])
    order = torch.tensor([2, 0, 1])
    shuffled = AssignmentBatch.build(
        data.x[order], data.box[order], data.mask[order], data.label_vectors, neighbours=None
    )
    torch.testing.assert_close(model(shuffled).logits, whole[order])


@every
def test_a_heterodata_gives_the_same(name: str):
    from torch_geometric.data import Batch

    from gm_mlic import Instances, instance_data

    model = made(name).float()
    generator = torch.Generator().manual_seed(3)
    graph = AssignmentGraph(torch.rand(C, W, generator=generator), m=M)
    found = []
    for n in (3, 5):
        corners = torch.rand(n, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
        features = torch.rand(n, D, generator=generator)
        found.append(Instances(corners, torch.ones(n), torch.zeros(n, dtype=torch.int64), features))
    together = Batch.from_data_list([graph(instance_data(instances)) for instances in found])
    dense = AssignmentBatch.from_data(together)
    assert dense is not None
    # (the graph transform sets edge attributes, which a dense batch leaves out: the locations are the same)
    plain = AssignmentBatch.build(
        torch.nn.utils.rnn.pad_sequence([f.features for f in found], batch_first=True),
        torch.nn.utils.rnn.pad_sequence([f.boxes for f in found], batch_first=True),
        torch.arange(5) < torch.tensor([[3], [5]]),
        graph.label_vectors,
        neighbours=None,
    )
    torch.testing.assert_close(model(together).logits, model(plain).logits)


@every
def test_it_can_learn_anything(name: str):
    """Ten images with labels of chance, by heart."""
    torch.manual_seed(0)
    model, data = MODELS[name]().double().train(), batch(10, seed=5)
    y = torch.where(torch.rand(10, C, dtype=torch.float64) < 0.4, 1.0, 0.0)
    company(model, torch.where(y > 0, 1, -1))
    data = AssignmentBatch.build(5 * data.x, data.box, data.mask, data.label_vectors, neighbours=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = torch.tensor(0.0)
    for _ in range(600):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(data).logits, y)
        loss.backward()
        optimizer.step()
    # global pooling is linear in 8 means: what it cannot have by heart is no defect
    assert loss < (0.35 if name == "resnet101" else 0.02)


@every
def test_what_does_not_fit_is_said(name: str):
    model = made(name)
    data = batch()
    other = AssignmentBatch.build(data.x, data.box, data.mask, data.label_vectors[:-1], neighbours=None)
    with pytest.raises(ConfigError, match="4 labels, the model 5"):
        model(other)
    with pytest.raises(ConfigError, match="length 7"):
        model(AssignmentBatch.build(data.x[..., :-1], data.box, data.mask, data.label_vectors, neighbours=None))
    sizes = {"instance_dim": 0, "num_labels": C, "label_dim": W}
    with pytest.raises(ConfigError, match="1 or more"):
        create_model(name, **{key: sizes[key] for key in ("instance_dim", *registry.SIZES[name])})


def test_settings_that_cannot_work():
    for settings in ({"width": 10, "heads": 4}, {"width": 6, "heads": 2}, {"dropout": 1.0}, {"layers": 0}):
        with pytest.raises(ConfigError, match=r"model\.width"):
            Query2Label(D, C, **settings)
    with pytest.raises(ConfigError, match="neighbour_weight"):
        MLGCN(D, C, W, neighbour_weight=1.0)
    with pytest.raises(ConfigError, match="steps"):
        SSGRL(D, C, W, steps=0)


def test_company_by_hand():
    """Two of three images with label 0 have label 1; where 1 is difficult, it says nothing."""
    counted = LabelCompany(3)
    counted.count(torch.tensor([[1, 1, -1], [1, 1, -1], [1, -1, -1], [1, 0, -1], [-1, 1, -1]]))
    expected = torch.tensor([[1, 2 / 3, 0], [2 / 3, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(counted.probability, expected)
    assert "probability" in counted.state_dict()


def test_ml_gcns_matrix_against_loops():
    """Eq. 7 and 8 of the paper, written out."""
    rng = np.random.default_rng(0)
    targets = np.where(rng.random((60, 6)) < rng.random(6), 1, -1)
    model = MLGCN(D, 6, W, threshold=0.45, neighbour_weight=0.25).double()
    model.company.count(torch.from_numpy(targets))
    A = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            both = sum(row[i] == 1 and row[j] == 1 for row in targets)
            A[i, j] = i != j and both / max(sum(row[i] == 1 for row in targets), 1) >= 0.45
    weighted = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            if i != j and A[i, j]:
                weighted[i, j] = 0.25 / A[i].sum()
        weighted[i, i] = 0.75 if A[i].any() else 1.0
    assert A.any()
    D_half = np.diag(weighted.sum(axis=1) ** -0.5)
    np.testing.assert_allclose(model.adjacency().numpy(), D_half @ weighted @ D_half, rtol=1e-6)


def test_ml_gcns_classifiers_against_loops():
    model, data = made("ml_gcn"), batch()
    assert isinstance(model, MLGCN)
    A, Z = model.adjacency(), data.label_vectors
    first = torch.stack([sum(A[i, j] * (model.conv1.weight @ Z[j]) for j in range(C)) for i in range(C)])
    first = torch.where(first > 0, first, 0.2 * first)
    w = torch.stack([sum(A[i, j] * (model.conv2.weight @ first[j]) for j in range(C)) for i in range(C)])
    out = model(data)
    for b in range(3):
        pooled = data.x[b, data.mask[b]].max(dim=0).values
        torch.testing.assert_close(out.logits[b], w @ pooled)


def test_global_pooling_is_the_mean_of_its_map():
    model, data = made("resnet101"), batch()
    assert isinstance(model, GlobalPool)
    out = model(data)
    for b in range(3):
        mean = data.x[b, data.mask[b]].mean(dim=0)
        torch.testing.assert_close(out.logits[b], model.classifier(mean))
        torch.testing.assert_close(out.matches[b, data.mask[b]].mean(dim=0), out.logits[b])


def test_ssgrl_against_loops():
    """Eq. 2 to 8 of the paper for one image, label by label."""
    model, data = made("ssgrl"), batch(1)
    assert isinstance(model, SSGRL)
    x, words, P = data.x[0, data.mask[0]], data.label_vectors, model.company.probability
    features = []
    for c in range(C):
        e = torch.stack(
            [model.decoupling.attend(torch.tanh(model.decoupling.U(f) * model.decoupling.V(words[c]))) for f in x]
        ).flatten()
        features.append(sum(a * f for a, f in zip(e.softmax(dim=0), x, strict=True)))
    h = [f.clone() for f in features]
    Wz, Wr, Wh = model.graph.W.weight.chunk(3)
    bz, br, bh = model.graph.W.bias.chunk(3)
    Uz, Ur = model.graph.U_gates.weight.chunk(2)
    for _ in range(3):
        new = []
        for c in range(C):
            a = torch.cat([sum(P[c, d] * h[d] for d in range(C)), sum(P[d, c] * h[d] for d in range(C))])
            z = torch.sigmoid(Wz @ a + bz + Uz @ h[c])
            r = torch.sigmoid(Wr @ a + br + Ur @ h[c])
            tilde = torch.tanh(Wh @ a + bh + model.graph.U.weight @ (r * h[c]))
            new.append((1 - z) * h[c] + z * tilde)
        h = new
    logits = [model.weight[c] @ torch.tanh(model.out(torch.cat([h[c], features[c]]))) + model.bias[c] for c in range(C)]
    torch.testing.assert_close(model(data).logits[0], torch.stack(logits))


def test_query2label_knows_places():
    """Where a location stands changes what is said of it; in which order locations are listed does not."""
    model, data = made("query2label"), batch(1)
    order = torch.tensor([3, 1, 0, 2, 6, 5, 4])
    other = AssignmentBatch.build(data.x[:, order], data.box[:, order], data.mask, data.label_vectors, neighbours=None)
    torch.testing.assert_close(model(other).logits, model(data).logits)
    moved = AssignmentBatch.build(data.x, data.box.flip(1), data.mask, data.label_vectors, neighbours=None)
    assert (model(moved).logits - model(data).logits).abs().max() > 1e-3
    out = model(data)
    torch.testing.assert_close(out.matches.sum(dim=1), torch.ones(1, C, dtype=torch.float64))


def test_place_encoding():
    boxes = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.5, 0.25, 0.5, 0.25]])
    code = place_encoding(boxes, 8)
    assert code.shape == (2, 8)
    torch.testing.assert_close(code[0], code[1])  # the same centre
    x, y = 2 * np.pi * 0.5, 2 * np.pi * 0.25
    expected = [f(place / scale) for place in (x, y) for f in (np.sin, np.cos) for scale in (1, 100)]
    np.testing.assert_allclose(code[0].numpy(), expected, atol=1e-5)


@every
def test_parameters_are_drawn_anew(name: str):
    model = made(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    model.reset_parameters()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    # what begins at 1 (norms) and at 0 (biases) begins there again
    assert changed >= {key for key in before if key.endswith("weight") and "norm" not in key and "out_proj" not in key}
