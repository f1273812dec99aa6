"""Tables and pictures of measured executions (:mod:`gm_mlic.bench`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.table import Table

_COLOURS = {"plain": "#c25b00", "structured": "#3b7dd8", "compiled": "#2a8f5b"}
_HEAD = ("setting", "execution", "forward", "train step", "memory", "forward x", "train x", "memory x", "of product")


def runtime_rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row for each case and execution: medians, and how many times better than plain.

    Args:
        results: of :func:`gm_mlic.bench.compare`.
    """
    rows = []
    for result in results:
        case, executions = result["case"], result["executions"]
        title = f"{case['name']} (m={case['m']}, C={case['C']}, batch {case['batch']})"
        plain = executions.get("plain", {})
        for name, row in executions.items():
            if "left_out" in row:
                rows.append((title, name, f"left out: {row['left_out']}", *[""] * 6))
                continue
            cells = [f"{row['forward']['median']:.3g} s", f"{row['train']['median']:.3g} s"]
            cells.append(f"{row['memory'] / 2**20:.0f} MiB")
            for mode in ("forward", "train"):
                known = mode in plain and name != "plain"
                cells.append(f"{plain[mode]['median'] / row[mode]['median']:.1f}" if known else "")
            known = "memory" in plain and name != "plain"
            cells.append(f"{plain['memory'] / row['memory']:.1f}" if known else "")
            cells.append(f"{100 * row['roofline']['forward']:.0f} %" if "roofline" in row else "")
            rows.append((title, name, *cells))
            title = ""
    return rows


def runtime_table(results: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title=title, title_justify="left")
    for number, head in enumerate(_HEAD):
        table.add_column(head, justify="left" if number < 2 else "right")
    for row in runtime_rows(results):
        table.add_row(*row)
    return table


def runtime_markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(_HEAD) + " |", "| --- | --- |" + " ---: |" * (len(_HEAD) - 2)]
    lines += ["| " + " | ".join(row) + " |" for row in runtime_rows(results)]
    return "\n".join(lines) + "\n"


def draw_comparison(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Bars of time and memory of each execution, a group for each case."""
    measures = (("forward", "forward pass, s"), ("train", "training step, s"), ("memory", "peak memory, MiB"))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, (key, label) in zip(axes, measures, strict=True):
        for number, name in enumerate(_COLOURS):
            rows = [result["executions"].get(name, {}) for result in results]
            values = [
                row[key] / 2**20 if key == "memory" and key in row else row.get(key, {}).get("median", float("nan"))
                for row in rows
            ]
            places = [x + 0.27 * (number - 1) for x in range(len(results))]
            bars = axis.bar(places, values, 0.25, color=_COLOURS[name], label=name)
            axis.bar_label(
                bars, [f"{v:.2g}" if v == v and v < 100 else f"{v:.0f}" if v == v else "" for v in values], fontsize=7
            )
        axis.set_xticks(range(len(results)), [result["case"]["name"] for result in results])
        axis.set_title(label, fontsize=10)
        axis.margins(y=0.12)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_growth(path: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Forward time, training time and memory against m, C, k and the batch, both axes logarithmic."""
    measures = (("forward", "forward pass, s"), ("train", "training step, s"), ("memory", "peak memory, MiB"))
    figure, axes = plt.subplots(
        3, len(curves), figsize=(3 * len(curves), 7.5), layout="constrained", sharey="row", squeeze=False
    )
    for column, (curve, results) in enumerate(curves.items()):
        for axis, (key, label) in zip(axes[:, column], measures, strict=True):
            for name, colour in _COLOURS.items():
                points = [
                    (result["case"][curve], row[key] / 2**20 if key == "memory" else row[key]["median"])
                    for result in results
                    if key in (row := result["executions"].get(name, {}))
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=4)
            axis.set_xscale("log")
            axis.set_yscale("log")
            values = [result["case"][curve] for result in results]
            axis.set_xticks(values, [str(v) for v in values])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[-1, column].set_xlabel(curve)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
