"""The picture of an explanation: the photo, the match matrix, and the influence of each edge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from gm_mlic.reporting.fonts import save_figure
from gm_mlic.zoo import Explanation

#: Instances, labels and influences that are shown, at most.
_ROWS, _COLUMNS, _BARS = 20, 14, 14
#: Labels that are at least this probable have a winner worth a frame.
_PREDICTED = 0.5
_WINNER, _FOR, _AGAINST = "#c2255c", "#1f5fa8", "#b0451b"


def explanation_picture(explanation: Explanation, photo: Image.Image, path: Path) -> None:
    """Write a PNG (or what the suffix says) of ``explanation``, ``photo`` being the image that it is about."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1.25, 1))
    _photo(axes[0], explanation, photo)
    _matrix(axes[1], explanation)
    _influences(axes[2], explanation)
    p = explanation.prediction.probabilities[explanation.prediction.labels.index(explanation.label)]
    figure.suptitle(f"{explanation.label}: probability {p:.3f}, argmax instance {explanation.instance}")
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a label may hold dollar signs
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=120)


def _photo(axis: Axes, explanation: Explanation, photo: Image.Image) -> None:
    axis.imshow(photo)
    prediction = explanation.prediction
    plates: dict[tuple[float, float], list[int]] = {}  # boxes that begin at one place share a plate
    order = [*(i for i in range(len(prediction.boxes)) if i != explanation.instance), explanation.instance]
    for i in order:
        x1, y1, x2, y2 = prediction.boxes[i]
        won = i == explanation.instance
        color = _WINNER if won else "white"
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=3.5, ec="black", alpha=0.6))
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=2.2 if won else 1.2, ec=color))
        place = next((at for at in plates if max(abs(at[0] - x1), abs(at[1] - y1)) < 0.03 * photo.width), (x1, y1))
        plates.setdefault(place, []).append(i)
    for (x, y), numbers in plates.items():
        won = explanation.instance in numbers
        plate = {"boxstyle": "round,pad=0.15", "fc": _WINNER if won else "white", "ec": "none", "alpha": 0.9}
        text = ", ".join(map(str, sorted(numbers)))
        axis.text(x, y, text, color="white" if won else "black", fontsize=8, va="bottom", bbox=plate)
    axis.set_axis_off()
    axis.set_title("instances, most confident first", fontsize=10)


def _matrix(axis: Axes, explanation: Explanation) -> None:
    prediction = explanation.prediction
    chosen = prediction.labels.index(explanation.label)
    best = [int(c) for c in np.argsort(-prediction.probabilities, kind="stable")[:_COLUMNS]]
    columns = best if chosen in best else [*best[:-1], chosen]
    rows = list(range(min(len(prediction.boxes), _ROWS)))
    if explanation.instance not in rows:
        rows[-1] = explanation.instance
    logits = prediction.matches[np.ix_(rows, columns)].astype(np.float64)
    matrix = np.where(np.isfinite(logits), 1 / (1 + np.exp(-logits)), np.nan)  # none where there is no edge
    image = axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_facecolor("0.85")
    names = [f"{i} {name}" if (name := prediction.detected[i]) else str(i) for i in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_xticks(range(len(columns)), [prediction.labels[c] for c in columns], rotation=45, ha="right", fontsize=8)
    for x, c in enumerate(columns):
        if prediction.probabilities[c] < _PREDICTED:
            continue
        y = rows.index(winner) if (winner := int(prediction.matches[:, c].argmax())) in rows else None
        if y is not None:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, lw=1.5, ec="white"))
    mark = (columns.index(chosen) - 0.5, rows.index(explanation.instance) - 0.5)
    axis.add_patch(Rectangle(mark, 1, 1, fill=False, lw=2.5, ec=_WINNER))
    grey = "; grey: no edge" if np.isnan(matrix).any() else ""
    axis.set_title(f"match of each instance with each label; framed: argmax instances{grey}", fontsize=10)
    axis.figure.colorbar(image, ax=axis, fraction=0.04, label="probability of the match")


def _influences(axis: Axes, explanation: Explanation) -> None:
    detected = explanation.prediction.detected
    largest = explanation.influences[:_BARS]
    names = []
    for influence in largest:
        name = f"{influence.source} {influence.neighbor}"
        if isinstance(influence.neighbor, int) and detected[influence.neighbor]:
            name += f" ({detected[influence.neighbor]})"
        names.append(f"{name}\nto the {influence.target}, {influence.edge_type[1]}")
    changes = [influence.change for influence in largest]
    axis.barh(range(len(largest)), changes, color=[_FOR if change > 0 else _AGAINST for change in changes])
    axis.set_yticks(range(len(largest)), names, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel(f"change of the logit ({explanation.logit:.2f}) by this one edge")
    axis.set_title("support for the label (right) and against it (left)", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
