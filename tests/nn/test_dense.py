"""Sparse and dense graphs give equal outputs and gradients for all shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch_geometric.data import Batch, HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs import SEMANTIC, SPATIAL, AssignmentBatch, AssignmentGraph, drop_edges
from gm_mlic.nn import GMMLIC, ModelOutput

D_O, D_L = 5, 4


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a network and its batch."""
    k = draw(st.integers(1, 3))
    C = draw(st.integers(1, 6))
    return {
        "counts": draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)),
        "C": C,
        "neighbors": draw(st.integers(1, 4)),
        "label_neighbors": draw(st.sampled_from([None, *range(1, C)])),
        "candidates": draw(
            st.none() | st.lists(st.lists(st.booleans(), min_size=C, max_size=C), min_size=3, max_size=3)
        ),
        "net": {
            "k": k,
            "widths": draw(st.lists(st.integers(1, 7), min_size=k, max_size=k)),
            "encoder_width": draw(st.integers(1, 7)),
            "fusion": draw(st.sampled_from(["concat", "product"])),
            "norm": draw(st.sampled_from(["none", "encoder", "all"])),
            "edge_types": [name for name in ("spatial", "semantic", "matches") if draw(st.booleans())],
        },
        "seed": draw(st.integers(0, 10**6)),
    }


def graphs(case: dict[str, Any]) -> Batch:
    generator = torch.Generator().manual_seed(case["seed"])
    W = torch.randn(case["C"], D_L, generator=generator, dtype=torch.float64)
    net = case["net"]
    transform = AssignmentGraph(
        W,
        num_neighbors=case["neighbors"],
        num_label_neighbors=case["label_neighbors"],
        edge_types=net["edge_types"],
        candidates=None if case.get("candidates") is None else torch.tensor(case["candidates"]),
        edge_attr=False,
    )
    made = []
    for M in case["counts"]:
        data = HeteroData()
        data["instance"].x = torch.randn(M, D_O, generator=generator, dtype=torch.float64)
        corner, size = torch.rand(2, M, 2, generator=generator, dtype=torch.float64) / 2
        data["instance"].box = torch.cat([corner, corner + size + 0.01], dim=1)
        data["instance"].detected_label = torch.randint(-1, 3, (M,), generator=generator)
        made.append(transform(data))
    return Batch.from_data_list(made)


def network(case: dict[str, Any], **options: Any) -> GMMLIC:
    torch.manual_seed(case["seed"])
    net = GMMLIC(D_O, D_L, **case["net"], **options).double()
    with torch.no_grad():
        for parameter in net.parameters():  # random biases and norms, so that omitted ones are detected
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


def outputs_and_gradients(net: GMMLIC, data: Any, **arguments: Any) -> tuple[ModelOutput, dict[str, Tensor]]:
    net.zero_grad()
    output = net(data, **arguments)
    matches = output.match_logits[output.match_logits.isfinite()]
    weights = torch.linspace(-1, 2, matches.numel(), dtype=torch.float64)
    (matches @ weights + output.logits.square().sum()).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    return output, gradients


def assert_equal(a: tuple[ModelOutput, dict[str, Tensor]], b: tuple[ModelOutput, dict[str, Tensor]]) -> None:
    close(a[0].match_logits, b[0].match_logits)
    close(a[0].logits, b[0].logits)
    assert a[1].keys() == b[1].keys()
    # Gradients are compared relative to the largest one, since cancellation to zero leaves no significant digits.
    scale = max(float(g.abs().max()) for g in b[1].values())
    for name, gradient in a[1].items():
        torch.testing.assert_close(
            gradient, b[1][name], rtol=1e-10, atol=1e-10 * max(scale, 1), msg=lambda m, n=name: f"{n}: {m}"
        )


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def dense(data: HeteroData) -> AssignmentBatch:
    return AssignmentBatch.from_hetero_data(data)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_dense_equals_sparse(case: dict[str, Any]) -> None:
    data, net = graphs(case), network(case)
    assert_equal(outputs_and_gradients(net, dense(data)), outputs_and_gradients(net, data))


@given(cases())
@settings(max_examples=25, deadline=None)
def test_graphs_without_a_spatial_edge(case: dict[str, Any]) -> None:
    """Sparse and dense, converted before or after; functions of these edges get zero gradients."""
    data, net = graphs(case), network(case)
    batch = dense(data)
    expected = outputs_and_gradients(net, drop_edges(data, SPATIAL))
    assert_equal(outputs_and_gradients(net, drop_edges(batch, SPATIAL)), expected)
    assert_equal(outputs_and_gradients(net, dense(drop_edges(data, SPATIAL))), expected)
    for name, gradient in expected[1].items():
        assert "spatial" not in name or not gradient.any(), name
    if SPATIAL in data.edge_types and data[SPATIAL].edge_index.numel():
        assert batch.edge_index_dict[SPATIAL].mask.any()  # the batch itself is unchanged


@given(cases())
@settings(max_examples=25, deadline=None)
def test_gradient_checkpointing_gives_equal_results(case: dict[str, Any]) -> None:
    data = graphs(case)
    for graph in (data, dense(data)):
        kept, recomputed = (network(case, gradient_checkpointing=flag) for flag in (False, True))
        assert_equal(outputs_and_gradients(recomputed, graph), outputs_and_gradients(kept, graph))


@given(cases())
@settings(max_examples=25, deadline=None)
def test_label_cache_gives_equal_results(case: dict[str, Any]) -> None:
    batch, net = dense(graphs(case)), network(case)
    cache = net.precompute_labels(batch)
    assert_equal(outputs_and_gradients(net, batch, label_cache=cache), outputs_and_gradients(net, batch))


def test_label_cache_keeps_products_of_weights() -> None:
    """They are computed in the first pass without gradients, and are not used with gradients."""
    case = plain_case()
    batch, net = dense(graphs(case)), network(case)
    cache, expected = net.precompute_labels(batch), outputs_and_gradients(net, batch)
    with torch.no_grad():
        close(net(batch, cache).logits, expected[0].logits)
        kept = dict(cache.compositions)
        assert len(kept) >= 4
        close(net(batch, cache).logits, expected[0].logits)
    assert all(cache.compositions[key] is value for key, value in kept.items())
    assert len(kept) == len(cache.compositions)
    assert_equal(outputs_and_gradients(net, batch, label_cache=cache), expected)


def plain_case(**changes: Any) -> dict[str, Any]:
    net = {"k": 2, "widths": [6, 5], "encoder_width": 6, "fusion": "product", "norm": "all"}
    net |= {"edge_types": ["spatial", "semantic", "matches"]}
    return {"counts": [4, 2], "C": 5, "neighbors": 2, "label_neighbors": None, "net": net, "seed": 3} | changes


def test_cached_labels_are_not_recomputed() -> None:
    case = plain_case()
    batch, net = dense(graphs(case)), network(case)
    calls = []
    for module in (net.encoder.x["label"], net.encoder.edge_attr[SEMANTIC]):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    cache = net.precompute_labels(batch)
    assert len(calls) == 2
    net(batch, cache)
    assert len(calls) == 2


def test_cache_of_other_labels_is_refused() -> None:
    case = plain_case()
    net, batch = network(case), dense(graphs(case))
    cache = net.precompute_labels(dense(graphs(plain_case(C=4))))
    with pytest.raises(ConfigError, match="5 labels, but 4 are in the label cache"):
        net(batch, cache)
    with pytest.raises(ConfigError, match="needs an AssignmentBatch"):
        net(graphs(case), cache)


@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_gradient_checkpointing_stores_less(layout: str) -> None:
    case = plain_case(counts=[6, 6, 6], C=6)
    data: Any = graphs(case) if layout == "sparse" else dense(graphs(case))

    def kept_bytes(checkpointing: bool) -> int:
        net = network(case, gradient_checkpointing=checkpointing)
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = net(data)
        assert output.logits.requires_grad
        return sum(kept.values())

    assert kept_bytes(True) < 0.5 * kept_bytes(False)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 compiles some sizes again")
def test_one_compilation_for_batches_of_every_size() -> None:
    net = network(plain_case())
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, dynamic=True)
    # All sizes of the first batch differ: the compiler assumes that equal ones are the same dimension.
    for counts in ([6, 2, 1], [3, 8], [9, 3, 2, 2, 1, 1]):
        batch = dense(graphs(plain_case(counts=counts)))
        close(compiled(batch).logits, net(batch).logits)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_compiled_equals_eager(fusion: str, recompute: bool) -> None:
    """Outputs and gradients with the default backend (needs a C++ compiler), called as in the trainer."""
    case = plain_case(counts=[6, 2, 1])
    case["net"]["fusion"] = fusion
    net, batch = network(case, gradient_checkpointing=recompute), dense(graphs(case))
    eager = outputs_and_gradients(net, batch)
    torch._dynamo.reset()
    net.compile(fullgraph=True, dynamic=True)
    assert_equal(outputs_and_gradients(net, batch), eager)
