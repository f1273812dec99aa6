"""Pictures of predictions: photos with labels and their argmax boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

#: Colors by kind of prediction; they also differ in brightness, for color-blind readers.
COLORS = {"right": "#1a7f37", "wrong": "#d1242f", "missed": "#9a6700"}
_MARKS = {"right": "✓", "wrong": "✗", "missed": "–"}

#: Longest side of an annotated photo in pixels; the limit of JPEG is 65,535.
_LONGEST = 4096

#: Colors of boxes in one photo; all are dark enough for white text.
_PALETTE = ("#1f5fa8", "#b0451b", "#1a7f37", "#8a3ab9", "#9a6700", "#c2255c", "#0b7285", "#495057")


@dataclass(frozen=True)
class LabelBox:
    """Label of one image with its argmax box.

    Attributes:
        name: name of the label.
        score: score in [0, 1].
        box: (x1, y1, x2, y2), divided by image width and height.
        kind: ``right`` (predicted and present), ``wrong`` (predicted, absent) or ``missed`` (present, not predicted).
    """

    name: str
    score: float
    box: tuple[float, float, float, float]
    kind: str


def label_box(entry: Mapping[str, Any]) -> LabelBox:
    """Label of an entry of ``RUN/examples/examples.json``; ValueError, KeyError or TypeError if it is damaged."""
    x1, y1, x2, y2 = map(float, entry["box"])
    if entry["kind"] not in COLORS:
        raise ValueError(f"unknown kind {entry['kind']!r}")
    return LabelBox(str(entry["label"]), float(entry["score"]), (x1, y1, x2, y2), entry["kind"])


def picture_grid(
    path: Path, panels: Sequence[tuple[Image.Image, Sequence[LabelBox]]], title: str, columns: int = 4
) -> None:
    """Write a picture of images with numbered boxes; the labels and their box numbers are below each image.

    Labels whose boxes are equal or nearly so share a number. Green: predicted and present; red: predicted, absent;
    brown, dashed: present, not predicted. The suffix of ``path`` is the file format.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from gm_mlic.reporting.fonts import save_figure

    starts = range(0, len(panels), columns)
    lines = [max(len(found) for _, found in panels[first : first + columns]) for first in starts]
    heights = [inches for n in lines for inches in (2.9, 0.22 * n + 0.15)]
    figure = Figure(figsize=(columns * 3.15, sum(heights) + 0.75))
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", y=1 - 0.12 / figure.get_figheight())
    legend_y = 1 - 0.5 / figure.get_figheight()
    for x, kind, words in (
        (0.012, "right", "predicted and present"),
        (0.24, "wrong", "predicted, absent"),
        (0.49, "missed", "present, not predicted (dashed box)"),
    ):
        figure.text(x, legend_y, f"{_MARKS[kind]} {words}", color=COLORS[kind], fontsize=10)
    grid = figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)
    figure.subplots_adjust(0.01, 0.005, 0.99, 1 - 0.68 / figure.get_figheight(), wspace=0.05, hspace=0.03)
    for cell in grid.flat:
        cell.set_axis_off()
    for i, (image, found) in enumerate(panels):
        row, column = divmod(i, columns)
        axes, below = grid[2 * row : 2 * row + 2, column]
        axes.imshow(np.asarray(image), interpolation="bilinear")
        numbers = _box_numbers([label.box for label in found])
        for n in sorted(set(numbers)):
            same_box = [label for label, number in zip(found, numbers, strict=True) if number == n]
            box = same_box[0].box
            # Shared boxes have the color of their worst label.
            kind = max((label.kind for label in same_box), key=("right", "missed", "wrong").index)
            x1, x2 = (v * image.width - 0.5 for v in box[0::2])
            y1, y2 = (v * image.height - 0.5 for v in box[1::2])
            for color, lw, ls in (("white", 3.2, "-"), (COLORS[kind], 1.8, "--" if kind == "missed" else "-")):
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=color, lw=lw, ls=ls))
            axes.text(
                x1, y1, str(n), color="white", fontsize=8, fontweight="bold", ha="left", va="bottom", clip_on=False,
                bbox={"facecolor": COLORS[kind], "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip
        below.set_ylim(max(1, lines[row]), 0)
        for line, label in enumerate(found):
            text = f"{numbers[line]}  {_MARKS[label.kind]} {label.name}"
            style: dict[str, Any] = {"color": COLORS[label.kind], "fontsize": 10, "va": "center", "parse_math": False}
            below.text(0.02, line + 0.5, text, **style)
            below.text(0.97, line + 0.5, f"{label.score:.2f}", ha="right", **style)
    save_figure(figure, path, dpi=110, facecolor="white")


def annotated(
    image: Image.Image, labels: Sequence[tuple[str, float, tuple[float, float, float, float]]]
) -> Image.Image:
    """Photo with boxes and their labels.

    Args:
        image: image of any size. The result is at least 640 pixels wide, and at most 4,096 pixels long.
        labels: name, probability, and box (x1, y1, x2, y2) in pixels; labels of nearly equal boxes are drawn at the
            first of them.
    """
    from gm_mlic.reporting.fonts import pillow_font

    factor = min(max(1.0, 640 / image.width), _LONGEST / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    picture = image.convert("RGB").resize(size)
    draw = ImageDraw.Draw(picture)
    size_of_text, line = max(14, picture.width // 45), max(2, picture.width // 300)
    numbers = _box_numbers([box for _, _, box in labels])
    boxes = [labels[numbers.index(n)][2] for n in sorted(set(numbers))]
    for number, box in enumerate(boxes):
        color = _PALETTE[number % len(_PALETTE)]
        x1, y1, x2, y2 = (v * factor for v in box)
        for outline, thickness in (("white", line + 1), (color, line)):
            draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=outline, width=thickness)
    for number, box in enumerate(boxes):  # texts are drawn over all boxes
        same_box = [label for label, n in zip(labels, numbers, strict=True) if n == number + 1]
        text = "\n".join(f"{name} {p:.2f}" for name, p, _ in same_box)
        font = pillow_font(text, size_of_text)
        right, bottom = draw.multiline_textbbox((0, 0), text, font=font)[2:]
        width, height = right + 6, bottom + 6
        x = min(max(0.0, box[0] * factor), max(0.0, picture.width - width))
        y = box[1] * factor - height  # above the box, or below if there is no room
        y = y if y >= 0 else min(box[3] * factor, max(0.0, picture.height - height))
        draw.rectangle((x, y, x + width, y + height), fill=_PALETTE[number % len(_PALETTE)])
        draw.multiline_text((x + 3, y + 2), text, fill="white", font=font)
    return picture


def _box_numbers(boxes: Sequence[tuple[float, float, float, float]], same: float = 0.6) -> list[int]:
    """Number of each box, from 1; a box with an IoU above ``same`` with an earlier one shares its number."""
    kept: list[tuple[float, float, float, float]] = []
    numbers = []
    for box in boxes:
        number = next((n for n, other in enumerate(kept, start=1) if _iou(box, other) > same), None)
        if number is None:
            kept.append(box)
            number = len(kept)
        numbers.append(number)
    return numbers


def _iou(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over union of two boxes; for empty unions 1 if the boxes are equal, else 0."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union > 0 else float(a == b)
