"""Picture of an explanation: photo, match matrix, and influence of each edge."""

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

#: Largest numbers of instances, labels and influences in the picture.
_ROWS, _COLUMNS, _BARS = 20, 14, 14
#: Lowest probability of labels whose argmax instance is framed.
_PREDICTED = 0.5
_ARGMAX, _POSITIVE, _NEGATIVE = "#c2255c", "#1f5fa8", "#b0451b"


def explanation_picture(explanation: Explanation, photo: Image.Image, path: Path) -> None:
    """Draw an explanation of ``photo``; the suffix of ``path`` is the file format."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1.25, 1))
    _photo(axes[0], explanation, photo)
    _matrix(axes[1], explanation)
    _influences(axes[2], explanation)
    p = explanation.prediction.probabilities[explanation.prediction.labels.index(explanation.label)]
    title = f"{explanation.label}: probability {p:.3f}, argmax instance {explanation.instance}"
    if explanation.prior is not None:
        learned = explanation.match_logit - explanation.prior
        title += (
            f" (match logit {explanation.match_logit:.2f}: detector {explanation.prior:+.2f}, learned {learned:+.2f})"
        )
    figure.suptitle(title)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a label may hold dollar signs
    save_figure(figure, path, dpi=120)


def _photo(axis: Axes, explanation: Explanation, photo: Image.Image) -> None:
    axis.imshow(photo)
    prediction = explanation.prediction
    plates: dict[tuple[float, float], list[int]] = {}  # boxes with nearly the same corner share a plate
    shown = range(min(len(prediction.boxes), _ROWS))
    order = [*(i for i in shown if i != explanation.instance), explanation.instance]
    for i in order:
        x1, y1, x2, y2 = prediction.boxes[i]
        is_argmax = i == explanation.instance
        color = _ARGMAX if is_argmax else "white"
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=3.5, ec="black", alpha=0.6))
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, lw=2.2 if is_argmax else 1.2, ec=color))
        corner = next((xy for xy in plates if max(abs(xy[0] - x1), abs(xy[1] - y1)) < 0.03 * photo.width), (x1, y1))
        plates.setdefault(corner, []).append(i)
    for (x, y), numbers in plates.items():
        is_argmax = explanation.instance in numbers
        plate = {"boxstyle": "round,pad=0.15", "fc": _ARGMAX if is_argmax else "white", "ec": "none", "alpha": 0.9}
        text = ", ".join(map(str, sorted(numbers)))
        axis.text(x, y, text, color="white" if is_argmax else "black", fontsize=8, va="bottom", bbox=plate)
    axis.set_axis_off()
    axis.set_title("instances; red: argmax instance", fontsize=10)


def _matrix(axis: Axes, explanation: Explanation) -> None:
    prediction = explanation.prediction
    chosen = prediction.labels.index(explanation.label)
    best = [int(c) for c in np.argsort(-prediction.probabilities, kind="stable")[:_COLUMNS]]
    columns = best if chosen in best else [*best[:-1], chosen]
    rows = list(range(min(len(prediction.boxes), _ROWS)))
    if explanation.instance not in rows:
        rows[-1] = explanation.instance
    logits = prediction.match_logits[np.ix_(rows, columns)].astype(np.float64)
    matrix = np.where(np.isfinite(logits), 1 / (1 + np.exp(-logits)), np.nan)  # NaN without an edge
    image = axis.imshow(matrix, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axis.set_facecolor("0.85")
    names = [f"{i} {name}" if (name := prediction.detected[i]) else str(i) for i in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set_xticks(range(len(columns)), [prediction.labels[c] for c in columns], rotation=45, ha="right", fontsize=8)
    for x, c in enumerate(columns):
        instance = int(prediction.match_logits[:, c].argmax())
        if prediction.probabilities[c] >= _PREDICTED and instance in rows:
            mark = (x - 0.5, rows.index(instance) - 0.5)
            axis.add_patch(Rectangle(mark, 1, 1, fill=False, lw=1.5, ec="white"))
    mark = (columns.index(chosen) - 0.5, rows.index(explanation.instance) - 0.5)
    axis.add_patch(Rectangle(mark, 1, 1, fill=False, lw=2.5, ec=_ARGMAX))
    gray = "; gray: no edge" if np.isnan(matrix).any() else ""
    axis.set_title(f"match matrix; framed: argmax instances of predicted labels{gray}", fontsize=10)
    axis.figure.colorbar(image, ax=axis, fraction=0.04, label="match probability")


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
    axis.barh(range(len(largest)), changes, color=[_POSITIVE if change > 0 else _NEGATIVE for change in changes])
    axis.set_yticks(range(len(largest)), names, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel(f"logit minus logit without the edge (logit: {explanation.logit:.2f})")
    axis.set_title("largest contributions of edges to the logit", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
