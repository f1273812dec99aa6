from __future__ import annotations

import torch

from gm_mlic.bench import interleaved, matrix_rate, peak_bytes


def test_runs_are_interleaved() -> None:
    order: list[str] = []
    runs = {name: (lambda n=name: order.append(n)) for name in "abc"}
    timings = interleaved(runs, 3)
    assert order == list("abcabcabc")
    assert {name: len(seconds) for name, seconds in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_peak_memory_in_bytes() -> None:
    def run() -> None:
        a = torch.ones(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b * 2  # 8000: a is freed
        c.relu_()
        d = torch.cat([b, c])  # 16000
        del b, c, d

    kept = torch.ones(10_000)
    assert 16_000 <= peak_bytes(run) < 16_100
    assert kept.sum() == 10_000


def test_peak_memory_includes_tensors_saved_for_backward() -> None:
    w = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(500, 64)

    def deep(layers: int) -> int:
        def run() -> None:
            h = x
            for _ in range(layers):
                h = (h @ w).relu()
            h.sum().backward()
            w.grad = None

        return peak_bytes(run)

    assert deep(8) - deep(4) == 4 * 500 * 64 * 4


def test_profiler_output_is_hidden(capfd) -> None:
    peak_bytes(lambda: torch.ones(3))
    assert capfd.readouterr().err == ""


def test_matrix_rate_is_plausible() -> None:
    assert 1e6 < matrix_rate(64, 64) < 1e15
