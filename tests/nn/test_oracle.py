from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Image, Settings, oracle_forward, oracle_loss
from torch import Tensor
from torch_geometric.data import Batch, HeteroData

from gm_mlic.graphs import AssignmentBatch, AssignmentGraph
from gm_mlic.losses import WeightedBCE
from gm_mlic.nn import GMMLIC, ModelOutput

D_O, D_L = 5, 4
WIDTHS = {1: (5,), 2: (6, 5), 3: (6, 4, 5)}
LAYOUTS = ("sparse", "dense")
ABLATIONS = [
    dict(zip(("label_graph", "instance_graph", "matching_edges"), flags, strict=True))
    for flags in product((True, False), repeat=3)
]


def make_images(counts: list[int], seed: int = 0) -> list[Image]:
    rng = np.random.default_rng(seed)
    images = []
    for M in counts:
        corner = rng.uniform(0, 0.6, (M, 2))
        images.append(
            Image(rng.normal(size=(M, D_O)), np.concatenate([corner, corner + rng.uniform(0.05, 0.4, (M, 2))], axis=1))
        )
    return images


def make_labels(C: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(C, D_L))


def make_model(settings: Settings, seed: int = 0) -> GMMLIC:
    """Float64 model with random biases and norms, so that omitted ones are detected."""
    torch.manual_seed(seed)
    options: dict[str, Any] = settings.model_options()
    model = GMMLIC(D_O, D_L, widths=WIDTHS[settings.k], encoder_width=7, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        # Keep the decoder's hidden units active: otherwise logits are equal and rounding decides the argmax.
        model.decoder.lin1.lins[0].bias.add_(2.0)
    return model


def make_batch(settings: Settings, images: list[Image], W: np.ndarray, *, edge_attr: bool = False) -> HeteroData:
    options: dict[str, Any] = settings.graph_options()
    transform = AssignmentGraph(torch.from_numpy(W), edge_attr=edge_attr, **options)
    graphs = []
    for image in images:
        data = HeteroData()
        data["instance"].x = torch.from_numpy(image.features)
        data["instance"].box = torch.from_numpy(image.boxes)
        graphs.append(transform(data))
    return Batch.from_data_list(graphs)


def close(ours: Tensor, theirs: Any, tolerance: float = 1e-10) -> None:
    ours_np, theirs_np = ours.detach().numpy(), np.asarray(theirs)
    assert ours_np.shape == theirs_np.shape
    scale = max(1e-3, float(np.abs(theirs_np).max(initial=0.0)))
    np.testing.assert_allclose(ours_np / scale, theirs_np / scale, rtol=tolerance, atol=tolerance)


def check(settings: Settings, counts: list[int], C: int, layout: str, *, edge_attr: bool = False) -> None:
    images, W = make_images(counts), make_labels(C)
    model = make_model(settings)
    data: Any = make_batch(settings, images, W, edge_attr=edge_attr)
    output: ModelOutput = model(AssignmentBatch.from_hetero_data(data) if layout == "dense" else data)
    expected = oracle_forward(model.state_dict(), settings, images, W)

    assert output.match_logits.shape == (len(counts), max(counts), C)
    for ours, theirs, count in zip(output.match_logits, expected.match_logits, counts, strict=True):
        close(ours[:count], theirs)
        assert bool((ours[count:] == float("-inf")).all())
    close(output.logits, expected.logits)
    np.testing.assert_array_equal(output.argmax_instance.numpy(), expected.argmax_instance)

    rng = np.random.default_rng(2)
    targets, ratio = rng.choice([1, 0, -1], size=(len(counts), C)), rng.uniform(0.05, 0.9, C)
    loss = WeightedBCE(torch.from_numpy(ratio), beta=0.4, target_format="voc", allow_all_present=True)
    loss = loss.double()(output.logits, torch.from_numpy(targets))
    close(loss, oracle_loss(expected.logits, targets, ratio, 0.4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["none", "encoder", "all"])
@pytest.mark.parametrize("fusion", ["concat", "product"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_equals_the_equations(k: int, fusion: str, norm: str, layout: str) -> None:
    check(Settings(k=k, fusion=fusion, norm=norm, neighbors=2), [4, 1, 3], 3, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda flags: "".join("+-"[not on] for on in flags.values()))
@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_ablations_equal_the_equations(fusion: str, ablation: dict[str, bool], layout: str) -> None:
    check(Settings(fusion=fusion, norm="encoder", neighbors=2, **ablation), [4, 1, 3], 3, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("counts", "C"), [([1], 1), ([1, 1], 2), ([3, 2], 1), ([7, 2], 2), ([6], 4)])
def test_ragged_sizes_equal_the_equations(counts: list[int], C: int, layout: str) -> None:
    check(Settings(k=2, fusion="product", norm="all"), counts, C, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("label_neighbors", [1, 2, 9])
def test_sparse_label_graph_equals_the_equations(label_neighbors: int, layout: str) -> None:
    settings = Settings(k=2, norm="encoder", label_neighbors=label_neighbors, neighbors=3)
    check(settings, [5, 2], 4, layout)


@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_materialized_edge_attributes_equal_the_equations(fusion: str) -> None:
    settings = Settings(fusion=fusion, norm="encoder", neighbors=2)
    check(settings, [4, 1, 3], 3, "sparse", edge_attr=True)
    check(replace(settings, label_neighbors=1), [4, 1, 3], 3, "sparse", edge_attr=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_gradients_equal_finite_differences_of_the_oracle(fusion: str, layout: str) -> None:
    settings = Settings(fusion=fusion, norm="all", neighbors=2)
    images, W = make_images([3, 1, 2]), make_labels(3)
    model = make_model(settings)
    rng = np.random.default_rng(3)
    targets, ratio = rng.choice([1, -1], size=(3, 3)), rng.uniform(0.1, 0.9, 3)
    data: Any = make_batch(settings, images, W)
    output = model(AssignmentBatch.from_hetero_data(data) if layout == "dense" else data)
    WeightedBCE(torch.from_numpy(ratio), beta=0.4).double()(output.logits, torch.from_numpy(targets == 1)).backward()

    step = 1e-6
    weights = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = sorted(gradients)
    for name in rng.choice(names, size=18, replace=False):
        at = np.unravel_index(rng.integers(weights[name].size), weights[name].shape)
        losses = []
        for sign in (1, -1):
            weights[name][at] += sign * step
            outcome = oracle_forward(weights, settings, images, W)
            losses.append(oracle_loss(outcome.logits, targets, ratio, 0.4))
            weights[name][at] -= sign * step
        gradient = gradients[name]
        assert gradient is not None, f"{name} has no gradient"
        assert float(gradient[at]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ablation", [ABLATIONS[0], ABLATIONS[1], ABLATIONS[3]], ids=["full", "-ILM", "-Go-ILM"])
def test_gradcheck(ablation: dict[str, bool], layout: str) -> None:
    """Gradients of the features, boxes and label vectors of one graph."""
    settings = Settings(k=1, fusion="product", norm="encoder", neighbors=1, **ablation)
    model = make_model(settings)
    (image,), W = make_images([2]), make_labels(2)
    data = make_batch(settings, [image], W)

    def scores(x: Tensor, w: Tensor) -> Tensor:
        graph = data.clone()
        graph["instance"].x, graph["label"].x = x, w
        return model(AssignmentBatch.from_hetero_data(graph) if layout == "dense" else graph).match_logits

    x, w = (data[kind].x.double().requires_grad_() for kind in ("instance", "label"))
    assert torch.autograd.gradcheck(scores, (x, w))
