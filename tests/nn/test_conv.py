from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gm_mlic.detection.protocol import Instances
from gm_mlic.graphs import MATCHES, NEAR, RELATES, AssignmentGraph, instance_data
from gm_mlic.nn import MLP, AssignmentConv, ConcatLinear, EdgeConv, Encoder, MeanMessage, NodeConv, Product, Relations
from gm_mlic.nn.conv import Edges, States

D, OUT, N_O, N_L = 4, 6, 3, 2
SINGLE = [Relations(), *(Relations(**{field.name: False}) for field in dataclasses.fields(Relations))]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def states() -> dict[str, Tensor]:
    pairs = torch.tensor(list(product(range(N_O), range(N_L)))).t()
    near = torch.tensor([(1, 0), (2, 0), (0, 1), (0, 2)]).t()
    relates = torch.tensor([(1, 0), (0, 1)]).t()
    return {
        "v_o": normal(N_O, D),
        "v_l": normal(N_L, D, seed=1),
        "e_o": normal(4, D, seed=2),
        "e_l": normal(2, D, seed=3),
        "e_m": normal(6, D, seed=4),
        "near": near,
        "relates": relates,
        "matches": pairs,
    }


def graph(given: dict[str, Tensor]) -> tuple[States, Edges]:
    return States(*(given[name] for name in States._fields)), Edges(*(given[name] for name in Edges._fields))


def shuffled(given: dict[str, Tensor], edges: str, order: Tensor) -> dict[str, Tensor]:
    state = {"near": "e_o", "relates": "e_l", "matches": "e_m"}[edges]
    return {**given, edges: given[edges][:, order], state: given[state][order]}


LAYERS: dict[str, Any] = {
    "ConcatLinear([4, 2], 6)": lambda: ConcatLinear([4, 2], 6),
    "MLP([4, 2], 8, 6)": lambda: MLP([4, 2], 8, 6),
    "MLP([4], 8, 6, norm)": lambda: MLP([4], 8, 6, norm=True),
    "MeanMessage(4, 3, 6)": lambda: MeanMessage(4, 3, 6),
    "NodeConv(4, 6)": lambda: NodeConv(4, 6, norm=True),
    "EdgeConv(4, 3, 6)": lambda: EdgeConv(4, 3, 6, product=True, norm=True),
    "Product((4, 3), 6)": lambda: Product((4, 3), 6),
    "Encoder(5, 4, 6)": lambda: Encoder(5, 4, 6, Relations(), product=True),
    "AssignmentConv(4, 6)": lambda: AssignmentConv(4, 6, product=True, norm=True),
}


@pytest.mark.parametrize("text", LAYERS)
def test_repr(text: str) -> None:
    assert repr(LAYERS[text]()) == text


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_reset_parameters_draws_everything_anew(make: Any) -> None:
    layer: nn.Module = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    layer.reset_parameters()
    assert [name for name, p in layer.named_parameters() if bool((p == 7.0).any())] == []


def test_concat_linear_is_a_sum_of_its_parts() -> None:
    layer = ConcatLinear([4, 2, 3], 6)
    nn.init.normal_(layer.bias)
    parts = [normal(5, width, seed=width) for width in (4, 2, 3)]
    close(sum((layer.part(k, x) for k, x in enumerate(parts)), layer.bias), layer(*parts))
    reference = nn.Linear(9, 6)
    reference.load_state_dict(layer.state_dict())
    close(layer(*parts), reference(torch.cat(parts, dim=1)))


def test_mean_message_both_ways() -> None:
    given = states()
    for reverse in (False, True):
        layer = MeanMessage(D, D, OUT, reverse=reverse)
        senders, receivers = ("v_l", "v_o") if reverse else ("v_o", "v_l")
        count = given[receivers].shape[0]
        out = layer(given[senders], given["matches"], given["e_m"], count)
        assert out.shape == (count, OUT)
        for i in range(count):
            messages = [
                layer.rho(given["e_m"][e], given[senders][label if reverse else instance])
                for e, (instance, label) in enumerate(given["matches"].t().tolist())
                if (instance if reverse else label) == i
            ]
            close(out[i], torch.stack(messages).mean(dim=0))


def test_a_node_without_neighbours_hears_zeros() -> None:
    layer = MeanMessage(D, D, OUT)
    nn.init.ones_(layer.rho.lin2.bias)
    out = layer(normal(3, D), torch.tensor([[0, 1], [2, 2]]), normal(2, D), 3)
    assert not bool(out[:2].any())
    assert bool(out[2].any())


def test_edge_conv_reads_source_before_target() -> None:
    given = states()
    for fused in (False, True):
        layer = EdgeConv(D, D, OUT, product=fused, norm=True)
        out = layer((given["v_o"], given["v_l"]), given["matches"], given["e_m"])
        for e, (i, c) in enumerate(given["matches"].t().tolist()):
            ends = [given["v_o"][i], given["v_l"][c]]
            if layer.product is not None:
                ends.append(layer.product.A.weight @ ends[0] * (layer.product.B.weight @ ends[1]))
            close(out[e], layer.psi(given["e_m"][e], layer.sigma(*ends)))


@pytest.mark.parametrize("edges", ["near", "relates", "matches"])
@pytest.mark.parametrize("relations", SINGLE, ids=str)
def test_block_does_not_care_for_the_order_of_edges(relations: Relations, edges: str) -> None:
    given = states()
    layer = AssignmentConv(D, OUT, relations, product=True, norm=True)
    order = torch.randperm(given[edges].shape[1], generator=torch.Generator().manual_seed(3))
    before, after = layer(*graph(given)), layer(*graph(shuffled(given, edges, order)))
    state = {"near": 2, "relates": 3, "matches": 4}[edges]
    for place, (ours, theirs) in enumerate(zip(after, before, strict=True)):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            close(ours, theirs[order] if place == state else theirs)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("relations", SINGLE, ids=str)
def test_block_shapes(relations: Relations, last: bool) -> None:
    v_o, v_l, e_o, e_l, e_m = AssignmentConv(D, OUT, relations, last=last)(*graph(states()))
    assert v_o.shape == (N_O, OUT)
    assert v_l.shape == (N_L, OUT)
    for state, edges, present in (
        (e_o, 4, relations.instance_graph and not last),
        (e_l, 2, relations.label_graph and not last),
        (e_m, 6, relations.matching_edges),
    ):
        assert (state is not None) == present
        assert state is None or state.shape == (edges, OUT)


@pytest.mark.parametrize("relations", SINGLE, ids=str)
def test_an_absent_relation_is_not_read(relations: Relations) -> None:
    layer, given = NodeConv(D, OUT, relations), states()
    before = layer(*graph(given))
    for present, names in (
        (relations.instance_graph, ("e_o", "near")),
        (relations.label_graph, ("e_l", "relates")),
        (relations.matching_edges, ("e_m",)),
    ):
        if not present:
            given.update(dict.fromkeys(names))  # type: ignore[arg-type]
    for ours, theirs in zip(layer(*graph(given)), before, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("fused", [False, True])
def test_encoder_forms_the_attributes_that_a_graph_does_not_carry(fused: bool) -> None:
    W = normal(N_L, D)
    rows = Instances(torch.rand(3, 4), torch.rand(3), torch.zeros(3, dtype=torch.int64), normal(3, 5))
    encoder = Encoder(5, D, OUT, Relations(), product=fused)
    with_attr, without = (
        encoder(AssignmentGraph(W, edge_attr=edge_attr)(instance_data(rows))) for edge_attr in (True, False)
    )
    data = AssignmentGraph(W)(instance_data(rows))
    counts = [3, N_L, *(data[kind].edge_index.shape[1] for kind in (NEAR, RELATES, MATCHES))]
    for ours, theirs, count in zip(with_attr, without, counts, strict=True):
        close(ours, theirs)
        assert ours.shape == (count, OUT)


def test_no_graph_breaks() -> None:
    given = states()
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(AssignmentConv(D, OUT, product=True))(*graph(given))
    assert explanation.graph_break_count == 0, explanation.break_reasons
