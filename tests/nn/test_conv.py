from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ArgumentError
from gm_mlic.graphs import (
    EDGE_TYPES,
    MATCHES,
    SEMANTIC,
    SPATIAL,
    AssignmentGraph,
    Bipartite,
    EdgeSpec,
    EdgeTensor,
    NeighborLists,
    to_hetero_data,
)  # fmt: skip
from gm_mlic.graphs.schema import edge_table
from gm_mlic.nn import (
    ConcatMLP,
    Decoder,
    EdgeUpdate,
    Encoder,
    GraphNetworkBlock,
    HadamardFusion,
    MessageMLP,
    NodeConv,
)  # fmt: skip
from gm_mlic.nn.mlp import ConcatLinear

D, OUT, N_O, N_L = 4, 6, 3, 2
RELATIONS = ("spatial", "semantic", "matches")
SUBSETS = [RELATIONS, *(tuple(r for r in RELATIONS if r != removed) for removed in RELATIONS)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def graph() -> tuple[dict[str, Tensor], dict[Any, Tensor], dict[Any, Tensor]]:
    """Node features, edge indices and edge features."""
    pairs = torch.tensor(list(product(range(N_O), range(N_L)))).t()
    spatial = torch.tensor([(1, 0), (2, 0), (0, 1), (0, 2)]).t()
    semantic = torch.tensor([(1, 0), (0, 1)]).t()
    x_dict = {"instance": normal(N_O, D), "label": normal(N_L, D, seed=1)}
    edge_attr_dict = {SPATIAL: normal(4, D, seed=2), SEMANTIC: normal(2, D, seed=3), MATCHES: normal(6, D, seed=4)}
    return x_dict, {SPATIAL: spatial, SEMANTIC: semantic, MATCHES: pairs}, edge_attr_dict


NODES = {"instance": D, "label": D}
LAYERS: dict[str, Any] = {
    "ConcatLinear([4, 2], 6)": lambda: ConcatLinear([4, 2], 6),
    "ConcatMLP([4, 2], 8, 6)": lambda: ConcatMLP([4, 2], 8, 6),
    "ConcatMLP([4], 8, 6, norm)": lambda: ConcatMLP([4], 8, 6, norm=True),
    "ConcatMLP([4, 2, 8], 8, 6)": lambda: ConcatMLP([4, 2], 8, 6, product=True),
    "Decoder([4], 6, 1)": lambda: Decoder([4], 6),
    "MessageMLP(3, 4, 6)": lambda: MessageMLP(3, 4, 6),
    "MessageMLP((3, 2), 4, 6)": lambda: MessageMLP((3, 2), 4, 6, reverse=True),
    "NodeConv(4, 6)": lambda: NodeConv(4, 6, EDGE_TYPES, norm=True),
    "EdgeUpdate((3, 2), 4, 6)": lambda: EdgeUpdate((3, 2), 4, 6, product=True, norm=True),
    "HadamardFusion((4, 3), 6)": lambda: HadamardFusion((4, 3), 6),
    "Encoder({'instance': 5, 'label': 4}, 6)": lambda: Encoder(
        {"instance": 5, "label": 4}, 6, EDGE_TYPES, product=True
    ),
    "GraphNetworkBlock(4, 6)": lambda: GraphNetworkBlock(4, 6, EDGE_TYPES, product=True, norm=True),
}


@pytest.mark.parametrize("text", LAYERS)
def test_repr(text: str) -> None:
    assert repr(LAYERS[text]()) == text


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_reset_parameters_resets_every_parameter(make: Any) -> None:
    layer: nn.Module = make()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7.0)
    layer.reset_parameters()
    assert [name for name, p in layer.named_parameters() if bool((p == 7.0).any())] == []


def test_concat_linear_equals_linear_over_the_concatenation() -> None:
    layer = ConcatLinear([4, 2, 3], 6)
    nn.init.normal_(layer.lins[0].bias)
    parts = [normal(5, width, seed=width) for width in (4, 2, 3)]
    reference = nn.Linear(9, 6)
    with torch.no_grad():
        reference.weight.copy_(torch.cat([lin.weight for lin in layer.lins], dim=1))
        reference.bias.copy_(layer.lins[0].bias)
    close(layer(*parts), reference(torch.cat(parts, dim=1)))


def test_concat_linear_broadcasts_and_does_not_modify_inputs() -> None:
    layer = ConcatLinear([4, 2, 3], 6)
    parts = [normal(2, 3, 1, 4), normal(2, 1, 5, 2), normal(2, 3, 5, 3)]
    before = [part.clone() for part in parts]
    expanded = [part.expand(2, 3, 5, -1) for part in parts]
    close(layer(*parts), layer(*expanded))
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def test_initial_variance_depends_on_the_whole_concatenation() -> None:
    torch.manual_seed(0)
    layer = ConcatLinear([500, 1500], 300)
    for lin in layer.lins:
        assert float(lin.weight.detach().std()) == pytest.approx((2 / 2000) ** 0.5, rel=0.02)


def test_message_in_both_directions() -> None:
    x_dict, edge_index_dict, edge_attr_dict = graph()
    ends, edge_index, edge_attr = (
        (x_dict["instance"], x_dict["label"]),
        edge_index_dict[MATCHES],
        edge_attr_dict[MATCHES],
    )
    for reverse in (False, True):
        layer = MessageMLP(D, D, OUT, reverse=reverse)
        out = layer(ends, edge_index, edge_attr)
        sender, receiver = (1, 0) if reverse else (0, 1)
        assert out.shape == (len(ends[receiver]), OUT)
        for i in range(len(ends[receiver])):
            messages = [
                layer.rho_n(edge_attr[e], ends[sender][edge[sender]])
                for e, edge in enumerate(edge_index.t().tolist())
                if edge[receiver] == i
            ]
            close(out[i], torch.stack(messages).mean(dim=0))


def test_isolated_node_receives_zeros() -> None:
    layer = MessageMLP(D, D, OUT)
    nn.init.ones_(layer.rho_n.lin2.bias)
    out = layer(normal(3, D), torch.tensor([[0, 1], [2, 2]]), normal(2, D))
    assert not bool(out[:2].any())
    assert bool(out[2].any())


def test_edge_update_takes_source_before_target() -> None:
    x_dict, edge_index_dict, edge_attr_dict = graph()
    for product_ in (False, True):
        layer = EdgeUpdate(D, D, OUT, product=product_, norm=True)
        out = layer((x_dict["instance"], x_dict["label"]), edge_index_dict[MATCHES], edge_attr_dict[MATCHES])
        for e, (i, c) in enumerate(edge_index_dict[MATCHES].t().tolist()):
            close(
                out[e], layer.phi_e(edge_attr_dict[MATCHES][e], layer.rho_e(x_dict["instance"][i], x_dict["label"][c]))
            )


def test_hadamard_fusion() -> None:
    layer = HadamardFusion((4, 3), 6)
    a, b = normal(4), normal(3)
    close(layer(a, b), (layer.A.weight @ a) * (layer.B.weight @ b))


@pytest.mark.parametrize("edge_type", [SPATIAL, SEMANTIC, MATCHES], ids=lambda t: t[1])
@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
def test_edge_order_invariance(names: tuple[str, ...], edge_type: Any) -> None:
    x_dict, edge_index_dict, edge_attr_dict = graph()
    layer = GraphNetworkBlock(NODES, OUT, edge_table(names), D, product=True, norm=True)
    order = torch.randperm(edge_index_dict[edge_type].shape[1], generator=torch.Generator().manual_seed(3))
    x, e = layer(x_dict, edge_index_dict, edge_attr_dict)
    edge_index_dict[edge_type] = edge_index_dict[edge_type][:, order]
    edge_attr_dict[edge_type] = edge_attr_dict[edge_type][order]
    x_after, e_after = layer(x_dict, edge_index_dict, edge_attr_dict)
    for node_type in x:
        close(x_after[node_type], x[node_type])
    assert e.keys() == e_after.keys()
    for t in e:
        close(e_after[t], e[t][order] if t == edge_type else e[t])


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
def test_block_shapes(names: tuple[str, ...], last: bool) -> None:
    table = edge_table(names)
    x, e = GraphNetworkBlock(NODES, OUT, table, D, updated=[MATCHES] if last else None)(*graph())
    assert {t: v.shape for t, v in x.items()} == {"instance": (N_O, OUT), "label": (N_L, OUT)}
    edges = {SPATIAL: 4, SEMANTIC: 2, MATCHES: 6}
    expected = {t: (edges[t], OUT) for t in table if t == MATCHES or not last}
    assert {t: v.shape for t, v in e.items()} == expected


@pytest.mark.parametrize("names", SUBSETS, ids=",".join)
def test_omitted_edge_type_is_not_read(names: tuple[str, ...]) -> None:
    table, (x_dict, edge_index_dict, edge_attr_dict) = edge_table(names), graph()
    layer = NodeConv(NODES, OUT, table, D)
    before = layer(x_dict, edge_index_dict, edge_attr_dict)
    kept = [{t: value for t, value in d.items() if t in table} for d in (edge_index_dict, edge_attr_dict)]
    after = layer(x_dict, *kept)
    for node_type in before:
        close(after[node_type], before[node_type])


@pytest.mark.parametrize("fusion", [False, True])
def test_encoder_computes_missing_edge_attributes(fusion: bool) -> None:
    W = normal(N_L, D)
    rows = Instances(
        torch.rand(3, 4).sort(dim=1).values, torch.rand(3), torch.zeros(3, dtype=torch.int64), normal(3, 5)
    )
    encoder = Encoder({"instance": 5, "label": D}, OUT, EDGE_TYPES, product=fusion)

    def encoded(edge_attr: bool) -> tuple[dict[str, Tensor], dict[Any, Tensor]]:
        data = AssignmentGraph(W, edge_attr=edge_attr)(to_hetero_data(rows))
        attrs = {t: data[t].edge_attr for t in data.edge_types if "edge_attr" in data[t]}
        return encoder(data.x_dict, data.edge_index_dict, attrs)

    (x, e), (x_formed, e_formed) = encoded(True), encoded(False)
    assert {t: v.shape for t, v in x.items()} == {"instance": (3, OUT), "label": (N_L, OUT)}
    assert {t: v.shape for t, v in e.items()} == {SPATIAL: (6, OUT), SEMANTIC: (2, OUT), MATCHES: (6, OUT)}
    for t in x:
        close(x_formed[t], x[t])
    for t in e:
        close(e_formed[t], e[t])


# Custom names, bipartite and lazy sizes

FRIENDS, RATES = ("user", "knows", "user"), ("user", "rates", "film")


def ratings() -> tuple[dict[str, Tensor], dict[Any, Tensor], dict[Any, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    knows, rates = torch.randint(5, (2, 12), generator=generator), torch.randint(4, (2, 9), generator=generator)
    x_dict = {"user": normal(5, 3), "film": normal(4, 7)}
    return x_dict, {FRIENDS: knows, RATES: rates}, {FRIENDS: normal(12, 2), RATES: normal(9, 1)}


def test_custom_names_and_sizes() -> None:
    table = {FRIENDS: EdgeSpec(), RATES: EdgeSpec(bidirectional=True, product=True)}
    layer = GraphNetworkBlock({"user": 3, "film": 7}, OUT, table, {FRIENDS: 2, RATES: 1}, product=True)
    x, e = layer(*ratings())
    assert {t: v.shape for t, v in x.items()} == {"user": (5, OUT), "film": (4, OUT)}
    assert {t: v.shape for t, v in e.items()} == {FRIENDS: (12, OUT), RATES: (9, OUT)}
    lazy = GraphNetworkBlock(-1, OUT, table, product=True)
    lazy(*ratings())
    lazy.load_state_dict(layer.state_dict())
    x_lazy, _ = lazy(*ratings())
    close(x_lazy["film"], x["film"])


def test_lazy_layers() -> None:
    x_dict, edge_index_dict, edge_attr_dict = ratings()
    ends = (x_dict["user"], x_dict["film"])
    for layer, sizes in (
        (MessageMLP((-1, -1), -1, OUT), (1, 3)),
        (MessageMLP(-1, -1, OUT, reverse=True), (1, 7)),
    ):
        layer(ends, edge_index_dict[RATES], edge_attr_dict[RATES])
        assert layer.rho_n.lin1.in_channels == sizes
    update = EdgeUpdate((-1, -1), -1, OUT, product=True)
    update(ends, edge_index_dict[RATES], edge_attr_dict[RATES])
    assert update.rho_e.lin1.in_channels == (3, 7, OUT)
    assert update.phi_e.lin1.in_channels == (1, OUT)
    assert (update.rho_e.product.A.in_features, update.rho_e.product.B.in_features) == (3, 7)
    std = torch.cat([lin.weight for lin in update.rho_e.lin1.lins], dim=1).std()
    assert float(std) == pytest.approx((2 / 16) ** 0.5, rel=0.3)  # not torch's default


# Dense edges


def test_an_mlp_of_edge_tensors_is_one() -> None:
    full = ConcatMLP([3, 2], 4, 5)
    a, b = EdgeTensor(normal(2, 3, 1, 3)), EdgeTensor(normal(2, 1, 4, 2))
    out = full(a, b)
    assert isinstance(out, EdgeTensor)
    assert repr(out) == "EdgeTensor([2, 3, 4, 4], affine)"
    close(out.tensor(), full(a.x.expand(2, 3, 4, -1), b.x.expand(2, 3, 4, -1)))
    with pytest.raises(TypeError, match="must be Tensor"):
        torch.tanh(out)


def test_dense_edges() -> None:
    index, mask = (
        torch.tensor([[[1, 2], [0, 0], [0, 1]]]),
        torch.tensor([[[True, True], [True, False], [False, False]]]),
    )
    x = normal(1, 3, 4)
    lists = NeighborLists(index, mask)
    x_j, x_i = lists.ends(x, x)
    assert torch.equal(x_j.tensor()[0, 0, 1], x[0, 2])
    assert torch.equal(x_i.tensor()[0, 2, 0], x[0, 2])
    close(lists.mean(x_j)[0], torch.stack([(x[0, 1] + x[0, 2]) / 2, x[0, 0], torch.zeros(4)]))
    with pytest.raises(NotImplementedError, match="aggregate at targets only"):
        lists.mean(x_j, to_source=True)
    values = normal(1, 3, 2, 4)
    for mask, count in ((torch.tensor([[True, True, False]]), 2), (torch.ones(1, 3, dtype=torch.bool), 3)):
        edges = Bipartite(mask)
        close(edges.mean(values)[0], values[0, :count].mean(dim=0))
        close(edges.mean(values, to_source=True)[0, :count], values[0, :count].mean(dim=1))


def test_no_graph_breaks() -> None:
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(GraphNetworkBlock(D, OUT, EDGE_TYPES, product=True))(*graph())
    assert explanation.graph_break_count == 0, explanation.break_reasons


# Arguments

TABLE = {FRIENDS: EdgeSpec(), RATES: EdgeSpec()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: NodeConv({"user": 8, "film": 10}, 12, TABLE),
            r"^edge_dim has no size for \('user', 'knows', 'user'\)",
        ),
        (lambda: NodeConv((8, 10), 12, TABLE), r"^in_channels must be an int or a dict .* got \(8, 10\)"),  # type: ignore[arg-type]
        (lambda: GraphNetworkBlock({"user": 8}, 12, TABLE, 4), "^in_channels has no size for film"),
        (
            lambda: GraphNetworkBlock(8, 12, TABLE, {FRIENDS: 2}),
            r"^edge_dim has no size for \('user', 'rates', 'film'\)",
        ),
        (lambda: Encoder({"film": 8}, 12, TABLE), "^in_channels has no size for user"),
    ],
)
def test_missing_sizes(make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_encoder_with_one_size_for_all_types() -> None:
    x_dict, edge_index_dict, _ = ratings()
    encoder = Encoder(-1, OUT, TABLE)
    x, e = encoder(x_dict, edge_index_dict, {})
    assert {t: v.shape for t, v in x.items()} == {"user": (5, OUT), "film": (4, OUT)}
    assert e[RATES].shape == (9, OUT)


@pytest.mark.parametrize("options", [{"flow": "target_to_source"}, {"aggr": "max"}])
@pytest.mark.parametrize("layer", [MessageMLP, EdgeUpdate])
def test_flow_and_aggregation_are_fixed(layer: Any, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="multiple values"):
        layer(3, 4, 6, **options)
    assert layer(3, 4, 6, node_dim=0).node_dim == 0
