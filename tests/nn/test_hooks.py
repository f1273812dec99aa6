"""Hooks, replaced parts and repeated differentiation have the same effect in both layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch_geometric.data import Batch, HeteroData
from torch_geometric.nn import MaxAggregation

from gm_mlic.errors import ConfigError
from gm_mlic.graphs import MATCHES, SEMANTIC, AssignmentBatch, AssignmentGraph
from gm_mlic.nn import GMMLIC, ConcatMLP, EdgeUpdate, MessageMLP

C, CONV, RHO = 3, "blocks.0.edge_conv.<instance___matches___label>", "encoder.edge_attr.<label___semantic___label>"
MESSAGE = "blocks.0.node_conv.message.<instance___matches___label>.label"


def model(**options: Any) -> GMMLIC:
    torch.manual_seed(4)
    net = GMMLIC(5, 4, **{"widths": (6, 5), **options}).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return net


@pytest.fixture
def graphs() -> tuple[HeteroData, AssignmentBatch]:
    generator = torch.Generator().manual_seed(1)
    transform = AssignmentGraph(torch.randn(C, 4, generator=generator, dtype=torch.float64), num_neighbors=2)
    made = []
    for M in (4, 1, 3):
        data = HeteroData()
        data["instance"].x = torch.randn(M, 5, generator=generator, dtype=torch.float64)
        data["instance"].box = torch.rand(M, 4, generator=generator, dtype=torch.float64).sort(dim=1).values
        made.append(transform(data))
    sparse = Batch.from_data_list(made)
    return sparse, AssignmentBatch.from_hetero_data(sparse)


def results(graphs: Any, change: Callable[[GMMLIC], Any], **options: Any) -> list[tuple[Tensor, Tensor]]:
    """Logits and all gradients of both layouts, and of the unchanged network."""
    found = []
    for data, edit in zip((*graphs, graphs[0]), (change, change, lambda net: None), strict=True):
        net = model(**options)
        edit(net)
        logits = net(data).logits
        logits.square().sum().backward()
        gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        found.append((logits.detach(), torch.cat(gradients)))
    return found


def assert_same_effect(graphs: Any, change: Callable[[GMMLIC], Any], *, of_logits: bool = True, **options: Any) -> None:
    sparse, dense, before = results(graphs, change, **options)
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(sparse[not of_logits], before[not of_logits])


def edge_values(output: Any) -> Any:
    return output[1][MATCHES] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", [
    CONV, f"{CONV}.rho_e", f"{CONV}.phi_e", f"{CONV}.rho_e.lin1", f"{CONV}.rho_e.product", f"{CONV}.rho_e.lin1.lins.1",
    MESSAGE, f"{MESSAGE}.rho_n", RHO, f"{RHO}.lin2", f"{RHO}.norm", "blocks.0", "encoder", "decoder",
])  # fmt: skip
def test_in_place_hooks(graphs: Any, name: str) -> None:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        assert isinstance(edge_values(output), Tensor)
        edge_values(output).detach().mul_(-0.5)

    assert_same_effect(graphs, lambda net: net.get_submodule(name).register_forward_hook(hook))


@pytest.mark.parametrize("name", [CONV, f"{CONV}.rho_e", MESSAGE, f"{MESSAGE}.rho_n"])
def test_backward_hooks(graphs: Any, name: str) -> None:
    def change(net: GMMLIC) -> None:
        net.get_submodule(name).register_full_backward_hook(lambda _, grads, __: tripled(grads))

    def tripled(grads: Any) -> Any:
        return tuple(None if grad is None else 3 * grad for grad in grads)

    assert_same_effect(graphs, change, of_logits=False)


@pytest.mark.parametrize("name", [CONV, f"{CONV}.rho_e", f"{CONV}.rho_e.lin2", MESSAGE, "decoder"])
def test_a_replaced_forward_of_one_instance(graphs: Any, name: str) -> None:
    """As the wrappers of accelerate do it."""

    def change(net: GMMLIC) -> None:
        module = net.get_submodule(name)
        before = module.forward
        module.forward = lambda *args: torch.tanh(before(*args))  # type: ignore[method-assign]

    assert_same_effect(graphs, change)


def test_an_overridden_message(graphs: Any) -> None:
    class Clamped(MessageMLP):
        def message(self, x_j: Tensor, edge_attr: Tensor) -> Tensor:
            assert isinstance(x_j, Tensor)
            return super().message(x_j, edge_attr).clamp(min=0.1)

    class Negative(EdgeUpdate):
        def edge_update(self, x_i: Tensor, x_j: Tensor, edge_attr: Tensor) -> Tensor:
            return -super().edge_update(x_i, x_j, edge_attr)

    def change(net: GMMLIC) -> None:
        net.blocks[0].node_conv.message[MATCHES]["label"].__class__ = Clamped
        net.blocks[0].edge_conv[MATCHES].__class__ = Negative

    assert_same_effect(graphs, change)


class Median(MessageMLP):
    def aggregate(self, inputs: Tensor, index: Tensor, ptr: Any = None, dim_size: int | None = None) -> Tensor:
        return 2 * super().aggregate(inputs, index, ptr, dim_size)


@pytest.mark.parametrize("change", [
    lambda message: message.register_message_forward_hook(lambda _, __, out: 2 * out),
    lambda message: message.register_propagate_forward_pre_hook(lambda _, args: args),
    lambda message: message.register_aggregate_forward_hook(lambda _, __, out: 2 * out),
    lambda message: setattr(message, "aggr_module", MaxAggregation()),
    lambda message: setattr(message, "aggregate", lambda inputs, **_: inputs),
    lambda message: setattr(message, "explain", True),
    lambda message: setattr(message, "__class__", Median),
], ids=["message", "propagate", "aggregate", "aggr_module", "method", "explain", "subclass"])  # fmt: skip
def test_aggregation_of_another_kind_is_refused_in_dense(graphs: Any, change: Callable[[Any], Any]) -> None:
    net = model()
    change(net.get_submodule(MESSAGE))
    with pytest.raises(ConfigError, match="which needs edge_index: pass a HeteroData"):
        net(graphs[1])


def test_edge_update_hooks_of_pyg_are_refused_in_dense(graphs: Any) -> None:
    net = model()
    net.get_submodule(CONV).register_edge_update_forward_hook(lambda _, __, out: 2 * out)
    net(graphs[0])
    with pytest.raises(ConfigError, match="EdgeUpdate has its own _edge_update_forward_hooks"):
        net(graphs[1])


class Picky(nn.Module):
    """A decoder that does what only a Tensor can."""

    def forward(self, e: Tensor) -> Tensor:
        assert isinstance(e, Tensor)
        assert len(e) > 0
        e = abs(e) // 0.1 + (e > 0)
        e[..., 0] = 0
        return torch.as_tensor(e).sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("edge_types", [["matches"], ["spatial", "semantic", "matches"]])
def test_a_replaced_decoder_gets_a_tensor(graphs: Any, edge_types: list[str]) -> None:
    net = model(edge_types=edge_types)
    net.decoder = Picky()
    torch.testing.assert_close(net(graphs[1]).match_logits, net(graphs[0]).match_logits, rtol=1e-10, atol=1e-10)


def test_a_decoder_of_two_nodes_gets_parts_of_full_size(graphs: Any) -> None:
    class Joined(nn.Module):
        def forward(self, x_i: Tensor, x_c: Tensor) -> Tensor:
            return torch.cat([x_i, x_c], dim=-1).sum(dim=-1, keepdim=True)

    net = model(edge_types=["spatial"])
    net.decoder = Joined()
    torch.testing.assert_close(net(graphs[1]).match_logits, net(graphs[0]).match_logits, rtol=1e-10, atol=1e-10)


def test_a_hooked_network_with_a_label_cache(graphs: Any) -> None:
    for name in ("blocks.0", "blocks.0.node_conv", f"blocks.0.edge_conv.<{'___'.join(SEMANTIC)}>", RHO, "encoder"):
        net = model()
        net.get_submodule(name).register_forward_hook(lambda *_: None)
        cache = net.precompute_labels(graphs[1])
        torch.testing.assert_close(net(graphs[1], cache).logits, net(graphs[0]).logits, rtol=1e-10, atol=1e-10)


# Layers without a bias


@pytest.mark.parametrize("layout", [0, 1])
def test_norms_and_linears_without_bias_or_scale(graphs: Any, layout: int) -> None:
    def change(net: GMMLIC) -> None:
        for number, module in enumerate([m for m in net.modules() if isinstance(m, ConcatMLP)]):
            if isinstance(module.norm, nn.LayerNorm):
                d = module.norm.normalized_shape
                module.norm = nn.LayerNorm(d, bias=False) if number % 2 else nn.LayerNorm(d, elementwise_affine=False)
                module.norm.double()
            else:
                lin = module.lin2
                module.lin2 = nn.Linear(lin.in_features, lin.out_features, bias=False).double()
                with torch.no_grad():
                    module.lin2.weight.copy_(lin.weight)

    assert_same_effect(graphs, change, norm=("encoder", "all")[layout])


# Wrappers without the attributes of a Linear


class Wrapper(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def test_wrapped_linears_have_a_repr_and_are_reset() -> None:
    net = model()
    for mlp in [m for m in net.modules() if isinstance(m, ConcatMLP)]:
        mlp.lin1.lins[0] = Wrapper(mlp.lin1.lins[0])
        mlp.lin2 = Wrapper(mlp.lin2)
        if mlp.product is not None:
            mlp.product.A = Wrapper(mlp.product.A)
    assert repr(net.decoder) == repr(model().decoder)
    assert repr(net.blocks[0].edge_conv[MATCHES].rho_e) == "ConcatMLP([6, 6, 6], 6, 6)"
    assert repr(net.blocks[0].edge_conv[MATCHES].rho_e.product) == "HadamardFusion((6, 6), 6)"
    net.reset_parameters()
    net.decoder.lin1 = nn.Identity()
    assert repr(net.decoder) == "Decoder([5], 5, 1)"


# Derivatives of derivatives


def test_gradients_can_be_differentiated(graphs: Any) -> None:
    found = []
    for data in graphs:
        net = model(norm="all")
        parameters = list(net.encoder.x["instance"].parameters())
        loss = net(data).logits.square().sum()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * max(1.0, float(b.abs().max())))


def test_func_grad(graphs: Any) -> None:
    net = model(norm="all")
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    for subset in (parameters, {n: p for n, p in parameters.items() if n.startswith("encoder.x")}):
        found = [
            torch.func.grad(lambda p, d=data: functional_call(net, p, (d,)).logits.square().sum())(subset)
            for data in graphs
        ]
        for name in subset:
            torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-8, atol=1e-6)
