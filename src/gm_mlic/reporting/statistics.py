"""Tables and pictures of dataset statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from gm_mlic.datasets.statistics import DatasetStatistics
from gm_mlic.reporting.fonts import save_figure
from gm_mlic.reporting.tables import text_table

#: Largest number of labels in the picture; the most frequent ones are drawn.
MOST_LABELS = 120

#: Largest number of labels with numbers in the cells of the heat map.
_NUMBERED = 25

_DARK, _LIGHT = "#0b5394", "#9fc5e8"
_MAX_NAME = 26


def overview_table(
    splits: Sequence[DatasetStatistics], unreadable: Mapping[str, Mapping[str, str]] | None = None
) -> Table:
    """Table of image and label counts, with a column per split.

    ``unreadable`` are the images that cannot be decoded, by split; None: not checked.
    """
    cells: dict[str, Callable[[DatasetStatistics], str]] = {
        "images": lambda stats: f"{stats.images:,}",
        "images without labels": lambda stats: f"{stats.unlabeled:,}",
        "labels per image, mean": lambda stats: f"{stats.labels_per_image:.2f}",
        "labels per image, maximum": lambda stats: str(len(stats.per_image) - 1),
        "labels without positives": lambda stats: str(int((stats.positives == 0).sum())),
        "difficult labels": lambda stats: f"{stats.difficult.sum():,}",
        "boxes": lambda stats: "none" if stats.boxes is None else f"{stats.boxes.sum():,}",
        "missing images": lambda stats: f"{len(stats.missing):,}",
        "unreadable images": lambda stats: "check=true" if unreadable is None else f"{len(unreadable[stats.split]):,}",
    }
    title = Text(f"{splits[0].name}: {len(splits[0].labels)} labels")
    head = ["", *(stats.split for stats in splits)]
    return text_table(title, head, ([name, *map(cell, splits)] for name, cell in cells.items()))


def labels_table(splits: Sequence[DatasetStatistics]) -> Table:
    """Table of images per label and split, and r_c of the first split; the most frequent label is first."""
    first = splits[0]
    difficult = any(stats.difficult.any() for stats in splits)
    head = ["label", *(stats.split for stats in splits), f"r_c ({first.split})"]
    head += ["difficult"] * difficult + [f"boxes ({first.split})"] * (first.boxes is not None)
    rows: list[list[str | Text]] = []
    for c in np.argsort(-first.positives, kind="stable"):
        cells: list[str | Text] = [
            Text(first.labels[c]),
            *(f"{stats.positives[c]:,}" for stats in splits),
            f"{first.ratio[c]:.4f}",
        ]
        if difficult:
            cells.append(" / ".join(f"{stats.difficult[c]:,}" for stats in splits))
        if first.boxes is not None:
            cells.append(f"{first.boxes[c]:,}")
        rows.append(cells)
    return text_table("Images with each label", head, rows)


def cooccurrence_table(stats: DatasetStatistics, count: int = 10) -> Table:
    """Table of the strongest co-occurrences of a split (:meth:`~DatasetStatistics.strongest`)."""
    rows = [
        (Text(pair.given), Text(pair.other), f"{pair.probability:.2f}", f"{pair.ratio:.2f}", f"{pair.together:,}")
        for pair in stats.strongest(count, support=5)
    ]
    title = f"Strongest co-occurrences ({stats.split}; a in 5 images or more)"
    return text_table(title, ("a", "b", "P(b | a)", "r_b", "images with both"), rows, texts=2)


def statistics_picture(path: Path, stats: DatasetStatistics) -> None:
    """Write a PNG with label frequencies and co-occurrences.

    Left, labels by frequency. Right, P(b | a) as a heat map, with co-occurring labels side by side (:func:`grouped`)
    and labels without positives last. At most :data:`MOST_LABELS` labels are drawn, the most frequent ones.
    """
    frequent = np.argsort(-stats.positives, kind="stable")[:MOST_LABELS]
    count = len(frequent)
    cell = 0.32 if count <= _NUMBERED else 0.17
    side = max(cell * count, 3.2)
    font = 9.0 if count <= _NUMBERED else 7.5
    # Inches; the mean width of a letter is 0.6 of the font size, in wide scripts up to 1.
    names = 0.2 + max(sum(0.6 if c.isascii() else 1.0 for c in _short(stats.labels[n])) for n in frequent) * font / 72
    bars, gap, top, bottom, right = 3.6, 0.3, names + 1.2, 0.55, 1.05
    width, height = names + bars + gap + names + side + right, top + side + bottom
    figure = Figure(figsize=(width, height))

    def axes(left: float, across: float) -> Any:
        return figure.add_axes((left / width, bottom / height, across / width, side / height))

    def write(left: float, up: float, text: str, **style: Any) -> None:
        figure.text(left / width, up / height, text, parse_math=False, **style)

    subset = "" if count == len(stats.labels) else f", the {count} most frequent"
    title = f"{stats.name}, {stats.split}: {stats.images:,} images, {len(stats.labels):,} labels{subset}"
    write(0.18, height - 0.18, title, fontsize=13, fontweight="bold", va="top")
    write(0.18, height - 0.48, _summary(stats), fontsize=9.5, color="#444444", va="top")
    matrix = names + bars + gap + names
    caption = "P(column | row): share of the images with the row's label\nthat also have the column's label"
    write(matrix, bottom + side + names, caption, fontsize=10, linespacing=1.3)
    _bars(axes(names, bars), stats, frequent, font)
    occurring, absent = (frequent[stats.positives[frequent] > 0], frequent[stats.positives[frequent] == 0])
    order = np.concatenate([occurring[grouped(stats.together[np.ix_(occurring, occurring)], stats.images)], absent])
    scale = figure.add_axes(((width - right + 0.22) / width, bottom / height, 0.16 / width, min(side, 3.2) / height))
    _heat_map(axes(matrix, side), scale, stats, order, font)
    save_figure(figure, path, dpi=110, facecolor="white")


def grouped(together: NDArray[np.integer], images: int) -> NDArray[np.int64]:
    """Order of labels that places co-occurring labels side by side.

    Average linkage on the phi correlation of the labels' 0/1 columns, which does not depend on label frequency; each
    merge joins the two most correlated ends.

    Args:
        together: (C, C) number of images with both labels; the diagonal counts images with one label.
        images: number of images N.
    """
    ratio = np.diag(together) / images
    spread = np.sqrt(ratio * (1 - ratio))
    spread[spread == 0] = 1.0
    phi = (together / images - np.outer(ratio, ratio)) / np.outer(spread, spread)
    similarity = phi.copy()
    np.fill_diagonal(similarity, -np.inf)
    members = [[c] for c in range(len(phi))]
    for _ in range(len(phi) - 1):
        a, b = divmod(int(similarity.argmax()), len(phi))
        left, right = members[a], members[b]
        ends = [(phi[x[-1], y[0]], x, y) for x in (left, left[::-1]) for y in (right, right[::-1])]
        _, x, y = max(ends, key=lambda end: float(end[0]))
        merged = (similarity[a] * len(left) + similarity[b] * len(right)) / (len(left) + len(right))
        similarity[a], similarity[:, a] = merged, merged
        similarity[a, a] = -np.inf
        similarity[b], similarity[:, b] = -np.inf, -np.inf
        members[a], members[b] = x + y, []
    return np.array(max(members, key=len, default=[]), dtype=np.int64)


def _summary(stats: DatasetStatistics) -> str:
    parts = [f"{stats.labels_per_image:.2f} labels per image"]
    if stats.unlabeled:
        parts.append(f"{stats.unlabeled:,} images without labels")
    if stats.boxes is not None:
        parts.append(f"{stats.boxes.sum():,} boxes")
    if stats.missing:
        parts.append(f"{len(stats.missing):,} missing images")
    return ", ".join(parts)


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def _bars(axes: Any, stats: DatasetStatistics, order: NDArray[np.int64], font: float) -> None:
    rows = np.arange(len(order))
    positives, difficult = stats.positives[order], stats.difficult[order]
    axes.barh(rows, positives, height=0.74, color=_DARK)
    if difficult.any():
        axes.barh(rows, difficult, left=positives, height=0.74, color=_LIGHT)
    longest = max(1, int((positives + difficult).max()))
    for row, (n, n_difficult) in enumerate(zip(positives, difficult, strict=True)):
        text = f"{n:,}" + (f" + {n_difficult:,}" if n_difficult else "")
        axes.text(n + n_difficult + 0.015 * longest, row, text, fontsize=font - 0.5, va="center", color="#333333")
    axes.set_xlim(0, 1.22 * longest)
    axes.set_ylim(len(order) - 0.5, -0.5)
    _names(axes.yaxis, stats, order, fontsize=font)
    axes.set_title("images per label" + (" (light: difficult)" if difficult.any() else ""), fontsize=10, loc="left")
    axes.set_xlabel("images", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for edge in ("top", "right", "left"):
        axes.spines[edge].set_visible(False)


def _heat_map(axes: Any, scale: Any, stats: DatasetStatistics, order: NDArray[np.int64], font: float) -> None:
    probability = stats.conditional[np.ix_(order, order)]
    np.fill_diagonal(probability, np.nan)
    highest = max(0.05, float(np.nan_to_num(probability).max()))
    # The square root separates small probabilities, which are the most frequent.
    colors = PowerNorm(0.5, vmin=0.0, vmax=highest)
    axes.set_facecolor("#e6e6e6")
    picture = axes.imshow(probability, cmap="YlGnBu", norm=colors, aspect="auto", interpolation="nearest")
    axes.xaxis.tick_top()
    _names(axes.xaxis, stats, order, fontsize=font, rotation=90)
    _names(axes.yaxis, stats, order, fontsize=font)
    axes.tick_params(length=0, pad=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(np.arange(1, len(order)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(order) <= _NUMBERED:
        for a, b in zip(*np.nonzero(np.rint(100 * np.nan_to_num(probability))), strict=True):
            value = probability[a, b]
            color = "white" if float(colors(value)) > 0.5 else "#222222"
            axes.text(b, a, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    bar = axes.figure.colorbar(picture, cax=scale)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _names(axis: Axis, stats: DatasetStatistics, order: NDArray[np.int64], **style: Any) -> None:
    """Write label names at the ticks of an axis."""
    axis.set_ticks(range(len(order)), [_short(stats.labels[c]) for c in order], **style)
    for text in axis.get_ticklabels():
        text.set_parse_math(False)  # labels may contain dollar signs
