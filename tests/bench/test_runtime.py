from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.data import HeteroData

from gm_mlic.bench import CASES, Case, compare, grow, ratios, shares
from gm_mlic.bench import runtime as module
from gm_mlic.bench.measure import FlopCounter, peak_bytes
from gm_mlic.bench.runtime import Execution, expected_bytes, flops
from gm_mlic.detection.protocol import Instances
from gm_mlic.graphs import AssignmentBatch

TINY = Case("tiny", m=3, C=4, batch=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INSTANCE_DIM", 16)
    monkeypatch.setattr(module, "LABEL_DIM", 8)


def test_cases_of_the_paper() -> None:
    assert {(c.name, c.m, c.C, c.k, c.batch) for c in CASES.values()} == {
        ("voc2007", 10, 20, 2, 16), ("coco2014", 35, 80, 2, 16), ("nuswide", 35, 81, 2, 16), ("large", 100, 500, 2, 16)
    }  # fmt: skip


@pytest.mark.parametrize("fusion", ["concat", "product"])
@pytest.mark.parametrize("num_label_neighbors", [None, 2])
def test_all_executions_give_equal_results(fusion: str, num_label_neighbors: int | None) -> None:
    case = Case("tiny", m=3, C=4, batch=2, fusion=fusion, num_label_neighbors=num_label_neighbors)
    sparse, dense = Execution(case, "sparse"), Execution(case, "dense")
    assert isinstance(sparse.data, HeteroData)
    assert isinstance(dense.data, AssignmentBatch)
    assert "edge_attr" in sparse.data["instance", "matches", "label"]
    torch.testing.assert_close(sparse.forward(), dense.forward(), rtol=1e-4, atol=1e-4)
    for _ in range(2):
        sparse.train()
        dense.train()
    torch.testing.assert_close(sparse.forward(), dense.forward(), rtol=1e-3, atol=1e-3)


def test_counted_flops_equal_the_formula() -> None:
    """In sparse execution each function of a matching edge has two matrix products over all matching edges."""
    small, large = (flops(Case("one", m=m, C=1), "sparse")["forward"] for m in (40, 80))
    edges, d, half = 16 * 40, 512, 256
    encoder = (16 + 8) * d + d * d + 16 * d + d * d  # of matching edges and instances
    instance_edges = 8 * d + d * d
    block = [
        (2 * d * w + w * w) * 7  # rho_n along the matching edges, both ways, and of five neighbors
        + (d + 2 * w) * w + w * w  # phi_n of instances
        + (2 * w * w + w * w) + ((d + w) * w + w * w)  # rho_e and phi_e of matching edges
        for w in (d, half)
    ]  # fmt: skip
    # encoder, then rho_e and phi_e of the first block
    spatial = 5 * (instance_edges + 2 * d * d + d * d + 2 * d * d + d * d)
    decoder = half * half + half
    assert large - small == 2 * edges * (encoder + spatial + sum(block) + decoder)


def test_dense_has_fewer_flops() -> None:
    dense, sparse = (flops(Case("small", m=10, C=20, batch=4), name) for name in ("dense", "sparse"))
    assert dense["forward"] < sparse["forward"] / 2
    assert 2 < dense["train"] / dense["forward"] < 4


@pytest.mark.parametrize("execution", ["sparse", "dense"])
def test_flops_of_a_batch_are_extrapolated_from_two_images(execution: str) -> None:
    case = Case("small", m=4, C=3, batch=5)
    run = Execution(case, execution)
    for step, count in zip((run.forward, run.train), flops(case, execution).values(), strict=True):
        with FlopCounter() as counter:
            step()
        assert counter.get_total_flops() == count


def test_compare() -> None:
    lines: list[str] = []
    result = compare(TINY, ["sparse", "dense"], repeats=(2, 1), log=lines.append)
    assert result["case"]["m"] == 3
    for name in ("sparse", "dense"):
        row = result["executions"][name]
        assert len(row["forward"]["all"]) == 2
        assert len(row["train"]["all"]) == 1
        assert row["memory"] > 0
    assert 0 < result["executions"]["dense"]["roofline"]["forward"] < 2
    assert lines[0] == "tiny: sparse, first run"
    summary = ratios(result)
    times = {name: row["forward"]["median"] for name, row in result["executions"].items()}
    assert summary["forward_ratio"] == times["sparse"] / times["dense"]
    counts = [flops(TINY, name)["forward"] for name in ("sparse", "dense")]
    assert summary["arithmetic_ratio"] == counts[0] / counts[1]
    assert set(summary) == {
        "forward_ratio", "train_ratio", "memory_ratio", "arithmetic_ratio", "roofline_fraction",
        "train_roofline_fraction",
    }  # fmt: skip


@pytest.mark.slow
def test_dense_execution_needs_less_memory() -> None:
    case = Case("small", m=10, C=20, batch=8)
    memory = {n: r["memory"] for n, r in compare(case, ["sparse", "dense"], repeats=(1, 1))["executions"].items()}
    assert memory["dense"] < memory["sparse"] / 1.5


@pytest.mark.slow
def test_gradient_checkpointing_needs_the_least_memory() -> None:
    case = Case("small", m=30, C=60, batch=6)
    kept, checkpointed = (peak_bytes(Execution(case, name).train) for name in ("dense", "checkpointed"))
    assert checkpointed < kept / 1.5
    assert expected_bytes(case, "checkpointed") < expected_bytes(case, "dense")


def test_executions_over_the_memory_limit_are_left_out() -> None:
    limit = expected_bytes(TINY, "dense")
    result = compare(TINY, ["sparse", "dense"], repeats=(1, 1), memory_limit=limit)
    assert "needs about" in result["executions"]["sparse"]["left_out"]
    assert ratios(result)["forward_ratio"] is None
    assert ratios(result)["roofline_fraction"] > 0


def test_growth_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.CURVES, "m", (2, 4))
    curves = grow(TINY, ["m"], ["dense"], repeats=(1, 1))
    assert [result["case"]["m"] for result in curves["m"]] == [2, 4]
    assert [result["case"]["C"] for result in curves["m"]] == [4, 4]


def test_shares() -> None:
    class Detector:
        name, labels, feature_dim, fingerprint = "one", ("thing",), 16, "0"

        def __call__(self, images: Any, m: int) -> list[Instances]:
            assert m == 3
            instances = Instances(
                torch.rand(1, 4).sort().values, torch.rand(1), torch.zeros(1).long(), torch.rand(1, 16)
            )
            return [instances for _ in images]

    seconds = shares(Detector(), [torch.rand(3, 8, 8)] * 2, TINY, repeats=1)
    assert set(seconds) == {"detection", "data", "graph", "train"}
    assert all(value > 0 for value in seconds.values())
