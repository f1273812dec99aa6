from __future__ import annotations

import copy
import functools
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize
from torch_geometric.data import Batch, HeteroData
from torch_geometric.loader import DataLoader

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs import EDGE_TYPES, MATCHES, SEMANTIC, SPATIAL, AssignmentBatch, AssignmentGraph, EdgeSpec
from gm_mlic.nn import GMMLIC, MILMax, ModelOutput, pool_instances

D_O, D_L, C = 5, 4, 3
EDGE_SUBSETS = [
    [name for name, present in zip(("spatial", "semantic", "matches"), flags, strict=True) if present]
    for flags in product((True, False), repeat=3)
]
LAYOUTS = ("sparse", "dense")


def graph(M: int, W: Tensor, seed: int = 0, **options: Any) -> HeteroData:
    generator = torch.Generator().manual_seed(seed)
    data = HeteroData()
    data["instance"].x = torch.randn(M, D_O, generator=generator, dtype=torch.float64)
    corner, size = torch.rand(2, M, 2, generator=generator, dtype=torch.float64) / 2
    data["instance"].box = torch.cat([corner, corner + size + 0.01], dim=1)
    data.y = torch.ones(1, len(W), dtype=torch.int64)
    data.row = torch.tensor([seed])
    return AssignmentGraph(W, num_neighbors=2, **options)(data)


def vectors(labels: int = C, seed: int = 9) -> Tensor:
    return torch.randn(labels, D_L, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(**options: Any) -> GMMLIC:
    torch.manual_seed(4)
    made = GMMLIC(D_O, D_L, **{"widths": (6, 5), **options}).double()
    with torch.no_grad():
        # Active hidden units: all logits differ, so each label has a unique argmax.
        made.decoder.lin1.lins[0].bias.add_(2.0)
    return made


@functools.cache
def shared_model() -> GMMLIC:
    """For repeated examples that do not change it: construction takes longer than a forward pass."""
    return model()


def as_layout(data: HeteroData, layout: str) -> Any:
    return data if layout == "sparse" else AssignmentBatch.from_hetero_data(data)


def dense(counts: list[int], W: Tensor) -> AssignmentBatch:
    return AssignmentBatch.collate([graph(M, W, seed) for seed, M in enumerate(counts)])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# Symmetries


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(4)))
def test_instance_order_equivariance(layout: str, order: list[int]) -> None:
    W, net = vectors(), shared_model()
    data = graph(4, W)
    shuffled = HeteroData()
    for name in ("x", "box"):
        shuffled["instance"][name] = data["instance"][name][order]
    shuffled = AssignmentGraph(W, num_neighbors=2)(shuffled)
    before, after = net(as_layout(data, layout)), net(as_layout(shuffled, layout))
    close(after.logits, before.logits)
    close(after.match_logits, before.match_logits[:, order])
    assert torch.equal(torch.tensor(order)[after.argmax_instance], before.argmax_instance)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(C)))
def test_label_order_equivariance(layout: str, order: list[int]) -> None:
    W, net = vectors(), shared_model()
    before, after = net(as_layout(graph(4, W), layout)), net(as_layout(graph(4, W[order]), layout))
    close(after.logits, before.logits[:, order])
    close(after.match_logits, before.match_logits[..., order])
    assert torch.equal(after.argmax_instance, before.argmax_instance[:, order])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("edge_type", [SPATIAL, SEMANTIC, MATCHES], ids=lambda edge_type: edge_type[1])
@pytest.mark.parametrize("num_label_neighbors", [None, 1])
def test_edge_order_invariance(edge_type: Any, layout: str, num_label_neighbors: int | None) -> None:
    net, data = model(), graph(4, vectors(), num_label_neighbors=num_label_neighbors)
    shuffled = copy.copy(data)
    order = torch.randperm(data[edge_type].edge_index.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled[edge_type].edge_index = data[edge_type].edge_index[:, order]
    if "edge_attr" in data[edge_type]:
        shuffled[edge_type].edge_attr = data[edge_type].edge_attr[order]
    before, after = net(as_layout(data, layout)), net(as_layout(shuffled, layout))
    close(after.logits, before.logits)
    assert torch.equal(after.argmax_instance, before.argmax_instance)
    close(after.match_logits, before.match_logits)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_batch_equals_loop(layout: str, counts: list[int]) -> None:
    W, net = vectors(), shared_model()
    graphs = [graph(M, W, seed) for seed, M in enumerate(counts)]
    together = net(as_layout(Batch.from_data_list(graphs), layout))
    for b, data in enumerate(graphs):
        alone = net(as_layout(data, layout))
        close(together.logits[b], alone.logits[0])
        close(together.match_logits[b, : counts[b]], alone.match_logits[0])
        assert bool((together.match_logits[b, counts[b] :] == float("-inf")).all())
        assert torch.equal(together.argmax_instance[b], alone.argmax_instance[0])


@pytest.mark.parametrize("make", [model, lambda: MILMax(D_O, C, width=6).double()], ids=["gm_mlic", "mil_max"])
def test_image_order_equivariance(make: Any) -> None:
    W, net = vectors(), make()
    graphs = [graph(M, W, seed) for seed, M in enumerate([4, 1, 3])]
    forth, back = (net(Batch.from_data_list(order)) for order in (graphs, graphs[::-1]))
    close(forth.logits, back.logits.flip(0))
    assert torch.equal(forth.argmax_instance, back.argmax_instance.flip(0))


# Sparse and dense


@pytest.mark.parametrize("edge_types", EDGE_SUBSETS, ids=",".join)
@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_layouts_have_equal_gradients(fusion: str, edge_types: list[str]) -> None:
    data = Batch.from_data_list([graph(M, vectors(), seed) for seed, M in enumerate([4, 1, 3])])
    gradients = []
    for layout in LAYOUTS:
        net = model(fusion=fusion, norm="all", edge_types=edge_types)
        matches = net(as_layout(data, layout)).match_logits
        matches[matches.isfinite()].sin().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_padded_batch_equals_its_graphs() -> None:
    W, net = vectors(), model()
    graphs = [graph(M, W, seed) for seed, M in enumerate([4, 1, 3])]
    x, box, mask = torch.zeros(3, 4, D_O).double(), torch.zeros(3, 4, 4).double(), torch.zeros(3, 4, dtype=torch.bool)
    for b, data in enumerate(graphs):
        M = data["instance"].x.shape[0]
        x[b, :M], box[b, :M], mask[b, :M] = data["instance"].x, data["instance"].box, True
    batch = AssignmentBatch.from_padded(x, box, mask, W, num_neighbors=2)
    ours, theirs = net(batch), net(Batch.from_data_list(graphs))
    close(ours.logits, theirs.logits)
    close(ours.match_logits, theirs.match_logits)
    assert torch.equal(ours.argmax_instance, theirs.argmax_instance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_matching_edges(layout: str) -> None:
    """An instance without an edge to a label cannot be its argmax."""
    data = graph(4, vectors())
    source, target = data[MATCHES].edge_index
    keep = ~((source == 2) & (target != 0))
    data[MATCHES].edge_index = data[MATCHES].edge_index[:, keep]
    output = model()(as_layout(data, layout))
    assert output.match_logits.shape == (1, 4, C)
    assert output.match_logits.isfinite().sum() == 10
    assert bool((output.match_logits[0, 2, 1:] == float("-inf")).all())
    assert 2 not in output.argmax_instance[0, 1:].tolist()
    close(output.logits, output.match_logits.amax(dim=1))


# Hooks and replaced modules


class LoRA(nn.Module):
    """Linear with a low-rank update, as in fine-tuning wrappers."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    """Subclass of Linear with another result."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OtherMLP(nn.Module):
    """Custom module over a concatenation of parts."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, *parts: Tensor) -> Tensor:
        total = torch.cat(parts, dim=-1).cumsum(dim=-1)[..., -1:]
        return torch.tanh(total) * torch.linspace(-1, 2, self.out_channels, dtype=total.dtype)


def linears(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if type(module) is nn.Linear]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_forward_hooks_fire_on_every_module(layout: str, fusion: str) -> None:
    net, data = model(fusion=fusion, norm="all"), as_layout(graph(4, vectors()), layout)
    before = net(data)
    calls: dict[str, int] = {}
    containers = (nn.ModuleList, nn.ModuleDict)
    for name, module in net.named_modules():
        if not isinstance(module, containers) and "aggr_module" not in name:
            module.register_forward_hook(lambda *_, n=name: calls.update({n: calls.get(n, 0) + 1}))
            calls[name] = 0
    after = net(data)
    assert [name for name, count in calls.items() if count != 1] == []
    close(after.match_logits, before.match_logits)


@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_hooks_get_equal_values_in_both_layouts(fusion: str) -> None:
    """Edge values are (E, d) in sparse graphs and (B, N, K, d) in dense ones."""
    net, data = model(fusion=fusion, norm="all"), graph(4, vectors())
    seen: dict[str, list[Tensor]] = {}
    for name, module in net.named_modules():
        if "<instance___matches" in name and name.endswith(("rho_e", "phi_e", "rho_n", "lin2", "norm")):
            module.register_forward_hook(
                lambda _, __, output, n=name: seen.setdefault(n, []).append(
                    output.detach().reshape(-1, output.shape[-1])
                )
            )
    net(data)
    net(as_layout(data, "dense"))
    assert len(seen) > 10
    for name, (sparse, dense_) in seen.items():
        torch.testing.assert_close(dense_, sparse, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hooks_can_change_outputs(layout: str) -> None:
    data = as_layout(graph(4, vectors()), layout)
    for name in ("blocks.0.edge_conv.<instance___matches___label>.rho_e", "blocks.0.node_conv", "encoder", "decoder"):
        net = model()
        before = net(data).logits
        net.get_submodule(name).register_forward_hook(lambda _, __, output: changed(output))
        assert not torch.allclose(net(data).logits, before), name


def changed(output: Any) -> Any:
    if isinstance(output, dict):
        return {key: changed(value) for key, value in output.items()}
    return tuple(map(changed, output)) if isinstance(output, tuple) else output * 2 + 1


@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_every_linear_can_be_replaced(fusion: str) -> None:
    """Both layouts call wrappers and subclasses, with equal results."""
    data, net = graph(4, vectors()), model(fusion=fusion)
    batch, before = as_layout(data, "dense"), net(data).match_logits
    for number, name in enumerate(linears(net)):
        torch.manual_seed(number)
        base = net.get_submodule(name)
        assert isinstance(base, nn.Linear)
        if number % 2:
            other: nn.Module = LoRA(base)
        else:
            other = Doubled(base.in_features, base.out_features, bias=base.bias is not None).double()
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, other)
        sparse, dense_ = net(data).match_logits, net(batch).match_logits
        setattr(net.get_submodule(parent), last, base)
        close(dense_, sparse)
        assert not torch.allclose(sparse, before), name


@pytest.mark.parametrize(
    ("name", "out_channels"),
    [
        ("decoder", 1),
        ("encoder.x.instance", 6),
        ("encoder.edge_attr.<instance___matches___label>", 6),
        ("blocks.0.node_conv.message.<instance___matches___label>.label.rho_n", 6),
        ("blocks.0.node_conv.phi_n.label", 6),
        ("blocks.0.edge_conv.<instance___matches___label>.rho_e", 6),
        ("blocks.1.edge_conv.<instance___matches___label>.phi_e", 5),
    ],
)
def test_every_function_can_be_replaced(name: str, out_channels: int) -> None:
    data, net = graph(4, vectors()), model()
    before = net(data).match_logits
    parent, _, last = name.rpartition(".")
    setattr(net.get_submodule(parent), last, OtherMLP(out_channels))
    sparse, dense_ = (net(as_layout(data, layout)).match_logits for layout in LAYOUTS)
    close(dense_, sparse)
    assert not torch.allclose(sparse, before)


def test_a_parametrized_and_a_quantized_linear() -> None:
    data, net = graph(4, vectors()), model()
    parametrize.register_parametrization(net.blocks[0].edge_conv[MATCHES].rho_e.lin2, "weight", nn.Tanh())
    sparse, dense_ = (net(as_layout(data, layout)).match_logits for layout in LAYOUTS)
    close(dense_, sparse)
    float_data = data.clone().apply(lambda x: x.float() if x.is_floating_point() else x)
    quantized = torch.ao.quantization.quantize_dynamic(model().float(), {nn.Linear}, dtype=torch.qint8)
    assert linears(quantized) == []
    sparse, dense_ = (quantized(as_layout(float_data, layout)).match_logits for layout in LAYOUTS)
    exact = model().float()(float_data).match_logits
    assert 0 < float((sparse - exact).abs().max()) < 0.5
    assert float((dense_ - exact).abs().max()) < 0.5


# Edge types


OVERLAPS = ("instance", "overlaps", "instance")
SIMILAR = ("label", "similar", "label")


@pytest.mark.parametrize("k", [1, 2])
def test_additional_edge_types(k: int) -> None:
    """Two custom edge types with attributes, besides the paper's."""
    table = {**EDGE_TYPES, OVERLAPS: EdgeSpec(attr_dim=2), SIMILAR: EdgeSpec(attr_dim=1)}
    net = model(k=k, widths=(5,) * k, edge_types=table)
    graphs = []
    for seed, M in enumerate([4, 1, 3]):
        data = graph(M, vectors(), seed)
        source, target = torch.cartesian_prod(torch.arange(M), torch.arange(M)).t()
        keep = (source + target) % 2 == 0
        data[OVERLAPS].edge_index = torch.stack([source[keep], target[keep]])
        data[OVERLAPS].edge_attr = torch.randn(int(keep.sum()), 2, dtype=torch.float64)
        data[SIMILAR].edge_index = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 0]])
        data[SIMILAR].edge_attr = torch.arange(4.0, dtype=torch.float64)[:, None]
        graphs.append(data)
    data = Batch.from_data_list(graphs)
    sparse, dense_ = net(data), net(as_layout(data, "dense"))
    close(dense_.match_logits, sparse.match_logits)
    sparse.logits.sin().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None]
    assert dead == []
    with pytest.raises(ConfigError, match="instance overlaps instance edges"):
        net(Batch.from_data_list([graph(2, vectors())]))


def test_lazy_sizes() -> None:
    data = graph(4, vectors())
    torch.manual_seed(4)
    lazy = GMMLIC(-1, -1, widths=(6, 5)).double()
    lazy(as_layout(data, "dense"))
    known = GMMLIC(D_O, D_L, widths=(6, 5)).double()
    assert {n: p.shape for n, p in lazy.named_parameters()} == {n: p.shape for n, p in known.named_parameters()}
    known.load_state_dict(lazy.state_dict())
    for layout in LAYOUTS:
        close(known(as_layout(data, layout)).logits, lazy(as_layout(data, layout)).logits)
    fresh = GMMLIC(-1, -1, widths=(6, 5)).double()
    fresh.load_state_dict(known.state_dict())
    close(fresh(data).logits, known(data).logits)


# Building block


@pytest.mark.parametrize("edge_types", EDGE_SUBSETS, ids=",".join)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_every_parameter_has_a_gradient(fusion: str, k: int, edge_types: list[str]) -> None:
    # Wide enough that no function has only inactive hidden units.
    net = model(k=k, widths=(24,) * k, fusion=fusion, norm="all", edge_types=edge_types)
    W = vectors(5)
    matches = net(Batch.from_data_list([graph(4, W), graph(3, W, 1)])).match_logits
    matches[matches.isfinite()].sin().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert dead == []


@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_reset_parameters_resets_every_parameter(fusion: str) -> None:
    net = model(fusion=fusion, norm="all")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7.0)
    net.reset_parameters()
    assert [name for name, p in net.named_parameters() if bool((p == 7.0).any())] == []


def test_graph_is_not_modified() -> None:
    data = Batch.from_data_list([graph(3, vectors()), graph(2, vectors())])
    before = copy.deepcopy(data.to_dict())
    model()(data)
    after = data.to_dict()
    assert after.keys() == before.keys()
    for key, store in before.items():
        if isinstance(store, dict):
            assert after[key].keys() == store.keys()
            assert all(torch.equal(after[key][name], value) for name, value in store.items())


def test_repr_and_shapes() -> None:
    net = model()
    assert repr(MILMax(D_O, C, width=6)) == "MILMax(5, 3, width=6)"
    assert repr(net) == "GMMLIC(5, 4, k=2, widths=[6, 5], fusion='product')"
    output = net(Batch.from_data_list([graph(3, vectors()), graph(2, vectors())]))
    assert output.logits.shape == output.argmax_instance.shape == (2, C)
    assert output.match_logits.shape == (2, 3, C)
    assert output.label_states.shape == (2, C, 5)
    assert output.argmax_instance.dtype == torch.int64


def test_model_accepts_other_labels() -> None:
    net = model()
    for layout in LAYOUTS:
        assert net(as_layout(graph(3, vectors(2)), layout)).logits.shape == (1, 2)
        assert net(as_layout(graph(3, vectors(6)), layout)).logits.shape == (1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "^k must be an integer from 1 to 100; got 0"),
        ({"k": -1, "widths": None}, "^k must be"),
        ({"k": 3}, "^widths must have k = 3"),
        ({"widths": (6, 0)}, "^widths must be an integer of at least 1, or a list of integers of at least 1"),
        ({"encoder_width": 0}, "^encoder_width must be an integer of at least 1"),
        ({"fusion": "sum"}, "concat, product; got 'sum'"),
        ({"norm": "batch"}, "none, encoder, all"),
        ({"edge_types": ["near"]}, "^edge_types must be names among spatial, semantic, matches"),
        ({"edge_types": "spatial"}, "^edge_types must be names among"),
        ({"edge_types": SPATIAL}, "^edge_types must be names among"),
        ({"edge_types": None}, "^edge_types must be names among .* got None"),
        ({"k": 2.0}, "^k must be an integer from 1 to 100; got 2.0"),
        ({"k": True}, "^k must be an integer from 1 to 100; got True"),
        ({"widths": 0}, "^widths must be an integer of at least 1, or a list .*; got 0"),
        ({"widths": 2.5}, "^widths must be an integer of at least 1, or a list .*, or None; got 2.5"),
    ],
)
def test_invalid_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        model(**options)


def test_invalid_input_sizes() -> None:
    with pytest.raises(ArgumentError, match=r"^instance_dim must be 1 or more, or -1"):
        GMMLIC(0, 4)
    with pytest.raises(ArgumentError, match=r"^label_dim must be 1 or more, or -1"):
        GMMLIC(4, -2)


def test_default_widths() -> None:
    assert GMMLIC(1, 1).widths == (512, 256)
    assert GMMLIC(1, 1, k=1).widths == (256,)
    assert GMMLIC(1, 1, k=1).encoder_width == 256


def test_loader_round_trip_keeps_attributes() -> None:
    W = vectors()
    graphs = [graph(M, W, seed) for seed, M in enumerate([4, 1, 3])]
    (batch,) = DataLoader(graphs, batch_size=3)
    assert batch.y.shape == (3, C)
    assert batch.row.tolist() == [0, 1, 2]
    for ours, theirs in zip(batch.to_data_list(), graphs, strict=True):
        for kind in theirs.node_types:
            assert all(torch.equal(ours[kind][name], value) for name, value in theirs[kind].items())
        for kind in theirs.edge_types:
            assert all(torch.equal(ours[kind][name], value) for name, value in theirs[kind].items())
    (dense_batch,) = torch.utils.data.DataLoader(graphs, batch_size=3, collate_fn=AssignmentBatch.collate)
    close(model()(dense_batch).match_logits, model()(batch).match_logits)
    assert torch.equal(dense_batch.y, batch.y)


def test_mil_max_reads_only_instances() -> None:
    net = MILMax(D_O, C, width=6).double()
    graphs = [graph(M, vectors(), seed) for seed, M in enumerate([4, 1, 3])]
    batch = Batch.from_data_list(graphs)
    output = net(batch)
    for b, data in enumerate(graphs):
        box = (data["instance"].box - 0.5) * 12**0.5
        scores = net.decoder(net.encoder(data["instance"].x, box))
        close(output.logits[b], scores.amax(dim=0))
        assert torch.equal(output.argmax_instance[b], scores.argmax(dim=0))
    other = Batch.from_data_list([graph(M, vectors(seed=5), seed) for seed, M in enumerate([4, 1, 3])])
    close(net(other).logits, output.logits)
    close(net(as_layout(batch, "dense")).logits, output.logits)
    with pytest.raises(ConfigError, match="4 labels, the model 3"):
        net(graph(2, vectors(4)))
    before = net.state_dict()["decoder.lin1.lins.0.weight"].clone()
    net.reset_parameters()
    assert not torch.equal(net.decoder.lin1.lins[0].weight, before)


# Compilation


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_to_one_graph(layout: str) -> None:
    net, data = model(), as_layout(Batch.from_data_list([graph(3, vectors()), graph(2, vectors())]), layout)
    torch._dynamo.reset()
    output, expected = torch.compile(net, backend="eager", fullgraph=True)(data), net(data)
    close(output.logits, expected.logits)
    close(output.match_logits, expected.match_logits)


@pytest.mark.slow
def test_batches_of_equal_shape_do_not_recompile() -> None:
    net, W = model(), vectors()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, dynamic=False)
    for counts in ([4, 1], [2, 4], [4, 4]):
        batch = dense(counts, W)
        assert batch.edge_index_dict[SPATIAL].index.shape == (2, 4, 2)
        output = compiled(batch)
        close(output.logits, net(batch).logits)
        output.logits.sum().backward()
    assert counter.frame_count == 1


# Precision


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "make", [lambda: model(widths=(64, 64)), lambda: MILMax(D_O, 20, width=64)], ids=["gm_mlic", "mil_max"]
)
def test_autocast_keeps_float32_logits_and_nearly_the_ranking(make: Any, layout: str) -> None:
    net = make().float()
    torch.manual_seed(6)
    data = Batch.from_data_list([graph(8, vectors(20), seed) for seed in range(16)])
    data = as_layout(data.apply(lambda value: value.float() if value.is_floating_point() else value), layout)
    exact = net(data)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(data)
    assert output.logits.dtype == output.match_logits.dtype == torch.float32
    first, second = torch.triu_indices(16, 16, offset=1)
    before, after = (o.logits[first] - o.logits[second] for o in (exact, output))
    assert bool((after != 0).all())
    assert float((before.sign() != after.sign()).float().mean()) < 0.03
    output.logits.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(layout: str, dtype: torch.dtype) -> None:
    """Instances of that dtype, or a converted graph: label vectors have the same dtype."""
    net, exact = model(widths=(64, 64)).to(dtype), model(widths=(64, 64))
    W, data = vectors().float(), graph(4, vectors())
    expected = exact(data).match_logits
    half = HeteroData()
    half["instance"].x, half["instance"].box = data["instance"].x.to(dtype), data["instance"].box
    graphs = [
        as_layout(AssignmentGraph(W, num_neighbors=2)(half), layout),
        as_layout(data.clone().apply(lambda x: x.to(dtype) if x.is_floating_point() else x), layout),
    ]
    if layout == "dense":
        graphs.append(as_layout(data, "dense").to(dtype))
    for converted in graphs:
        output = net(converted)
        assert output.match_logits.dtype == dtype
        assert float((output.match_logits.double() - expected).abs().max()) < 0.1 * float(expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graph_of_another_dtype_is_refused(layout: str) -> None:
    data = graph(4, vectors())
    with pytest.raises(
        ConfigError, match=r"x_dict\['instance'\] of the graph is torch.float64, the model's parameters"
    ):
        model().to(torch.bfloat16)(as_layout(data, layout))
    data["label"].x = data["label"].x.float()
    with pytest.raises(ConfigError, match=r"x_dict\['label'\] of the graph is torch.float32, .* torch.float64"):
        model()(as_layout(data, layout))


# Unusual graphs


def test_label_graph_with_self_loops_is_not_complete() -> None:
    data = graph(3, vectors())
    target = data[SEMANTIC].edge_index[1]
    data[SEMANTIC].edge_index = torch.stack([target, target])
    close(model()(as_layout(data, "dense")).logits, model()(data).logits)


def test_label_graph_with_a_repeated_edge_is_not_complete() -> None:
    data = graph(3, vectors())
    data[SEMANTIC].edge_index = data[SEMANTIC].edge_index[:, [0, 0, 2, 3, 4, 5]]
    close(model()(as_layout(data, "dense")).logits, model()(data).logits)


def test_label_graph_without_edges_sends_zeros() -> None:
    data = graph(3, vectors())
    data[SEMANTIC].edge_index = torch.empty(2, 0, dtype=torch.int64)
    close(model()(as_layout(data, "dense")).logits, model()(data).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_propagates(layout: str) -> None:
    """A diverged run has a NaN loss instead of an index error."""
    data = Batch.from_data_list([graph(3, vectors()), graph(2, vectors(), 1)])
    data["instance"].x[0, 0] = float("nan")
    output = model()(as_layout(data, layout))
    assert output.logits[0].isnan().all()
    assert output.logits[1].isfinite().all()


def test_images_with_different_numbers_of_labels_are_refused() -> None:
    graphs = [graph(3, vectors(2)), graph(3, vectors(4))]
    for data in graphs:
        del data["y"]  # PyG refuses to concatenate targets of different lengths
    with pytest.raises(ConfigError, match=r"same number of labels, got \[2, 4\]"):
        model()(Batch.from_data_list(graphs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_label_without_matching_edges(layout: str) -> None:
    data = graph(3, vectors())
    data[MATCHES].edge_index = data[MATCHES].edge_index[:, data[MATCHES].edge_index[1] != 1]
    with pytest.raises(ConfigError, match=r"Label nodes \[1\] have no matching edge"):
        model()(as_layout(data, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("missing", ["spatial", "semantic"])
def test_graph_without_an_edge_type_of_the_model(missing: str, layout: str) -> None:
    data = graph(3, vectors(), edge_types=[name for name in ("spatial", "semantic") if name != missing])
    before = data.edge_types
    with pytest.raises(ConfigError, match=f"The model uses .* {missing} .* edges, the graph has none"):
        model()(as_layout(data, layout))
    assert data.edge_types == before


def test_padding_does_not_affect_real_instances() -> None:
    x, box, mask = torch.randn(1, 3, D_O).double(), torch.rand(1, 3, 4).double(), torch.tensor([[True, True, False]])
    net = model()
    clean = net(AssignmentBatch.from_padded(x, box, mask, vectors())).logits
    for garbage in (1e30, float("nan")):
        x[0, 2], box[0, 2] = garbage, garbage
        close(net(AssignmentBatch.from_padded(x, box, mask, vectors())).logits, clean)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("D", "L"), [(D_O + 1, D_L), (D_O, D_L + 1)])
def test_inputs_of_another_size(D: int, L: int, layout: str) -> None:
    net = GMMLIC(D, L, widths=(4, 4)).double()
    with pytest.raises(ConfigError, match="the model was built for"):
        net(as_layout(graph(3, vectors()), layout))


def test_unusable_inputs() -> None:
    net, data = model(), graph(3, vectors())
    with pytest.raises(ConfigError, match="takes a HeteroData or an AssignmentBatch, not Tensor"):
        net(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="no instance nodes with features x"):
        net(HeteroData())
    nodes = HeteroData({name: {"x": data[name].x} for name in ("instance", "label")})
    with pytest.raises(ConfigError, match="uses instance spatial instance edges, the graph has none"):
        net(nodes)
    with pytest.raises(ConfigError, match="label cache needs an AssignmentBatch"):
        net.precompute_labels(data)
    for layout in LAYOUTS:
        for attr, found in ((data[SPATIAL].edge_attr[:, :6], "6"), (None, "none")):
            changed_ = data.clone()
            del changed_[SPATIAL]["edge_attr"]
            if attr is not None:
                changed_[SPATIAL].edge_attr = attr
            with pytest.raises(ConfigError, match=f"spatial instance edges need edge_attr of length 8, got {found}"):
                net(as_layout(changed_, layout))


def test_edge_types_by_tuple() -> None:
    data = graph(3, vectors(), edge_types=[SPATIAL])
    assert data.edge_types == [SPATIAL, MATCHES]
    by_tuple, by_name = model(edge_types=[SPATIAL, MATCHES]), model(edge_types=["spatial", "matches"])
    close(by_tuple(data).logits, by_name(data).logits)


def test_match_logits_of_another_shape() -> None:
    data = graph(3, vectors())
    for layout, shape in (("sparse", (3,)), ("dense", (1, 3, 2))):
        with pytest.raises(ArgumentError, match=r"^match_logits must be \("):
            pool_instances(torch.zeros(shape), as_layout(data, layout))


def test_output_of_ones_own() -> None:
    logits, values = torch.zeros(2, C), torch.randn(2, 4, C)
    with pytest.raises(ConfigError, match="must give ModelOutput `matches`"):
        ModelOutput(logits, logits.long()).match_logits  # noqa: B018
    output = ModelOutput(logits, logits.long(), matches=values)
    assert output.match_logits is values
    assert repr(output) == "ModelOutput(logits=[2, 3], argmax_instance=[2, 3], matches=[2, 4, 3])"
    half = output.to(device="cpu", dtype=torch.float16)
    assert (half.logits.dtype, half.matches.dtype, half.argmax_instance.dtype) == (
        torch.float16,
        torch.float16,
        torch.int64,
    )
    sparse = model()(graph(3, vectors())).cpu()
    assert torch.equal(sparse.to(torch.float32).match_logits, sparse.match_logits.float())


def test_one_width_for_all_blocks() -> None:
    assert GMMLIC(3, 4, k=3, widths=8).widths == GMMLIC(3, 4, k=3, widths=(8, 8, 8)).widths == (8, 8, 8)
