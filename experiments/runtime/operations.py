"""Operations of sparse and dense execution at the sizes of MS-COCO.

    OMP_NUM_THREADS=1 python experiments/runtime/operations.py

Prints the operations of both executions; for dense execution and ``concat``, the operations of a forward pass by kind
of edge, and the time of a training step by kind of operator (torch's profiler).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from gm_mlic.bench import CASES, FlopCounter
from gm_mlic.bench.runtime import Execution, flops
from gm_mlic.cli.environment import prepare_process

KINDS = {
    "matrix products": ("addmm", "mm", "bmm", "linear", "addmm_"),
    "ReLU, backward": ("threshold_backward",),
    "LayerNorm, backward": ("native_layer_norm_backward",),
    "LayerNorm, forward": ("native_layer_norm",),
    "sums": ("sum",),
}


class ByRows(TorchDispatchMode):
    """Counts the operations of matrix products by the number of rows of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = FlopCounter().flop_registry
        self.flops: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.registry:
            count = self.registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.flops[out.numel() // out.shape[-1]] += count
        return out


def totals() -> None:
    """Operations of a forward pass and of a training step, and their ratios."""
    for fusion in ("concat", "product"):
        for norm in ("all", "none"):
            case = replace(CASES["coco2014"], fusion=fusion, norm=norm)
            sparse, dense = flops(case, "sparse"), flops(case, "dense")
            for mode in sparse:
                ratio = sparse[mode] / dense[mode]
                numbers = f"sparse {sparse[mode] / 1e9:,.0f}, dense {dense[mode] / 1e9:,.0f} GFLOP, ratio {ratio:.1f}"
                print(f"{fusion}, norm {norm}, {mode}: {numbers}")


def parts() -> None:
    """Shares of operations and of time."""
    case = CASES["coco2014"]
    run = Execution(case, "dense")
    with ByRows() as counter:
        run.forward()
    total = sum(counter.flops.values())
    product = 2 * 512**2
    for name, edges in (
        ("matching edges", case.batch * case.m * case.C),
        ("label edges, for each image", case.batch * case.C**2),
        ("label edges, once for all images", case.C**2),
    ):
        count = counter.flops[edges]
        print(f"{name}: {100 * count / total:.0f} %, {count / edges / product:.2f} products of 512 x 512 per edge")

    run.train()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run.train()
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profiler.key_averages()}
    for name, operators in KINDS.items():
        print(f"{name}: {100 * sum(times.get(key, 0) for key in operators) / sum(times.values()):.0f} % of the time")


if __name__ == "__main__":
    prepare_process()
    totals()
    parts()
