"""Measurement of time, memory and FLOPs; timed runs are interleaved, so that load affects all of them equally."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


class FlopCounter(FlopCounterMode):
    """FLOP counter for matrix products, including in-place ones.

    Unlike torch's counter it registers no module hooks, since modules with hooks do not use the fused computation.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.flop_registry[torch.ops.aten.addmm_] = self.flop_registry[torch.ops.aten.addmm]
        self.mod_tracker = _NoModules()


class _NoModules(ModuleTracker):
    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None: ...


def synchronize(device: str) -> None:
    """Synchronize a GPU; no-op on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def interleaved(runs: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each of ``runs``, ``repeats`` times, interleaved: a, b, c, a, b, c, ...

    Each should be warmed up (caches, compilation). ``cuda`` synchronizes the GPU before and after each run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            synchronize(device)
            begin = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Peak memory of the tensors allocated by ``run``, in bytes.

    It is counted at torch's allocators: other processes and memory cached by the C library are not included.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silent_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Redirect stderr to /dev/null: torch's profiler writes to it from C++."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("w") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def matrix_rate(rows: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of the matrix product (rows, width) @ (width, width) on this machine, the best of several runs.

    It is the upper bound for an execution (roofline).
    """
    a = torch.randn(rows, width, device=device, dtype=dtype)
    b = torch.randn(width, width, device=device, dtype=dtype)
    out = a @ b
    best = min(interleaved({"product": lambda: torch.mm(a, b, out=out)}, 10, device)["product"])
    return 2 * rows * width * width / best
