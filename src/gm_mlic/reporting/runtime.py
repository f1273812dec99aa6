"""Tables and pictures of benchmark results (:mod:`gm_mlic.bench`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from gm_mlic.reporting.tables import markdown_table, text_table

_COLORS = {"sparse": "#c25b00", "dense": "#3b7dd8", "compiled": "#2a8f5b", "checkpointed": "#8250a0"}
_MEASURES = {"forward": "forward pass, s", "train": "training step, s", "memory": "peak memory, MiB"}
_HEAD = ("", "forward", "x", "train step", "x", "memory", "x", "of peak")
_NOTE = "x: improvement over sparse; of peak: share of the matrix product's FLOP/s in a forward pass"


def runtime_rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Name of each case of :func:`gm_mlic.bench.compare`, with a row per execution: medians, gain over sparse."""
    rows = []
    for result in results:
        case = result["case"]
        sizes = f"m={case['m']}, C={case['C']}, k={case['k']}, batch {case['batch']}"
        name = f"{case['name']} ({sizes}, norm {case['norm']}, {case['precision']})"
        rows.append((name, [_row(execution, result["executions"]) for execution in result["executions"]]))
    return rows


def _row(name: str, executions: Mapping[str, Any]) -> tuple[str, ...]:
    row, sparse = executions[name], executions.get("sparse", {})
    if "left_out" in row:
        return (f"{name}: {row['left_out']}", *[""] * (len(_HEAD) - 1))

    def times(better: float, worse: float | None) -> str:
        return f"{worse / better:.1f}" if worse is not None and name != "sparse" else ""

    cells = []
    for mode in ("forward", "train"):
        seconds = row[mode]["median"]
        cells += [f"{seconds:.3g} s", times(seconds, sparse[mode]["median"] if mode in sparse else None)]
    cells += [f"{row['memory'] / 2**20:.0f} MiB", times(row["memory"], sparse.get("memory"))]
    cells.append(f"{100 * row['roofline']['forward']:.0f} %" if "roofline" in row else "")
    return (name, *cells)


def runtime_tables(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Tables for the terminal, one per case."""
    settings: dict[str, Any] = {"caption": _NOTE, "caption_justify": "left"}
    return [text_table(case, _HEAD, rows, **settings) for case, rows in runtime_rows(results)]


def shares_table(seconds: Mapping[str, float], images: int, detector: str) -> Table:
    """Table of the time per image of the stages of prediction (:func:`gm_mlic.bench.shares`)."""
    total = sum(seconds[part] for part in ("detection", "data", "graph"))
    names = {"detection": f"detection ({detector})", "data": "data (from a store)", "graph": "graph network"}
    rows = [(n, f"{1000 * seconds[part]:.1f}", f"{100 * seconds[part] / total:.1f} %") for part, n in names.items()]
    rows.append(("training step, for comparison", f"{1000 * seconds['train']:.1f}", ""))
    return text_table(f"time from photo to labels, dense, batches of {images}", ("", "ms/image", "share"), rows)


def runtime_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of the rows."""
    lines = [(case if n == 0 else "", *row) for case, rows in runtime_rows(results) for n, row in enumerate(rows)]
    return markdown_table(("setting", "execution", *_HEAD[1:]), lines, texts=2) + f"\n{_NOTE}.\n"


def _value(row: Mapping[str, Any], measure: str) -> float:
    """Seconds or MiB of an execution; NaN if it was left out."""
    if measure not in row:
        return math.nan
    return float(row[measure] / 2**20 if measure == "memory" else row[measure]["median"])


def draw_comparison(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Bar charts of time and memory by case and execution."""
    many = len(results) > 3
    figure = Figure(figsize=(13 if many else 11, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    measured = [name for name in _COLORS if any(name in result["executions"] for result in results)]
    width = 0.8 / len(measured)
    for axis, (measure, label) in zip(axes, _MEASURES.items(), strict=True):
        for number, name in enumerate(measured):
            values = [_value(result["executions"].get(name, {}), measure) for result in results]
            positions = [x + width * (number - (len(measured) - 1) / 2) for x in range(len(results))]
            bars = axis.bar(positions, values, 0.92 * width, color=_COLORS[name], label=name)
            texts = ["" if math.isnan(v) else f"{v:.2g}" if v < 100 else f"{v:.0f}" for v in values]
            axis.bar_label(bars, texts, fontsize=7, rotation=90 if many else 0, padding=2)
        names = [result["case"]["name"].replace(", ", "\n") for result in results]
        axis.set_xticks(range(len(results)), names, fontsize=8)
        axis.set_title(label, fontsize=10)
        axis.margins(y=0.15)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def draw_growth(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Log-log curves of forward time, training time and memory over m, C, k and the batch."""
    figure = Figure(figsize=(3 * len(curves), 7.5), layout="constrained")
    axes = figure.subplots(3, len(curves), sharey="row", squeeze=False)
    for column, (curve, results) in enumerate(curves.items()):
        x = [result["case"][curve] for result in results]
        for axis, measure in zip(axes[:, column], _MEASURES, strict=True):
            for name, color in _COLORS.items():
                if any(name in result["executions"] for result in results):
                    y = [_value(result["executions"].get(name, {}), measure) for result in results]
                    axis.plot(x, y, "o-", color=color, label=name, markersize=4)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(x, [str(v) for v in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[-1, column].set_xlabel(curve)
    for axis, label in zip(axes[:, 0], _MEASURES.values(), strict=True):
        axis.set_ylabel(label)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
