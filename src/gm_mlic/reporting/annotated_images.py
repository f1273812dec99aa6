"""Pictures of predictions: photos with the box that won each label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

#: Colors of what a prediction turned out to be; they differ in brightness too, for the color-blind.
COLORS = {"right": "#1a7f37", "wrong": "#d1242f", "missed": "#9a6700"}
_MARKS = {"right": "✓", "wrong": "✗", "missed": "–"}

#: Of an annotated photo, in pixels; JPEG ends at 65,535.
_LONGEST = 4096

#: Of boxes in one photo; white text can be read on all of them.
_PALETTE = ("#1f5fa8", "#b0451b", "#1a7f37", "#8a3ab9", "#9a6700", "#c2255c", "#0b7285", "#495057")


@dataclass(frozen=True)
class LabelBox:
    """One label of one image.

    Attributes:
        name: of the label.
        score: in [0, 1].
        box: (x1, y1, x2, y2) of the instance that won the label, divided by image width and height.
        kind: ``right`` (predicted and present), ``wrong`` (predicted, absent) or ``missed`` (present, not predicted).
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    kind: str


def judged_labels(
    labels: Sequence[str],
    scores: NDArray[np.floating],
    targets: NDArray[np.integer],
    boxes: NDArray[np.floating],
    winners: NDArray[np.integer],
    threshold: float | Sequence[float] = 0.5,
    difficult: NDArray[np.bool_] | None = None,
) -> list[LabelBox]:
    """The labels of one image that are predicted or present, best score first.

    Args:
        labels: the C names.
        scores, targets, winners: (C,): scores in [0, 1]; 1 present, 0 absent; index of the winner.
        boxes: (M, 4) of the image's instances.
        threshold: predicted are labels whose score reaches it, or theirs of (C,).
        difficult: (C,), labels that count as present whatever their target; or None.
    """
    found = []
    thresholds = np.broadcast_to(threshold, len(labels))
    is_present = np.asarray(targets) == 1 if difficult is None else (np.asarray(targets) == 1) | difficult
    for c in np.argsort(-np.asarray(scores), kind="stable"):
        predicted, present = scores[c] >= thresholds[c], is_present[c]
        if predicted or present:
            kind = "missed" if not predicted else "right" if present else "wrong"
            box = tuple(float(v) for v in boxes[winners[c]])
            found.append(LabelBox(labels[c], float(scores[c]), box, kind))  # type: ignore[arg-type]
    return found


def picture_grid(
    path: Path, panels: Sequence[tuple[Image.Image, Sequence[LabelBox]]], title: str, columns: int = 4
) -> None:
    """Write a PNG: each image with numbered boxes, and beneath it the labels with the numbers of their boxes.

    Labels won by the same instance, or by boxes that nearly coincide, share a number. Green: predicted and present;
    red: predicted, absent; brown, dashed: present, not predicted.

    Args:
        path: of the PNG.
        panels: images and their labels.
        title: above all.
        columns: panels in a row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from gm_mlic.reporting.fonts import save_figure

    rows = math.ceil(len(panels) / columns)
    lines = [max(len(found) for _, found in panels[r * columns : (r + 1) * columns]) for r in range(rows)]
    heights = [inches for n in lines for inches in (2.9, 0.22 * n + 0.15)]
    figure = Figure(figsize=(columns * 3.15, sum(heights) + 0.75))
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", y=1 - 0.12 / figure.get_figheight())
    legend_y = 1 - 0.5 / figure.get_figheight()
    for x, kind, words in (
        (0.012, "right", "predicted, and there"),
        (0.24, "wrong", "predicted, but not there"),
        (0.49, "missed", "there, but not predicted (dashed: its best box)"),
    ):
        figure.text(x, legend_y, f"{_MARKS[kind]} {words}", color=COLORS[kind], fontsize=10)
    grid = figure.add_gridspec(
        2 * rows, columns, height_ratios=heights, hspace=0.03, wspace=0.05,
        left=0.01, right=0.99, bottom=0.005, top=1 - 0.68 / figure.get_figheight(),
    )  # fmt: skip
    for i, (image, found) in enumerate(panels):
        row, column = divmod(i, columns)
        axes = figure.add_subplot(grid[2 * row, column])
        axes.imshow(np.asarray(image), interpolation="bilinear")
        axes.set_axis_off()
        places = _places([label.box for label in found])
        for n in sorted(set(places)):
            here = [label for label, place in zip(found, places, strict=True) if place == n]
            box = here[0].box
            # A box that several labels share has the color of the worst of them.
            kind = max((label.kind for label in here), key=("right", "missed", "wrong").index)
            x1, x2 = (v * image.width - 0.5 for v in box[0::2])
            y1, y2 = (v * image.height - 0.5 for v in box[1::2])
            color, dashed = COLORS[kind], kind == "missed"
            frame = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=3.2)
            axes.add_patch(frame)
            axes.add_patch(
                Rectangle(
                    (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=1.8,
                    linestyle="--" if dashed else "-",
                )
            )  # fmt: skip
            axes.text(
                x1, y1, str(n), color="white", fontsize=8, fontweight="bold", ha="left", va="bottom", clip_on=False,
                bbox={"facecolor": color, "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip
        below = figure.add_subplot(grid[2 * row + 1, column])
        below.set_axis_off()
        below.set_ylim(max(1, lines[row]), 0)
        for line, label in enumerate(found):
            text = f"{places[line]}  {_MARKS[label.kind]} {label.name}"
            style: dict[str, Any] = {"color": COLORS[label.kind], "fontsize": 10, "va": "center", "parse_math": False}
            below.text(0.02, line + 0.5, text, **style)
            below.text(0.97, line + 0.5, f"{label.score:.2f}", ha="right", **style)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=110, facecolor="white")


def annotated(
    image: Image.Image, labels: Sequence[tuple[str, float, tuple[float, float, float, float]]]
) -> Image.Image:
    """A photo with labels written at their boxes.

    Args:
        image: of any size; the result is at least 640 pixels wide, so that the labels can be read, unless that made
            it longer than 4,096 pixels, which is the most.
        labels: name, probability, and box (x1, y1, x2, y2) in pixels; labels of boxes that nearly coincide stand below
            each other at the first of them.
    """
    from gm_mlic.reporting.fonts import pillow_font

    factor = min(max(1.0, 640 / image.width), _LONGEST / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    picture = image.convert("RGB").resize(size)
    draw = ImageDraw.Draw(picture)
    size_of_text, line = max(14, picture.width // 45), max(2, picture.width // 300)
    places = _places([box for _, _, box in labels])
    boxes = [labels[places.index(place)][2] for place in sorted(set(places))]
    for number, box in enumerate(boxes):
        color = _PALETTE[number % len(_PALETTE)]
        x1, y1, x2, y2 = (v * factor for v in box)
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline="white", width=line + 1)
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=line)
    for number, box in enumerate(boxes):  # texts above all boxes
        here = [label for label, place in zip(labels, places, strict=True) if place == number + 1]
        text = "\n".join(f"{name} {p:.2f}" for name, p, _ in here)
        font = pillow_font(text, size_of_text)
        right, bottom = draw.multiline_textbbox((0, 0), text, font=font)[2:]
        width, height = right + 6, bottom + 6
        x = min(max(0.0, box[0] * factor), max(0.0, picture.width - width))
        y = box[1] * factor - height  # above the box; where there is no room, below
        y = y if y >= 0 else min(box[3] * factor, max(0.0, picture.height - height))
        draw.rectangle((x, y, x + width, y + height), fill=_PALETTE[number % len(_PALETTE)])
        draw.multiline_text((x + 3, y + 2), text, fill="white", font=font)
    return picture


def _places(boxes: Sequence[tuple[float, float, float, float]], same: float = 0.6) -> list[int]:
    """A number from 1 for each box; boxes that overlap an earlier one by an IoU above ``same`` have its number."""
    kept: list[tuple[float, float, float, float]] = []
    places = []
    for box in boxes:
        place = next((n for n, other in enumerate(kept, start=1) if _iou(box, other) > same), None)
        if place is None:
            kept.append(box)
            place = len(kept)
        places.append(place)
    return places


def _iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else float(a == b)
