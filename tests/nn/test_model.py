from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch_geometric.data import Batch, HeteroData
from torch_geometric.loader import DataLoader

from gm_mlic.errors import ConfigError
from gm_mlic.graphs import MATCHES, NEAR, RELATES, AssignmentBatch, AssignmentGraph
from gm_mlic.nn import GMMLIC, MILMax

D_O, D_L, C = 5, 4, 3
ABLATIONS = [
    dict(zip(("label_graph", "instance_graph", "matching_edges"), flags, strict=True))
    for flags in product((True, False), repeat=3)
]
EXECUTIONS = ("explicit", "structured")


def graph(M: int, W: Tensor, seed: int = 0, **options: Any) -> HeteroData:
    generator = torch.Generator().manual_seed(seed)
    data = HeteroData()
    data["instance"].x = torch.randn(M, D_O, generator=generator, dtype=torch.float64)
    corner, size = torch.rand(2, M, 2, generator=generator, dtype=torch.float64) / 2
    data["instance"].box = torch.cat([corner, corner + size + 0.01], dim=1)
    data.y = torch.ones(1, len(W), dtype=torch.int64)
    data.row = torch.tensor([seed])
    return AssignmentGraph(W, neighbours=2, **options)(data)


def vectors(labels: int = C, seed: int = 9) -> Tensor:
    return torch.randn(labels, D_L, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(execution: str = "explicit", **options: Any) -> GMMLIC:
    torch.manual_seed(4)
    made = GMMLIC(D_O, D_L, **{"widths": (6, 5), "execution": execution, **options}).double()
    with torch.no_grad():
        # Live hidden units: no two logits are equal, so each label has one winner.
        made.decoder.lin1.bias.add_(2.0)
    return made


def dense(counts: list[int], W: Tensor) -> AssignmentBatch:
    batch = AssignmentBatch.from_data(Batch.from_data_list([graph(M, W, seed) for seed, M in enumerate(counts)]))
    assert batch is not None
    return batch


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# Symmetries


@pytest.mark.parametrize("execution", EXECUTIONS)
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(4)))
def test_instances_may_come_in_any_order(execution: str, order: list[int]) -> None:
    W, net = vectors(), model(execution)
    data = graph(4, W)
    shuffled = HeteroData()
    for name in ("x", "box"):
        shuffled["instance"][name] = data["instance"][name][order]
    shuffled = AssignmentGraph(W, neighbours=2)(shuffled)
    before, after = net(data), net(shuffled)
    close(after.logits, before.logits)
    close(after.match_logits.view(4, C), before.match_logits.view(4, C)[order])
    assert torch.equal(torch.tensor(order)[after.winners], before.winners)


@pytest.mark.parametrize("execution", EXECUTIONS)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(C)))
def test_labels_may_come_in_any_order(execution: str, order: list[int]) -> None:
    W, net = vectors(), model(execution)
    before, after = net(graph(4, W)), net(graph(4, W[order]))
    close(after.logits, before.logits[:, order])
    close(after.match_logits.view(4, C), before.match_logits.view(4, C)[:, order])
    assert torch.equal(after.winners, before.winners[:, order])


@pytest.mark.parametrize("execution", ["explicit", "auto"])
@pytest.mark.parametrize("edge_type", [NEAR, RELATES, MATCHES], ids=lambda edge_type: edge_type[1])
@pytest.mark.parametrize("label_neighbours", [None, 1])
def test_edges_may_come_in_any_order(edge_type: Any, execution: str, label_neighbours: int | None) -> None:
    net, data = model(execution), graph(4, vectors(), label_neighbours=label_neighbours)
    shuffled = copy.copy(data)
    order = torch.randperm(data[edge_type].edge_index.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled[edge_type].edge_index = data[edge_type].edge_index[:, order]
    if "edge_attr" in data[edge_type]:
        shuffled[edge_type].edge_attr = data[edge_type].edge_attr[order]
    before, after = net(data), net(shuffled)
    close(after.logits, before.logits)
    assert torch.equal(after.winners, before.winners)
    close(after.match_logits, before.match_logits[order] if edge_type == MATCHES else before.match_logits)


@pytest.mark.parametrize("execution", EXECUTIONS)
@settings(max_examples=15, deadline=None)
@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_batch_equals_loop(execution: str, counts: list[int]) -> None:
    W, net = vectors(), model(execution)
    graphs = [graph(M, W, seed) for seed, M in enumerate(counts)]
    together = net(Batch.from_data_list(graphs))
    alone = [net(data) for data in graphs]
    close(together.logits, torch.cat([output.logits for output in alone]))
    close(together.match_logits, torch.cat([output.match_logits for output in alone]))
    assert torch.equal(together.winners, torch.cat([output.winners for output in alone]))


@pytest.mark.parametrize("make", [model, lambda: MILMax(D_O, C, width=6).double()], ids=["gm_mlic", "mil_max"])
def test_order_of_images_in_a_batch(make: Any) -> None:
    W, net = vectors(), make()
    graphs = [graph(M, W, seed) for seed, M in enumerate([4, 1, 3])]
    forth, back = (net(Batch.from_data_list(order)) for order in (graphs, graphs[::-1]))
    close(forth.logits, back.logits.flip(0))
    assert torch.equal(forth.winners, back.winners.flip(0))


# Executions


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda flags: "".join("+-"[not on] for on in flags.values()))
@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_both_executions_have_the_same_gradients(fusion: str, ablation: dict[str, bool]) -> None:
    data = Batch.from_data_list([graph(M, vectors(), seed) for seed, M in enumerate([4, 1, 3])])
    gradients = []
    for execution in EXECUTIONS:
        net = model(execution, fusion=fusion, norm="all", **ablation)
        net(data).match_logits.sin().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in net.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


def test_a_dense_batch_equals_its_graphs() -> None:
    W, net = vectors(), model("auto")
    graphs = [graph(M, W, seed) for seed, M in enumerate([4, 1, 3])]
    x, box, mask = torch.zeros(3, 4, D_O).double(), torch.zeros(3, 4, 4).double(), torch.zeros(3, 4, dtype=torch.bool)
    for b, data in enumerate(graphs):
        M = data["instance"].x.shape[0]
        x[b, :M], box[b, :M], mask[b, :M] = data["instance"].x, data["instance"].box, True
    ours, theirs = net(AssignmentBatch.build(x, box, mask, W, neighbours=2)), net(Batch.from_data_list(graphs))
    close(ours.logits, theirs.logits)
    close(ours.match_logits, theirs.match_logits)
    assert torch.equal(ours.winners, theirs.winners)


@pytest.mark.parametrize("execution", ["explicit", "auto"])
def test_missing_matching_edges(execution: str) -> None:
    """An instance that is not compared with a label cannot win it."""
    data = graph(4, vectors())
    source, target = data[MATCHES].edge_index
    keep = ~((source == 2) & (target != 0))
    data[MATCHES].edge_index = data[MATCHES].edge_index[:, keep]
    output = model(execution)(data)
    assert output.match_logits.shape == (10,)
    assert 2 not in output.winners[0, 1:].tolist()
    matrix = torch.full((4, C), float("-inf"), dtype=torch.float64)
    matrix[tuple(data[MATCHES].edge_index)] = output.match_logits
    close(output.logits[0], matrix.amax(dim=0))


def test_structured_refuses_what_it_cannot_do() -> None:
    data = graph(4, vectors())
    data[MATCHES].edge_index = data[MATCHES].edge_index.flip(1)
    with pytest.raises(ConfigError, match="execution=structured"):
        model("structured")(data)
    with pytest.raises(ConfigError, match="execution=explicit"):
        model("explicit")(dense([2], vectors()))


# Building block


@pytest.mark.parametrize("ablation", ABLATIONS, ids=lambda flags: "".join("+-"[not on] for on in flags.values()))
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_no_parameter_is_dead(fusion: str, k: int, ablation: dict[str, bool]) -> None:
    # Wide enough that no function has only dead hidden units by chance.
    net = model(k=k, widths=(24,) * k, fusion=fusion, norm="all", **ablation)
    W = vectors(5)
    net(Batch.from_data_list([graph(4, W), graph(3, W, 1)])).match_logits.sin().sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert dead == []


@pytest.mark.parametrize("fusion", ["concat", "product"])
def test_reset_parameters_draws_everything_anew(fusion: str) -> None:
    net = model(fusion=fusion, norm="all")
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7.0)
    net.reset_parameters()
    assert [name for name, p in net.named_parameters() if bool((p == 7.0).any())] == []


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_graph_is_left_as_it_was(execution: str) -> None:
    data = Batch.from_data_list([graph(3, vectors()), graph(2, vectors())])
    before = copy.deepcopy(data.to_dict())
    model(execution)(data)
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
    assert output.logits.shape == output.winners.shape == (2, C)
    assert output.match_logits.shape == (5 * C,)
    assert output.winners.dtype == torch.int64


def test_one_model_takes_other_labels() -> None:
    net = model("auto")
    assert net(graph(3, vectors(2))).logits.shape == (1, 2)
    assert net(graph(3, vectors(6))).logits.shape == (1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "model.k"),
        ({"k": -1, "widths": None}, "model.k"),
        ({"k": 3}, "model.widths must have k = 3"),
        ({"widths": (6, 0)}, "1 or more"),
        ({"encoder_width": 0}, "1 or more"),
        ({"fusion": "sum"}, "concat, product; got 'sum'"),
        ({"norm": "batch"}, "none, encoder, all"),
        ({"execution": "fast"}, "model.execution"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(**options)


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


def test_mil_max_reads_nothing_but_instances() -> None:
    net = MILMax(D_O, C, width=6).double()
    graphs = [graph(M, vectors(), seed) for seed, M in enumerate([4, 1, 3])]
    batch = Batch.from_data_list(graphs)
    output = net(batch)
    for b, data in enumerate(graphs):
        box = (data["instance"].box - 0.5) * 12**0.5
        scores = net.decoder(net.encoder(data["instance"].x, box))
        close(output.logits[b], scores.amax(dim=0))
        assert torch.equal(output.winners[b], scores.argmax(dim=0))
    other = Batch.from_data_list([graph(M, vectors(seed=5), seed) for seed, M in enumerate([4, 1, 3])])
    close(net(other).logits, output.logits)
    close(net(AssignmentBatch.from_data(batch)).logits, output.logits)
    with pytest.raises(ConfigError, match="4 labels, the model 3"):
        net(graph(2, vectors(4)))
    before = net.state_dict()["decoder.lin1.weight"].clone()
    net.reset_parameters()
    assert not torch.equal(net.decoder.lin1.weight, before)


# Compilation


def breaks(net: torch.nn.Module, data: Any) -> list[str]:
    torch._dynamo.reset()
    explanation = torch._dynamo.explain(net)(data)
    return [str(reason.reason).splitlines()[0] for reason in explanation.break_reasons]


def test_explicit_execution_compiles_to_one_graph() -> None:
    assert breaks(model(), Batch.from_data_list([graph(3, vectors()), graph(2, vectors())])) == []


def test_dense_batch_compiles_to_one_graph() -> None:
    assert breaks(model("auto"), dense([3, 2], vectors())) == []


def test_batches_of_one_shape_do_not_compile_again() -> None:
    net, W = model("auto"), vectors()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, dynamic=False)
    for counts in ([4, 1], [2, 4], [4, 4]):
        batch = dense(counts, W)
        near = batch.near is not None and batch.near.shape
        assert near == (2, 4, 2)
        output = compiled(batch)
        close(output.logits, net(batch).logits)
        output.logits.sum().backward()
    assert counter.frame_count == 1


# Mixed precision


@pytest.mark.parametrize(
    "make",
    [*(lambda e=e: model(e, widths=(64, 64)) for e in EXECUTIONS), lambda: MILMax(D_O, 20, width=64)],
    ids=[*EXECUTIONS, "mil_max"],
)
def test_autocast_keeps_logits_in_float32_and_hardly_moves_the_ranking(make: Any) -> None:
    net = make().float()
    torch.manual_seed(6)
    data = Batch.from_data_list([graph(8, vectors(20), seed) for seed in range(16)])
    data.apply(lambda value: value.float() if value.is_floating_point() else value)
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


# Graphs that are not as they should be


def test_label_graph_with_self_loops_is_not_taken_for_complete() -> None:
    data = graph(3, vectors())
    target = data[RELATES].edge_index[1]
    data[RELATES].edge_index = torch.stack([target, target])
    close(model("auto")(data).logits, model("explicit")(data).logits)


def test_label_graph_with_a_repeated_edge_is_not_taken_for_complete() -> None:
    data = graph(3, vectors())
    data[RELATES].edge_index = data[RELATES].edge_index[:, [0, 0, 2, 3, 4, 5]]
    close(model("auto")(data).logits, model("explicit")(data).logits)


def test_label_graph_without_edges_sends_zeros() -> None:
    data = graph(3, vectors())
    data[RELATES].edge_index = torch.empty(2, 0, dtype=torch.int64)
    close(model("auto")(data).logits, model("explicit")(data).logits)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_nan_in_nan_out(execution: str) -> None:
    """A run that diverges shows a NaN loss; it does not die of an index out of range."""
    data = Batch.from_data_list([graph(3, vectors()), graph(2, vectors(), 1)])
    data["instance"].x[0, 0] = float("nan")
    output = model(execution)(data)
    assert output.logits[0].isnan().all()
    assert output.logits[1].isfinite().all()


def test_images_with_different_numbers_of_labels_do_not_mix() -> None:
    graphs = [graph(3, vectors(2)), graph(3, vectors(4))]
    for data in graphs:
        del data["y"]  # PyG by itself refuses to join targets of different lengths
    with pytest.raises(ConfigError, match=r"have \[2, 4\] labels"):
        model("auto")(Batch.from_data_list(graphs))


def test_label_without_matching_edges() -> None:
    data = graph(3, vectors())
    data[MATCHES].edge_index = data[MATCHES].edge_index[:, data[MATCHES].edge_index[1] != 1]
    with pytest.raises(ConfigError, match=r"Label nodes \[1\] have no matching edge"):
        model("auto")(data)


@pytest.mark.parametrize(
    ("left_out", "execution"),
    list(product(("instance_graph", "label_graph"), EXECUTIONS)),
)
def test_graph_of_another_ablation(left_out: str, execution: str) -> None:
    data = graph(3, vectors(), **{left_out: False})
    before = data.edge_types
    with pytest.raises(ConfigError):
        model(execution)(data)
    assert data.edge_types == before


def test_padding_does_not_reach_real_instances() -> None:
    x, box, mask = torch.randn(1, 3, D_O).double(), torch.rand(1, 3, 4).double(), torch.tensor([[True, True, False]])
    net = model("auto")
    clean = net(AssignmentBatch.build(x, box, mask, vectors())).logits
    for garbage in (1e30, float("nan")):
        x[0, 2], box[0, 2] = garbage, garbage
        close(net(AssignmentBatch.build(x, box, mask, vectors())).logits, clean)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("D", "L"), [(D_O + 1, D_L), (D_O, D_L + 1)])
def test_inputs_of_another_length(D: int, L: int, execution: str) -> None:
    net = GMMLIC(D, L, widths=(4, 4), execution=execution).double()
    with pytest.raises(ConfigError):
        net(graph(3, vectors()))
