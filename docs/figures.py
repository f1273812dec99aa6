"""Draw the figure of the concepts page: the assignment graph of a scene, from the detector of the package.

python docs/figures.py docs/assignment_graph.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image
from torch_geometric.data import HeteroData
from torchvision.transforms.functional import to_tensor

from gm_mlic import AssignmentGraph, Scenes, build_extractor, embed_labels, to_hetero_data
from gm_mlic.graphs import MATCHES, SEMANTIC, SPATIAL

SCENE, M, NEIGHBORS = 6, 5, 2
SHOWN_LABELS = 7
ORANGE, BLUE, GREY = "#c8611a", "#2f6fce", "#9a9a9a"


def main(out: Path) -> None:
    """Detect, build the graph and draw both."""
    scenes = Scenes("test", size=SCENE + 1)
    photo = scenes.image(SCENE)
    detector = build_extractor("scenes_tiny", weights="scenes")
    (instances,) = detector([to_tensor(photo)], m=M)
    present = [label for label, target in zip(scenes.labels, scenes.targets[SCENE], strict=True) if target == 1]
    labels = (present + [label for label in scenes.labels if label not in present])[:SHOWN_LABELS]
    graph = AssignmentGraph(embed_labels(labels).vectors, m=M, num_neighbors=NEIGHBORS)(to_hetero_data(instances))

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=[1, 1.7], layout="constrained")
    draw_photo(left, photo, graph)
    draw_graph(right, graph, photo, labels, len(scenes.labels))
    figure.savefig(out, dpi=100)
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)


def draw_photo(axes: Axes, photo: Image.Image, graph: HeteroData) -> None:
    """The photo with its instances, numbered by confidence, and the edges of the instance graph."""
    axes.imshow(photo)
    boxes = graph["instance"].box * photo.width
    for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=ORANGE, linewidth=2))
        axes.text(x1, y1 - 2, str(number), color="white", fontsize=9, backgroundcolor=ORANGE, va="bottom")
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    for source, target in graph[SPATIAL].edge_index.t().tolist():
        arrow(axes, centers[source].tolist(), centers[target].tolist(), ORANGE, bend=0.15, width=1.8)
    axes.set_title("photo, instances, and the instance graph (eq. 1)", fontsize=10)
    axes.axis("off")


def draw_graph(axes: Axes, graph: HeteroData, photo: Image.Image, labels: list[str], num_labels: int) -> None:
    """The same instances beside the labels, with all three edge types."""
    M, C = graph["instance"].num_nodes, len(labels)
    place_o = [(0.0, 1 - i / (M - 1)) for i in range(M)]
    place_l = [(1.0, 1 - c / (C - 1)) for c in range(C)]
    for i, c in graph[MATCHES].edge_index.t().tolist():
        (x1, y1), (x2, y2) = place_o[i], place_l[c]
        axes.plot([x1 + 0.07, x2 - 0.02], [y1, y2], color=GREY, linewidth=0.6, zorder=0)
    for source, target in graph[SPATIAL].edge_index.t().tolist():
        arrow(
            axes,
            *((x - 0.08, y) for x, y in (place_o[source], place_o[target])),
            ORANGE,
            bend=0.5 * sign(source, target),
        )
    for source, target in graph[SEMANTIC].edge_index.t().tolist():
        arrow(
            axes, *((x + 0.22, y) for x, y in (place_l[source], place_l[target])), BLUE, bend=0.3 * sign(target, source)
        )
    for i, box in enumerate((graph["instance"].box * photo.width).round().int().tolist()):
        x, y = place_o[i]
        axes.imshow(photo.crop(box), extent=(x - 0.06, x + 0.06, y - 0.08, y + 0.08), aspect="auto", zorder=2)
        axes.text(x - 0.06, y + 0.085, str(i), color=ORANGE, fontsize=8, va="bottom")
    for label, (x, y) in zip(labels, place_l, strict=True):
        axes.text(x, y, label, fontsize=9, va="center", bbox={"facecolor": "white", "edgecolor": BLUE, "pad": 2.5})
    axes.set_xlim(-0.45, 1.6)
    axes.set_ylim(-0.15, 1.2)
    axes.set_title(f"assignment graph: {M} instances, {C} of the {num_labels} labels", fontsize=10)
    for x, text, color in (
        (-0.35, "spatial (eq. 1)", ORANGE),
        (0.4, "matches (eq. 3)", "#666666"),
        (1.2, "semantic (eq. 2)", BLUE),
    ):
        axes.text(x, -0.14, text, color=color, fontsize=9)
    axes.axis("off")


def sign(source: int, target: int) -> int:
    """Bend edges up and down to one side."""
    return 1 if source < target else -1


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, bend: float, width: float = 0.8
) -> None:
    """A bent arrow between two points."""
    style = {"arrowstyle": "-|>", "mutation_scale": 6 + 3 * width, "linewidth": width, "color": color}
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", shrinkA=3, shrinkB=3, **style))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
