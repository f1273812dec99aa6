"""Figures of README.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator
from run import ORDER

BLUE, ORANGE, GRAY = "#3b7dd8", "#c25b00", "#777777"
COLORS = {
    "detector": GRAY,
    "detector, 6 views": "black",
    "linear stack": "#2e8b57",
    "max-pooled, prior": ORANGE,
    "logsumexp-pooled, prior": "#9a52b5",
    "GM-MLIC": BLUE,
}


#: Colors of models with these prefixes; all others have graphs.
KINDS = {"detector": (("detector",), GRAY), "no graphs": (("linear", "max", "logsumexp"), ORANGE)}
#: Smallest difference to the detector that is drawn; smaller ones are printed.
LOWEST = -10.0


def draw_models(
    values: Mapping[str, Mapping[int, float]], intervals: Mapping[str, tuple[float, float]], path: Path
) -> None:
    """Test mAP of each model and seed, and the difference to the detector with its 95 % interval over photos."""
    models = [model for model in ORDER if model in values]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.27 * len(models) + 1.2), layout="constrained", sharey=True)
    detector = statistics.mean(values["detector"].values())
    outside = False
    for y, model in enumerate(models):
        color = next((color for names, color in KINDS.values() if model.startswith(names)), BLUE)
        of = list(values[model].values())
        mean = statistics.mean(of)
        axes[0].plot(of, [y] * len(of), "o", color=color, alpha=0.4, markersize=5)
        axes[0].plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2)
        low, high = intervals[model]
        if mean - detector < LOWEST:
            text = f"\u2190 {mean - detector:.1f} ({low:.1f} to {high:.1f})"
            place = axes[1].get_yaxis_transform()
            axes[1].text(0.02, y, text, color=color, fontsize=8, verticalalignment="center", transform=place)
            outside = True
        else:
            axes[1].plot([max(low, LOWEST), high], [y, y], color=color, linewidth=1.5)
            axes[1].plot(mean - detector, y, "o", color=color, markersize=5)
    axes[0].set_yticks(range(len(models)), models)
    axes[0].set_ylim(len(models) - 0.5, -0.5)
    axes[0].set_xlabel("test mAP over 12 labels, %\n(dots: seeds, line: mean)", fontsize=9)
    axes[1].axvline(0, color="black", linewidth=0.8)
    if outside:  # room for the text
        low, high = axes[1].get_xlim()
        axes[1].set_xlim(min(low, -1.2 * high), high)
    axes[1].set_xlabel("difference to the detector, points\n(line: 95 % interval over photos)", fontsize=9)
    for axis in axes:
        axis.grid(alpha=0.3, axis="x")
    colors = {kind: color for kind, (_, color) in KINDS.items()} | {"graphs": BLUE}
    handles = [Line2D([], [], marker="o", color=color, label=kind) for kind, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curve(curve: Mapping[str, Mapping[int, Sequence[float]]], path: Path) -> None:
    """Test mAP against the number of training photos."""
    figure, axis = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
    sizes = sorted({size for of in curve.values() for size in of})
    for place, (model, of) in enumerate(curve.items()):
        shift = 1.03 ** (place - (len(curve) - 1) / 2)  # error bars side by side
        draw_line(axis, [size * shift for size in of], list(of.values()), COLORS[model], model)
    if sizes:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(sizes))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticklabels([f"{size:,}" for size in sizes])
        figure.legend(loc="outside right upper", fontsize=9)
    axis.set_xlabel("training photos (log axis)")
    axis.set_ylabel("test mAP over 12 labels, %\n(± standard deviation over seeds)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_m_and_k(m: Mapping[int, Sequence[float]], k: Mapping[int, Sequence[float]], path: Path) -> None:
    """Test mAP of GM-MLIC against m and k."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    labels = ("m, instances per view", "k, blocks")
    for axis, of, label in zip(axes, (m, k), labels, strict=True):
        draw_line(axis, list(of), list(of.values()), BLUE, "GM-MLIC")
        axis.set_xticks(list(of))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GM-MLIC: test mAP over 12 labels, %\n(± standard deviation over seeds)", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_line(axis: plt.Axes, x: Sequence[float], values: Sequence[Sequence[float]], color: str, label: str) -> None:
    """Means with standard deviations over seeds."""
    if values:
        error = [statistics.stdev(of) if len(of) > 1 else 0.0 for of in values]
        axis.errorbar(x, [statistics.mean(of) for of in values], error, fmt="o-", color=color, capsize=3, label=label)
