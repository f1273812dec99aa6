"""Time and memory of the evaluator at NUS-WIDE's test size, compared with a Python loop.

    python experiments/evaluator/run.py          # one process per convention; prints the table of README.md

Labels are those of NUS-WIDE if ../shared/data (or $GM_MLIC_SHARED) has them, else random with the same density.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gm_mlic.metrics import CONVENTIONS, MultiLabelMetrics, bootstrap_map

N, C = 107_859, 81
BATCH = 128
#: Number of labels for the loop over tensors; its time is extrapolated to all labels.
LOOPED = 9


def data() -> tuple[torch.Tensor, torch.Tensor, str]:
    """Scores (N, C) float32, targets (N, C) int8 in {0, 1}, and the source of the labels."""
    rng = np.random.default_rng(0)
    shared = Path(os.environ.get("GM_MLIC_SHARED", Path(__file__).resolve().parents[3] / "shared" / "data"))
    path = shared / "labels" / "nuswide81.npz"
    if path.is_file():
        rows = np.load(path)["rows"]
        rows = rows[np.sort(rng.choice(len(rows), N, replace=False))]
        present, source = np.unpackbits(rows, axis=1)[:, :C].astype(bool), "NUS-WIDE's labels"
    else:
        present, source = rng.random((N, C)) < 1.87 / C, "random labels"
    noise = rng.standard_normal((N, C), dtype=np.float32)
    scores = torch.sigmoid(torch.from_numpy(noise + np.where(present, 0.5, -2.5).astype(np.float32)))
    return scores, torch.from_numpy(present.astype(np.int8)), source


def loop_over_tensors(scores: torch.Tensor, targets: torch.Tensor, labels: int) -> float:
    """AP as in public code: sort each label, then loop over its images in the tensors.

    Targets are in {1, 0, -1}, where 0 is difficult.
    """
    values = []
    for c in range(labels):
        _, order = torch.sort(scores[:, c], descending=True)
        target, hits, seen, total = targets[:, c], 0.0, 0.0, 0.0
        for i in order:
            label = target[i]
            if label == 0:
                continue
            seen += 1
            if label == 1:
                hits += 1
                total += hits / seen
        values.append(total / hits)
    return 100 * sum(values) / len(values)


def loop_over_lists(scores: torch.Tensor, targets: torch.Tensor, labels: int) -> float:
    """The same on Python lists."""
    values = []
    for c in range(labels):
        order = torch.sort(scores[:, c], descending=True).indices
        hits, seen, total = 0, 0, 0.0
        for label in targets[order, c].tolist():
            if label == 0:
                continue
            seen += 1
            if label == 1:
                hits += 1
                total += hits / seen
        values.append(total / hits)
    return 100 * sum(values) / len(values)


def loop_precision_recall(scores: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """CP to OF1 with a loop over labels, and the top-3 variants after a loop over images."""
    s, t = scores.numpy(), targets.numpy()
    best = np.full_like(s, -1)
    for i, row in enumerate(scores.topk(3, dim=1).indices.tolist()):
        for c in row:
            best[i, c] = s[i, c]
    numbers: list[float] = []
    for table in (s, best):
        correct, picked, true = (np.zeros(C) for _ in range(3))
        for c in range(C):
            chosen = table[:, c] >= 0.5
            picked[c], true[c] = chosen.sum(), (t[:, c] == 1).sum()
            correct[c] = (chosen & (t[:, c] == 1)).sum()
        P, R = (correct / np.maximum(picked, 1)).mean(), (correct / np.maximum(true, 1)).mean()
        OP, OR = correct.sum() / picked.sum(), correct.sum() / true.sum()
        numbers += [P, R, 2 * P * R / (P + R), OP, OR, 2 * OP * OR / (OP + OR)]
    return [100 * number for number in numbers]


def clock(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """Result, wall-clock seconds, and CPU seconds of all threads."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    return result, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def resident(field: str) -> int:
    """Resident memory of this process in bytes: current (VmRSS) or peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def one(convention: str) -> dict[str, Any]:
    """Time and memory of one convention; runs in a separate process."""
    scores, targets, _ = data()
    small = MultiLabelMetrics(C, convention)
    small.update(scores[:5000], targets[:5000])
    small.compute()
    del small
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    metrics = MultiLabelMetrics(C, convention)
    ids = torch.arange(N)

    def update() -> None:
        for rows in torch.split(ids, BATCH):
            metrics.update(scores[rows[0] : rows[-1] + 1], targets[rows[0] : rows[-1] + 1], ids=rows)

    _, update_s, update_cpu = clock(update)
    values, compute_s, compute_cpu = clock(metrics.compute)
    peak = (resident("VmHWM") - before) / scores.nbytes
    repeats = []
    for _ in range(3):
        metrics._computed = None
        repeats.append(clock(metrics.compute)[1:])
    return {
        "update_s": update_s, "compute_s": min(compute_s, *(s for s, _ in repeats)),
        "cpu_s": min(compute_cpu, *(cpu for _, cpu in repeats)), "update_cpu_s": update_cpu, "peak": peak,
        "values": [float(v) for k, v in values.items() if k != "AP"],
    }  # fmt: skip


def main() -> None:
    scores, targets, source = data()
    print(f"{N:,} images, {C} labels ({source}), {targets.eq(1).sum().item() / N:.2f} labels per image")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} on {torch.get_num_threads()} threads,"
    )
    print(f"numpy {np.__version__}; load average {os.getloadavg()[0]:.1f}\n")

    part, tensors_s, _ = clock(loop_over_tensors, scores, 2 * targets - 1, LOOPED)
    tensors_s *= C / LOOPED
    mAP, lists_s, _ = clock(loop_over_lists, scores, 2 * targets - 1, C)
    assert abs(part - loop_over_lists(scores, 2 * targets - 1, LOOPED)) < 1e-9
    numbers, counts_s, _ = clock(loop_precision_recall, scores, targets)
    tensors_s, lists_s = tensors_s + counts_s, lists_s + counts_s
    print(f"loop over tensors: {tensors_s:.1f} s ({LOOPED} labels x {C // LOOPED})")
    print(f"loop over lists: {lists_s:.1f} s\n")

    print("| convention | compute() s | of CPU | update() s | times faster: tensors | lists | peak memory / scores |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for convention in CONVENTIONS:
        command = [sys.executable, __file__, convention]
        got = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if convention == "mlgcn":
            np.testing.assert_allclose(got["values"], [mAP, *numbers], atol=1e-9)
        seconds = got["compute_s"]
        print(
            f"| {convention} | {seconds:.2f} | {got['cpu_s']:.2f} | {got['update_s']:.2f} | "
            f"{tensors_s / seconds:.0f} | {lists_s / seconds:.1f} | {got['peak']:.2f} |"
        )
    _, seconds, cpu = clock(bootstrap_map, [scores], targets, list(CONVENTIONS.values()), 64)
    print(f"\n64 bootstrap resamples, all conventions: {seconds:.1f} s ({cpu:.1f} s of CPU)")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one(sys.argv[1])))
    else:
        main()
