"""Figures of a report: curves over m and k, training curves, and the map of label states."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from gm_mlic.reporting.fonts import save_figure
from gm_mlic.reporting.groups import Group

PALETTE = ("#3b7dd8", "#c25b00", "#2a8f5b", "#8250a0", "#b8336a", "#7a6a00", "#0b7a8a", "#5c5c5c")


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write ``NAME.png`` and ``NAME.svg``; returns the name of the PNG."""
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        save_figure(figure, folder / f"{name}.svg", metadata={"Date": None})
    save_figure(figure, folder / f"{name}.png", dpi=150)
    return f"{name}.png"


def draw_sweep(families: Sequence[Sequence[Group]], key: str, label: str) -> Figure:
    """Test mAP by a setting: mean over seeds with a band of one standard deviation."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    for family, color in zip(families, itertools.cycle(PALETTE)):
        points = sorted((float(group.setting(key)), list(group.values("mAP").values())) for group in family)
        x = [value for value, _ in points]
        mean = np.array([statistics.mean(values) for _, values in points])
        deviation = np.array([statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points])
        axis.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0)
        axis.plot(x, mean, "o-", color=color, label=_family_name(family, key))
    axis.set_xticks(sorted({float(group.setting(key)) for family in families for group in family}))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel(label)
    axis.set_ylabel("test mAP, %")
    axis.grid(alpha=0.3)
    if len(families) > 1:
        axis.legend(fontsize=8)
    return figure


def draw_training(groups: Sequence[Group]) -> Figure:
    """Training loss and val mAP by epoch, with a line per run and a color per group."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for group, color in zip(groups, itertools.cycle(PALETTE)):
        for number, run in enumerate(group.runs):
            for axis, name in zip(axes, ("train/loss", "val/mAP"), strict=True):
                points = [(row["epoch"], row[name]) for row in run.epochs if name in row and "epoch" in row]
                if points:
                    label = group.name if number == 0 else None
                    axis.plot(*zip(*points, strict=True), color=color, alpha=0.75, linewidth=1.2, label=label)
    for axis, label in zip(axes, ("training loss", "val mAP, %"), strict=True):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    if 1 < len(groups) <= 12:
        axes[1].legend(fontsize=7)
    return figure


def draw_label_map(labels: Sequence[str], states: Mapping[str, NDArray[np.floating]], seed: int = 0) -> Figure:
    """Label states in two dimensions (t-SNE on cosine distance), with one panel per entry of ``states``.

    Panels with more than 40 labels are larger and stacked vertically. ImportError without scikit-learn.
    """
    from sklearn.manifold import TSNE

    many = len(labels) > 40
    shape = (len(states), 1) if many else (1, len(states))
    width, height = (10.5, 7.5) if many else (5.6, 5.2)
    figure = Figure(figsize=(width * shape[1], height * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for axis, (title, values) in zip(axes.flat, states.items(), strict=True):
        perplexity = min(30.0, max(1.0, (len(labels) - 1) / 3))
        points = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=seed).fit_transform(values)
        axis.scatter(*points.T, s=12, color=PALETTE[0])
        for name, (x, y) in zip(labels, points, strict=True):
            axis.annotate(name.replace("$", r"\$"), (x, y), xytext=(3, 2), textcoords="offset points", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.margins(0.12)
    return figure


def _family_name(family: Sequence[Group], key: str) -> str:
    """Name of the first group without the value of ``key``."""
    short = key.rpartition(".")[2]
    return ", ".join(part for part in family[0].name.split(", ") if not part.startswith(f"{short}=")) or "mean ± s.d."
