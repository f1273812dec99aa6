"""The detector's confidence as the start of the match logits, and what is learned beyond it.

All expected values are computed in numpy or torch from the formulas in the docstrings, with loops over images,
instances and labels.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor, nn
from torch_geometric.data import Batch, HeteroData

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs import MATCHES, AssignmentBatch, AssignmentGraph
from gm_mlic.nn import GMMLIC, DetectorLabels, DetectorPrior, LinearMatch, MatchHead, MILMax, Standardize
from gm_mlic.nn.scatter import scatter_logsumexp

Array = npt.NDArray[np.float64]
D_O, D_L, CLASSES = 5, 4, 3
LAYOUTS = ("sparse", "dense")
ALL: dict[str, Any] = {
    "prior": True, "linear": True, "class_words": CLASSES, "components": 3, "shrinkage": 7.0,
    "network_shrinkage": 20.0, "pooling": "logsumexp",
}  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Graphs and settings of a model."""
    C = draw(st.integers(1, 5))
    table = st.lists(st.lists(st.booleans(), min_size=C, max_size=C), min_size=CLASSES, max_size=CLASSES)
    return {
        "counts": draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)),
        "C": C,
        "class_labels": draw(table),
        "candidates": draw(st.none() | table),
        "label_counts": draw(st.lists(st.integers(0, 90), min_size=C, max_size=C)),
        "head": {
            "prior": draw(st.booleans()),
            "linear": draw(st.booleans()),
            "components": draw(st.sampled_from([None, 2, 9])),
            "shrinkage": draw(st.sampled_from([0.0, 5.0])),
            "network_shrinkage": draw(st.sampled_from([None, 0.0, 11.0])),
            "pooling": draw(st.sampled_from(["max", "logsumexp"])),
        },
        "class_words": draw(st.sampled_from([0, CLASSES])),
        "edge_types": [name for name in ("spatial", "semantic", "matches") if draw(st.booleans())],
        "seed": draw(st.integers(0, 10**6)),
    }


def mil_head(case: dict[str, Any]) -> dict[str, Any]:
    """The settings that MILMax has too: its network shares ``shrinkage``."""
    return {name: value for name, value in case["head"].items() if name != "network_shrinkage"}


def case_of(**changes: Any) -> dict[str, Any]:
    head = {name: value for name, value in ALL.items() if name != "class_words"}
    return {
        "counts": [4, 1, 3], "C": 4, "candidates": None, "label_counts": [0, 2, 30, 7], "head": head,
        "class_labels": [[True, True, False, False], [False, False, True, False], [False] * 4],
        "class_words": CLASSES, "edge_types": ["spatial", "semantic", "matches"], "seed": 5,
    } | changes  # fmt: skip


def instances(M: int, seed: int, dtype: torch.dtype = torch.float64) -> HeteroData:
    """Instances with detected labels from -1 on, and scores that include exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    data = HeteroData()
    data["instance"].x = torch.randn(M, D_O, generator=generator, dtype=torch.float64).to(dtype)
    corner, size = torch.rand(2, M, 2, generator=generator, dtype=torch.float64) / 2
    data["instance"].box = torch.cat([corner, corner + size + 0.01], dim=1).to(dtype)
    data["instance"].detected_label = torch.randint(-1, CLASSES, (M,), generator=generator)
    score = torch.rand(M, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 4, (M,), generator=generator)
    data["instance"].score = score.where(kind > 1, kind.double()).to(dtype)
    return data


def vectors(C: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(C, D_L, generator=torch.Generator().manual_seed(seed + 77), dtype=torch.float64).to(dtype)


def transform(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> AssignmentGraph:
    candidates = case["candidates"]
    return AssignmentGraph(
        vectors(case["C"], case["seed"], dtype),
        num_neighbors=2,
        edge_types=case["edge_types"],
        candidates=None if candidates is None else torch.tensor(candidates),
        class_labels=torch.tensor(case["class_labels"]),
        label_counts=torch.tensor(case["label_counts"]),
    )


def graphs(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> Batch:
    graph = transform(case, dtype)
    return Batch.from_data_list([graph(instances(M, case["seed"] + b, dtype)) for b, M in enumerate(case["counts"])])


def as_layout(data: HeteroData, layout: str) -> Any:
    return data if layout == "sparse" else AssignmentBatch.from_hetero_data(data)


def network(case: dict[str, Any], *, trained: bool = True, **options: Any) -> GMMLIC:
    torch.manual_seed(case["seed"])
    net = GMMLIC(
        D_O, D_L, widths=(6, 5), encoder_width=6, edge_types=case["edge_types"],
        **case["head"], class_words=case["class_words"], **options,
    ).double()  # fmt: skip
    fitted(net, case)
    return perturbed(net) if trained else net


def fitted(net: Any, case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(50, D_O, generator=generator, dtype=torch.float64) * 2 + 1
    words = torch.randn(CLASSES, D_L, generator=generator, dtype=torch.float64)
    net.fit_features(features, vectors(case["C"], case["seed"]), words)


def perturbed(net: Any) -> Any:
    with torch.no_grad():
        for parameter in net.parameters():  # so that zero weights cannot hide a difference
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def outputs_and_gradients(net: nn.Module, data: Any, **arguments: Any) -> tuple[Any, dict[str, Tensor]]:
    net.zero_grad()
    output = net(data, **arguments)
    matches = output.match_logits[output.match_logits.isfinite()]
    weights = torch.linspace(-1, 2, matches.numel(), dtype=matches.dtype)
    (matches @ weights + output.logits.square().sum()).backward()
    return output, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}


def assert_equal(a: tuple[Any, dict[str, Tensor]], b: tuple[Any, dict[str, Tensor]]) -> None:
    close(a[0].match_logits, b[0].match_logits)
    close(a[0].logits, b[0].logits)
    for x, y in ((a[0], b[0]), (b[0], a[0])):  # instances may be equal up to rounding, and either one the largest
        best = x.match_logits.gather(1, y.argmax_instance.unsqueeze(1)).squeeze(1)
        close(best, x.match_logits.amax(dim=1))
    scale = max(1.0, *(float(g.abs().max()) for g in b[1].values()))
    for name, gradient in a[1].items():
        torch.testing.assert_close(
            gradient, b[1][name], rtol=1e-10, atol=1e-10 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def close(a: Tensor, b: Tensor | Array) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b), rtol=1e-10, atol=1e-10)


# The formulas


def logit(q: float) -> float:
    q = min(max(q, 0.001), 0.999)
    return math.log(q) - math.log1p(-q)


def normalized(w: Array, center: Array) -> Array:
    return np.stack([(v - center) / np.linalg.norm(v - center) for v in w])


def confidence(case: dict[str, Any], data: HeteroData) -> Array:
    """Confidences (M, C) of the matches of one image."""
    found = data["instance"]
    return np.array(
        [
            [float(s) if d >= 0 and case["class_labels"][d][c] else 0.0 for c in range(case["C"])]
            for d, s in zip(found.detected_label.tolist(), found.score.tolist(), strict=True)
        ]
    )


def prior_by_hand(prior: DetectorPrior, q: Array, w: Array) -> Array:
    alpha, floor = 10 * prior.alpha.item(), 10 * prior.floor.item()
    bias = 10 * (w @ prior.bias.weight.detach().numpy()[0] + prior.bias.bias.item())
    out = np.zeros(q.shape)
    for i, c in np.ndindex(q.shape):
        out[i, c] = (alpha * logit(q[i, c]) if q[i, c] > 0 else floor) + bias[c]
    return out


def linear_by_hand(linear: LinearMatch, x: Array, box: Array, q: Array, w: Array) -> Array:
    A, G, H = (lin.weight.detach().numpy() for lin in (linear.instance, linear.detected, linear.image))
    a = np.array([math.sqrt((x2 - x1 + 0.02) * (y2 - y1 + 0.02)) for x1, y1, x2, y2 in box])
    mean = sum(a[i] * x[i] for i in range(len(x))) / a.sum()
    out = np.zeros(q.shape)
    for i, c in np.ndindex(q.shape):
        out[i, c] = 3 * (A @ x[i] + (q[i, c] > 0) * (G @ x[i]) + H @ mean) @ w[c]
    return out


def standardized(standardize: Standardize, x: Array) -> Array:
    z = np.clip((x - standardize.mean.numpy()) * standardize.scale.numpy(), -6, 6)
    return z if standardize.axes is None else z @ standardize.axes.numpy().T


def shares(head: MatchHead, case: dict[str, Any], tau: float) -> Array:
    """h_c: 1 without a prior, for labels that are no class, and without shrinkage."""
    with_class = np.array(case["class_labels"]).any(axis=0)
    n = np.array(case["label_counts"], dtype=np.float64)
    if head.prior is None or tau == 0:
        return np.ones(n.shape)
    return np.where(with_class, n / (n + tau), 1.0)


def head_by_hand(head: MatchHead, case: dict[str, Any], data: HeteroData, r: Array) -> Array:
    """Match logits (M, C) of one image from the network's logits r (M, C)."""
    x, q = data["instance"].x.numpy(), confidence(case, data)
    x = x if head.standardize is None else standardized(head.standardize, x)
    w = vectors(case["C"], case["seed"]).numpy()
    if head.prior is not None or head.linear is not None:
        w = normalized(w, head.center.numpy())
    r = r * shares(head, case, head.network_shrinkage)
    if head.linear is not None:
        linear = linear_by_hand(head.linear, x, data["instance"].box.numpy(), q, w)
        r = r + linear * shares(head, case, head.shrinkage)
    return r if head.prior is None else r + prior_by_hand(head.prior, q, w)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(case=cases())
def test_head_computes_its_formula(layout: str, case: dict[str, Any]) -> None:
    """All matching edges, for network logits that are random numbers."""
    data = graphs(case)
    options = {name: value for name, value in case["head"].items() if name != "pooling"}
    torch.manual_seed(case["seed"])
    head = perturbed(MatchHead(D_O, D_L, **options).double())
    features = torch.randn(40, D_O, dtype=torch.float64) + 2
    # One label, or equal ones, have no direction after centering.
    head.fit(features, torch.cat([vectors(case["C"], case["seed"]), torch.ones(2, D_L)]))
    batch = as_layout(data, layout)
    source, target = data[MATCHES].edge_index
    dense_r = torch.randn(len(case["counts"]), max(case["counts"]), case["C"], dtype=torch.float64)
    image, start = target // case["C"], torch.tensor([0, *case["counts"]]).cumsum(0)
    edges = (image, source - start[image], target % case["C"])
    r, w = (dense_r[edges], batch.x_dict["label"]) if layout == "sparse" else (dense_r, batch.x_dict["label"])
    found = head(r, head.features(batch.x_dict["instance"]), w, batch)
    for b, alone in enumerate(data.to_data_list()):
        expected = torch.from_numpy(head_by_hand(head, case, alone, dense_r[b, : case["counts"][b]].numpy()))
        on = image == b
        i, c = edges[1][on], edges[2][on]
        close(found[on] if layout == "sparse" else found[b, i, c], expected[i, c])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_model_computes_the_head_of_its_network(layout: str) -> None:
    """The same weights without head, on features transformed by hand, give the network's logits r."""
    case = case_of()
    net = network(case)
    assert net.head.standardize is not None
    plain = GMMLIC(
        3 + D_L + 1, D_L, widths=(6, 5), encoder_width=6, edge_types=case["edge_types"], pooling="logsumexp"
    ).double()
    missing = plain.load_state_dict(net.state_dict(), strict=False)
    assert missing.missing_keys == []
    assert all(name.startswith(("head.", "class_vectors")) for name in missing.unexpected_keys)
    output = net(as_layout(graphs(case), layout))
    for b, data in enumerate(graphs(case).to_data_list()):
        found = data["instance"]
        x = standardized(net.head.standardize, found.x.numpy())
        words = np.stack(
            [net.class_vectors[d].numpy() if d >= 0 else np.zeros(D_L) for d in found.detected_label.tolist()]
        )
        changed = data.clone()
        changed["instance"].x = torch.from_numpy(np.concatenate([x, words, found.score.numpy()[:, None]], axis=1))
        with torch.no_grad():
            r = plain(changed).match_logits[0].numpy()
        expected = head_by_hand(net.head, case, data, r)
        close(output.match_logits[b, : len(x)], expected)
        close(output.logits[b], logsumexp(expected, axis=0))
        assert output.argmax_instance[b].tolist() == expected.argmax(axis=0).tolist()


@settings(max_examples=20, deadline=None)
@given(case=cases())
@pytest.mark.parametrize("width", [6, None])
def test_mil_max_computes_its_formula(width: int | None, case: dict[str, Any]) -> None:
    """The label vectors of the head are one-hot; the network is a classifier of single instances."""
    C, head = case["C"], mil_head(case)
    if width is None and not head["prior"] and not head["linear"]:
        head["prior"] = True
    torch.manual_seed(case["seed"])
    net = perturbed(MILMax(D_O, C, width, **head).double())
    fitted(net, case)
    data = graphs(case)
    outputs = {layout: outputs_and_gradients(net, as_layout(data, layout)) for layout in LAYOUTS}
    assert_equal(outputs["dense"], outputs["sparse"])
    w = np.eye(C)
    for b, alone in enumerate(data.to_data_list()):
        x, box, q = alone["instance"].x.numpy(), alone["instance"].box.numpy(), confidence(case, alone)
        x = x if net.head.standardize is None else standardized(net.head.standardize, x)
        s = np.zeros(q.shape)
        if width is not None:
            with torch.no_grad():
                standard = torch.from_numpy((box - 0.5) * math.sqrt(12))
                s = net.decoder(net.encoder(torch.from_numpy(x), standard)).numpy()
        s = s if net.head.linear is None else s + linear_by_hand(net.head.linear, x, box, q, w)
        s = s * shares(net.head, case, net.head.shrinkage)
        s = s if net.head.prior is None else s + prior_by_hand(net.head.prior, q, w)
        edges = np.zeros(q.shape, dtype=bool)
        edges[tuple(alone[MATCHES].edge_index.numpy())] = True
        s = np.where(edges, s, -np.inf)
        expected = s.max(axis=0) if head["pooling"] == "max" else logsumexp(s, axis=0)
        close(outputs["dense"][0].logits[b], expected)


# Layouts


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_dense_equals_sparse(case: dict[str, Any]) -> None:
    data, net = graphs(case), network(case)
    assert_equal(outputs_and_gradients(net, AssignmentBatch.from_hetero_data(data)), outputs_and_gradients(net, data))


def padded(case: dict[str, Any]) -> AssignmentBatch:
    """The batch of :func:`graphs`, from padded tensors whose padding is garbage."""
    graph, found = transform(case), [instances(M, case["seed"] + b) for b, M in enumerate(case["counts"])]
    shape = len(found), max(case["counts"]) + 2
    tensors = {
        "x": torch.full((*shape, D_O), torch.nan, dtype=torch.float64),
        "box": torch.full((*shape, 4), 9.0, dtype=torch.float64),
        "score": torch.full(shape, torch.nan, dtype=torch.float64),
        "detected_label": torch.full(shape, 2),
    }
    mask = torch.zeros(shape, dtype=torch.bool)
    for b, data in enumerate(found):
        M = len(data["instance"].x)
        mask[b, :M] = True
        for name, tensor in tensors.items():
            tensor[b, :M] = data["instance"][name]
    return AssignmentBatch.from_padded(
        **tensors,
        mask=mask,
        label_vectors=graph.label_vectors,
        num_neighbors=2,
        edge_types=case["edge_types"],
        candidates=graph.candidates,
        class_labels=graph.class_labels,
        label_counts=graph.label_counts,
    )


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_padded_batch_equals_its_graphs(case: dict[str, Any]) -> None:
    case = case | {"class_words": 0}  # the words of padded instances are read
    net = network(case)
    (ours, ours_gradients), (theirs, gradients) = (
        outputs_and_gradients(net, data) for data in (padded(case), graphs(case))
    )
    M = max(case["counts"])
    assert bool(ours.match_logits[:, M:].isneginf().all())
    close(ours.match_logits[:, :M], theirs.match_logits)
    close(ours.logits, theirs.logits)
    scale = max(1.0, *(float(g.abs().max()) for g in gradients.values()))
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours_gradients[name], gradient, rtol=1e-10, atol=1e-10 * scale)


@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_gradient_checkpointing_and_label_cache_give_equal_results(case: dict[str, Any]) -> None:
    data, net = graphs(case), network(case)
    recomputed = network(case, gradient_checkpointing=True)
    for layout in LAYOUTS:
        batch = as_layout(data, layout)
        assert_equal(outputs_and_gradients(recomputed, batch), outputs_and_gradients(net, batch))
    cache = net.precompute_labels(batch)
    assert_equal(outputs_and_gradients(net, batch, label_cache=cache), outputs_and_gradients(net, batch))


def test_checkpointed_parts_of_a_batch_keep_their_confidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images in three parts; C = B, so tables of labels and of images have the same length."""
    monkeypatch.setattr("gm_mlic.nn.gm_mlic.CHECKPOINTED_EDGES", 1)
    case = case_of(C=3, label_counts=[1, 5, 20], class_labels=[[True, False, True], [False] * 3, [False, True, False]])
    batch = as_layout(graphs(case), "dense")
    assert_equal(
        outputs_and_gradients(network(case, gradient_checkpointing=True), batch),
        outputs_and_gradients(network(case), batch),
    )


class Clipped(nn.Module):
    """A dropout without randomness."""

    p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.clamp(min=-0.3)


@settings(max_examples=25, deadline=None)
@given(case=cases(), checkpointing=st.booleans())
def test_dropout_of_decoder_inputs_is_that_of_their_values(case: dict[str, Any], checkpointing: bool) -> None:
    data, net = graphs(case), network(case, gradient_checkpointing=checkpointing)
    net.train().dropout = Clipped()
    sparse, dense = (outputs_and_gradients(net, as_layout(data, layout)) for layout in LAYOUTS)
    assert_equal(dense, sparse)
    torch.testing.assert_close(net.eval()(data).logits, net(as_layout(data, "dense")).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("edge_types", [["spatial", "semantic", "matches"], ["spatial", "semantic"], []])
def test_dropout_in_training_only(edge_types: list[str], layout: str) -> None:
    case = case_of(edge_types=edge_types)
    net, batch = network(case, dropout=0.5), as_layout(graphs(case), layout)
    first, second = (net.train()(batch).logits for _ in range(2))
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.decoder.parameters())
    first, second = (net.eval()(batch).logits for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, network(case)(batch).logits)


# Before training


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", ["gm_mlic", "mil_max", "mil_max without network"])
def test_untrained_model_ranks_images_as_the_detector_does(make: str, layout: str) -> None:
    names = [f"label {c}" for c in range(CLASSES)]
    eye = torch.eye(CLASSES, dtype=torch.bool).tolist()
    case = case_of(counts=[3] * 12, C=CLASSES, class_labels=eye, label_counts=[3, 0, 40])
    case["head"]["pooling"] = "max"
    batch = graphs(case)
    batch["instance"].score = batch["instance"].score * 0.99 + 0.005  # within the range of the clamp
    found, edges = batch["instance"], batch[MATCHES]
    q = torch.where(found.detected_label[:, None] == torch.arange(CLASSES), found.score[:, None], 0)
    edges.confidence = q[edges.edge_index[0], edges.edge_index[1] % CLASSES]
    if make == "gm_mlic":
        net: nn.Module = network(case, trained=False)
    else:
        net = MILMax(D_O, CLASSES, 6 if make == "mil_max" else None, **mil_head(case)).double()
    ours, detector = net(as_layout(batch, layout)).logits, DetectorLabels(names, names).double()(batch).logits
    assert len(set(detector[:, 0].tolist())) > 4
    torch.testing.assert_close(ours, detector, rtol=1e-6, atol=1e-6)
    first, second = torch.triu_indices(12, 12, offset=1)
    assert torch.equal((ours[first] - ours[second]).sign(), (detector[first] - detector[second]).sign())


def test_every_parameter_gets_a_gradient_after_one_step() -> None:
    """The last Linear of the decoder starts at zero, so that functions before it have no gradient in the first step."""
    case = case_of(counts=[5, 4, 6], label_counts=[3, 2, 30, 7])
    net, batch = network(case, trained=False), as_layout(graphs(case), "dense")
    assert not net.decoder.lin2.weight.any()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        net(batch).logits.sin().sum().backward()
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        head = [name for name, gradient in gradients.items() if gradient is not None and bool(gradient.any())]
        assert {"head.prior.alpha", "head.prior.floor", "head.linear.image.weight", "decoder.lin2.weight"} <= {*head}
        assert ("encoder.x.instance.lin2.weight" in head) == (step == 1)
        optimizer.step()
    assert [name for name, gradient in gradients.items() if gradient is None or not bool(gradient.any())] == []


def test_a_label_without_training_images_keeps_the_detectors_logits() -> None:
    case = case_of(label_counts=[0, 2, 30, 7])
    case["head"] = case["head"] | {"pooling": "max"}
    net = network(case)
    start = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if not name.startswith("head.prior"):
                parameter.add_(torch.randn_like(parameter))
    before, after = (n(as_layout(graphs(case), "dense")).logits for n in (start, net))
    close(after[:, 0], before[:, 0])
    assert not torch.isclose(after[:, 1:], before[:, 1:]).any()


def test_reset_parameters() -> None:
    net = network(case_of())
    statistics = {name: value.clone() for name, value in net.named_buffers()}
    net.reset_parameters()
    prior, linear = net.head.prior, net.head.linear
    assert prior is not None
    assert linear is not None
    assert 10 * prior.alpha.item() == pytest.approx(1)
    assert 10 * prior.floor.item() == pytest.approx(math.log(0.001 / 0.999))
    assert not any(p.any() for p in (*prior.bias.parameters(), *linear.parameters(), net.decoder.lin2.weight))
    assert all(torch.equal(value, statistics[name]) for name, value in net.named_buffers())
    mil = perturbed(MILMax(D_O, 3, width=4, prior=True, linear=True))
    mil.reset_parameters()
    assert not any(p.any() for p in (mil.decoder.lin2.weight, *mil.head.linear.parameters()))
    assert GMMLIC(D_O, D_L, linear=True).decoder.lin2.weight.any()


def test_model_without_settings_is_the_papers() -> None:
    """No parameter or buffer is added."""
    net = GMMLIC(D_O, D_L)
    assert list(net.head.state_dict()) == []
    assert net.penalty() == 0
    r = torch.randn(4)
    data = transform(case_of())(instances(1, 0))
    assert torch.equal(net.head(r, data["instance"].x, data["label"].x, data), r)


# Standardized features


@pytest.mark.parametrize("components", [1, 3, 6])
def test_axes_are_principal_components(components: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (400, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
    module = Standardize(6, components).double()
    module.fit(torch.from_numpy(x))
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    assert abs(z).max() < 6
    values, axes = np.linalg.eigh(np.cov(z.T, bias=True))
    axes = axes[:, ::-1][:, :components]
    ours = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(abs((ours * (z @ axes)).sum(axis=0)), 400 * values[::-1][:components], rtol=1e-8)
    np.testing.assert_allclose(ours.var(axis=0), values[::-1][:components], rtol=1e-8)
    np.testing.assert_allclose(module.axes.numpy() @ module.axes.numpy().T, np.eye(components), atol=1e-12)


def test_standardized_features_without_axes() -> None:
    x = torch.randn(300, 4, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3
    x[0, 0], x[:, 3] = 1e6, 2.0  # an outlier, a constant
    module = Standardize(4).double()
    module.fit(x)
    z = module(x)
    close(z[:, 1].mean(), torch.tensor(0.0, dtype=torch.float64))
    close(z[:, 1].std(correction=0), torch.tensor(1.0, dtype=torch.float64))
    assert float(z[0, 0]) == 6
    assert not z[:, 3].any()
    assert module.axes is None
    assert repr(module) == "Standardize(4, 4)"


def test_more_components_than_features_are_all_of_them() -> None:
    head = MatchHead(D_O, D_L, components=50)
    assert head.out_channels == D_O
    assert repr(head.standardize) == "Standardize(5, 5)"


def test_statistics_of_a_model_without_fit_are_neutral() -> None:
    """Unit scale, no shift, orthonormal axes: a model with random weights computes something sensible."""
    x = torch.rand(7, D_O)
    standardize = Standardize(D_O, D_O)
    torch.testing.assert_close(standardize(x).norm(dim=1), x.norm(dim=1))


# Pooling


@given(st.lists(st.integers(0, 4), min_size=5, max_size=12), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_scattered_logsumexp(index: list[int], seed: int) -> None:
    groups = torch.tensor([0, 1, 2, 3, 4, *index])
    values = torch.randn(len(groups), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 50
    values.requires_grad_()
    largest = torch.stack([values[groups == g].max() for g in range(5)]).detach()
    found = scatter_logsumexp(values, groups, largest)
    expected = torch.stack([torch.logsumexp(values[groups == g], dim=0) for g in range(5)])
    close(found, expected)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(v @ weights, values, retain_graph=True)[0] for v in (found, expected))
    close(ours, theirs)


@pytest.mark.parametrize("pooling", ["max", "logsumexp"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("where", ["x", "score"])
def test_nan_shows(where: str, layout: str, pooling: str) -> None:
    case = case_of()
    case["head"] = case["head"] | {"pooling": pooling}
    data, net = graphs(case), network(case)
    data["instance"][where][0] = torch.nan
    output = net(as_layout(data, layout))
    assert bool(output.logits[0].isnan().all())
    assert bool(output.logits[1:].isfinite().all())


def test_logsumexp_of_one_instance_is_its_logit() -> None:
    case = case_of(counts=[1, 1])
    for layout in LAYOUTS:
        output = network(case)(as_layout(graphs(case), layout))
        close(output.logits, output.match_logits[:, 0])


# Precision


@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", ["gm_mlic", "mil_max"])
def test_autocast_keeps_float32_logits(make: str, layout: str, inputs: torch.dtype) -> None:
    """Prior, linear classifier and standardization have the precision of the parameters."""
    case = case_of()
    if make == "gm_mlic":
        net = network(case).float()
        with torch.no_grad():
            net.decoder.lin2.weight.zero_()  # only the head is left, which must be exact
    else:
        net = perturbed(MILMax(D_O, 4, None, **mil_head(case)))
        fitted(net, case)
    data = as_layout(graphs(case, inputs), layout)
    exact = net(data.to(torch.float32) if layout == "dense" else data.clone().apply(to_float))
    with torch.autocast("cpu", torch.bfloat16):
        output = net(data)
    assert output.logits.dtype == output.match_logits.dtype == torch.float32
    torch.testing.assert_close(output.logits, exact.logits, rtol=1e-5, atol=1e-5)
    output.logits.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())


def to_float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(layout: str, dtype: torch.dtype) -> None:
    """Scores of exactly 1 and counts beyond the range of float16 give finite logits."""
    case = case_of(label_counts=[0, 2, 100_000, 7])
    data = graphs(case)
    data["instance"].score[:2], data["instance"].detected_label[:2] = 1, torch.tensor([0, 1])
    graph = transform(case)
    data = Batch.from_data_list([graph(part) for part in data.to_data_list()])
    with torch.no_grad():
        expected = network(case)(data).match_logits
    half = data.clone().apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
    with torch.no_grad():
        output = network(case).to(dtype)(as_layout(half, layout))
    assert output.logits.dtype == output.match_logits.dtype == dtype
    assert torch.equal(output.match_logits.isfinite(), expected.isfinite())
    on = expected.isfinite()
    scale = float(expected[on].abs().max())
    assert float((output.match_logits[on] - expected[on]).abs().max()) < scale * (
        0.1 if dtype == torch.bfloat16 else 0.02
    )


def test_one_label_has_no_direction_after_centering() -> None:
    """Its centered vector is zero, in half precision too."""
    case = case_of(C=1, label_counts=[4], class_labels=[[True], [False], [False]])
    data, net = graphs(case), network(case)
    assert bool(net(data).logits.isfinite().all())
    half = data.clone().apply(lambda value: value.half() if value.is_floating_point() else value)
    assert bool(net.half()(half).logits.isfinite().all())


# Compilation


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_to_one_graph(layout: str) -> None:
    case = case_of()
    net, data = network(case), as_layout(graphs(case), layout)
    torch._dynamo.reset()
    output, expected = torch.compile(net, backend="eager", fullgraph=True)(data), net(data)
    close(output.logits, expected.logits)
    close(output.match_logits, expected.match_logits)


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """Outputs and gradients with the default backend (needs a C++ compiler), called as in the trainer."""
    case = case_of()
    net, batch = network(case), as_layout(graphs(case), "dense")
    eager = outputs_and_gradients(net, batch)
    torch._dynamo.reset()
    net.compile(fullgraph=True, dynamic=True)
    assert_equal(outputs_and_gradients(net, batch), eager)


# Penalty and errors


def test_penalty_is_half_the_ridge_times_the_squares() -> None:
    net = GMMLIC(D_O, D_L, linear=True, ridge=40.0)
    perturbed(net)
    linear = net.head.linear
    assert linear is not None
    squares = sum(float((weight.detach().numpy() ** 2).sum()) for weight in linear.parameters())
    assert float(net.penalty()) == pytest.approx(20 * 9 * squares, rel=1e-5)
    assert MILMax(D_O, 3, prior=True).penalty() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": True, "label_dim": -1}, "prior needs instance_dim and label_dim"),
        ({"linear": True, "instance_dim": -1}, "linear needs instance_dim and label_dim"),
        ({"class_words": 3, "label_dim": -1}, "class_words needs instance_dim and label_dim"),
        ({"class_words": -1}, "class_words must be true or false, or an integer of at least 0; got -1"),
        ({"components": 0}, "components must be an integer of at least 1, or None; got 0"),
        ({"components": 4, "instance_dim": -1}, "components needs instance_dim, not -1"),
        ({"shrinkage": -1.0}, "shrinkage must be a number of at least 0; got -1.0"),
        ({"network_shrinkage": -1.0}, "network_shrinkage must be a number of at least 0, or None; got -1.0"),
        ({"ridge": float("nan")}, "ridge must be a number of at least 0; got nan"),
        ({"pooling": "mean"}, "pooling must be one of max, logsumexp"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GMMLIC(**{"instance_dim": D_O, "label_dim": D_L, **arguments})


def test_model_with_nothing_to_compute() -> None:
    with pytest.raises(ArgumentError, match="width is None"):
        MILMax(D_O, 3, None)
    with pytest.raises(ArgumentError, match="must be 1 to 4, got 5"):
        Standardize(4, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_without_the_tables_of_the_model(layout: str) -> None:
    data = AssignmentGraph(vectors(4), num_neighbors=2)(instances(3, 0))
    classes = AssignmentGraph(vectors(4), num_neighbors=2, class_labels=torch.eye(4).bool())(instances(3, 0))
    with pytest.raises(ConfigError, match="give AssignmentGraph label_counts"):
        GMMLIC(D_O, D_L, widths=(4, 4), prior=True, shrinkage=3.0).double()(as_layout(classes, layout))
    for options, message in (
        ({"prior": True}, "give AssignmentGraph class_labels"),
        ({"linear": True}, "give AssignmentGraph class_labels"),
    ):
        with pytest.raises(ConfigError, match=message):
            GMMLIC(D_O, D_L, widths=(4, 4), **options).double()(as_layout(data, layout))
    del data["instance"].score
    with pytest.raises(ConfigError, match="no score and detected_label"):
        GMMLIC(D_O, D_L, widths=(4, 4), class_words=CLASSES).double()(as_layout(data, layout))


def test_stored_attributes_of_matching_edges_are_refused() -> None:
    """They hold the features before standardization, and without class words."""
    data = AssignmentGraph(vectors(4), num_neighbors=2, edge_attr=True)(instances(3, 0))
    assert bool(GMMLIC(D_O, D_L, widths=(4, 4)).double()(data).logits.isfinite().all())
    for options in ({"components": 2}, {"class_words": CLASSES}):
        with pytest.raises(ConfigError, match="edge_attr=False"):
            GMMLIC(D_O, D_L, widths=(4, 4), **options).double()(data)
