"""How things are measured: in turns, so that a busy machine slows all of them alike; memory to the byte."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker


@dataclass(frozen=True)
class Timings:
    """Seconds of repeated runs of one thing."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest."""
        return min(self.seconds), max(self.seconds)


class FlopCounter(FlopCounterMode):
    """Counts the floating-point operations of matrix products, in-place ones included.

    Unlike torch's own counter it adds no hooks to modules: modules with hooks do not take the shorter computation.
    """

    def __init__(self) -> None:
        super().__init__(display=False)
        self.flop_registry[torch.ops.aten.addmm_] = self.flop_registry[torch.ops.aten.addmm]
        self.mod_tracker = _NoModules()


class _NoModules(ModuleTracker):
    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None: ...


def synchronise(device: str) -> None:
    """Wait for a GPU; nothing to wait for elsewhere."""
    if device != "cpu":
        torch.cuda.synchronize()


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str = "cpu",
    done: Callable[[str, float], None] = lambda name, seconds: None,
) -> dict[str, Timings]:
    """Time each of ``runs`` ``repeats`` times, in turns: a, b, c, a, b, c, ...

    Args:
        runs: what to time, by name; each should have run before (caches, compilation).
        repeats: rounds.
        device: ``cuda`` waits for the GPU before and after each.
        done: told of each run's name and seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            synchronise(device)
            begin = time.perf_counter()
            run()
            synchronise(device)
            seconds[name].append(time.perf_counter() - begin)
            done(name, seconds[name][-1])
    return {name: Timings(tuple(values)) for name, values in seconds.items()}


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """The most memory that tensors made by ``run`` take at a time, beyond what was there before.

    Counted at torch's allocators, so neither other processes nor what the C library keeps for later is in it.
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
    """Keep lines that torch's profiler writes from C++ off the terminal: they mean nothing to people."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def matrix_rate(rows: int, width: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of this machine's matrix product (rows, width) @ (width, width): the best of several runs.

    It is what the arithmetic alone would take, so the bound that an execution is measured against.
    """
    a = torch.randn(rows, width, device=device, dtype=dtype)
    b = torch.randn(width, width, device=device, dtype=dtype)
    out = a @ b
    best = min(interleaved({"product": lambda: torch.mm(a, b, out=out)}, 10, device)["product"].seconds)
    return 2 * rows * width * width / best
