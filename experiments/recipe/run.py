"""Training settings of GM-MLIC on scenes: fusion, normalization, initialization, input scaling, learning rate.

    python experiments/recipe/run.py            # every variant; finished runs are not repeated
    python experiments/recipe/run.py concat-torch_init # one of them

Writes results.csv and results.png beside this file, from the metrics.json of each run in runs/recipe/.
"""

from __future__ import annotations

import csv
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/recipe")


def torch_init() -> None:
    """Use the default initialization of torch.nn.Linear instead of He initialization."""
    from torch import nn

    from gm_mlic.nn import mlp

    def reset_parameters(self: mlp.ConcatLinear) -> None:
        bound = 1 / math.sqrt(sum(self.in_channels))
        for lin in self.lins:
            nn.init.uniform_(lin.weight, -bound, bound)
        nn.init.uniform_(self.lins[0].bias, -bound, bound)

    mlp.ConcatLinear.reset_parameters = reset_parameters  # type: ignore[method-assign]
    mlp.init_linear = lambda lin: lin.reset_parameters()


def torch_product() -> None:
    """Use the default initialization of torch.nn.Linear for the projections A and B of the product."""
    from gm_mlic.nn import HadamardFusion

    def reset_parameters(self: HadamardFusion) -> None:
        self.A.reset_parameters()
        self.B.reset_parameters()

    HadamardFusion.reset_parameters = reset_parameters  # type: ignore[method-assign]


def raw_boxes() -> None:
    """Instance edges read both boxes in [0, 1], as in eq. 1."""
    from gm_mlic.graphs import EDGE_TYPES, SPATIAL, EdgeSpec

    EDGE_TYPES[SPATIAL] = EdgeSpec(attr_dim=8)


def absolute_boxes() -> None:
    """Instance edges read both boxes standardized, in absolute coordinates."""
    from gm_mlic.graphs import EDGE_TYPES, SPATIAL, EdgeSpec
    from gm_mlic.graphs.schema import standardize_boxes

    EDGE_TYPES[SPATIAL] = EdgeSpec(attr_dim=8, transform=standardize_boxes)


#: name: (seeds, overrides, patch)
VARIANTS: dict[str, tuple[int, list[str], Callable[[], None] | None]] = {
    "mil_max": (5, ["model=mil_max"], None),
    "concat": (5, ["model.fusion=concat"], None),
    "product": (5, ["model.fusion=product"], None),
    "concat-absolute_boxes": (3, ["model.fusion=concat"], absolute_boxes),
    "product-absolute_boxes": (3, ["model.fusion=product"], absolute_boxes),
    "concat-raw_boxes": (1, ["model.fusion=concat"], raw_boxes),
    "concat-norm_encoder": (1, ["model.fusion=concat", "model.norm=encoder"], None),
    "concat-norm_none": (1, ["model.fusion=concat", "model.norm=none"], None),
    "concat-torch_init": (1, ["model.fusion=concat"], torch_init),
    "product-torch_init": (1, ["model.fusion=product"], torch_init),
    "product-torch_product": (1, ["model.fusion=product"], torch_product),
    "concat-lr3e-3": (1, ["model.fusion=concat", "optimizer.lr=3e-3"], None),
    "product-lr5e-4": (1, ["model.fusion=product", "optimizer.lr=5e-4"], None),
    "concat-paper_sgd": (1, ["model.fusion=concat", "optimizer=paper", "scheduler=paper"], None),
}
#: Labels that differ only by relative position, and labels that differ only by context.
SPATIAL = ("gate", "hatch", "comet", "satellite")
CONTEXT = ("lemon", "tennis ball", "cricket bat", "fence post", "marigold", "starfish", "life ring", "doughnut")


def run(name: str) -> None:
    """Train one variant with each of its seeds, in this process."""
    from gm_mlic.cli.main import run as command

    seeds, overrides, patch = VARIANTS[name]
    if patch is not None:
        patch()
    for seed in range(seeds):
        out = RUNS / f"{name}-{seed}"
        code = command(["train", "experiment=scenes", f"seed={seed}", f"run_dir={out}", *overrides])
        if code:
            sys.exit(code)


def collect() -> None:
    """Write finished runs to results.csv, and draw the figure."""
    rows = []
    for name, (seeds, overrides, patch) in VARIANTS.items():
        for seed in range(seeds):
            file = RUNS / f"{name}-{seed}" / "metrics.json"
            if not file.exists():
                continue
            test = json.loads(file.read_text())["test"]
            of = test["AP"]
            rows.append(
                {
                    "variant": name,
                    "seed": seed,
                    "overrides": " ".join(overrides),
                    "patch": patch.__name__ if patch else "",
                    "mAP": round(test["mAP"], 2),
                    "AP_spatial": round(statistics.mean(of[label] for label in SPATIAL), 2),
                    "AP_context": round(statistics.mean(of[label] for label in CONTEXT), 2),
                }
            )
    with (HERE / "results.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows)
    print("| variant | seeds | mAP | AP_spatial | AP_context |\n| --- | ---: | ---: | ---: | ---: |")
    for name in VARIANTS:
        of = [row for row in rows if row["variant"] == name]
        cells = [mean_and_std([row[key] for row in of]) for key in ("mAP", "AP_spatial", "AP_context")]
        if of:
            print(f"| {name} | {len(of)} | {' | '.join(cells)} |")


def mean_and_std(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


def plot(rows: list[dict]) -> None:
    """Draw mAP and the AP of both kinds of ambiguous labels for every variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [name for name in VARIANTS if any(row["variant"] == name for row in rows)]
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(names) + 1.4), layout="constrained")
    for key, marker, color in (
        ("AP_spatial", "^", "#c25b00"),
        ("AP_context", "s", "#3b7dd8"),
        ("mAP", "o", "#111111"),
    ):
        for y, name in enumerate(names):
            values = [row[key] for row in rows if row["variant"] == name]
            axes.plot(values, [y] * len(values), marker, color=color, alpha=0.8, label=key if y == 0 else None)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("test, % (one mark per seed)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(HERE / "results.png", dpi=130)


if __name__ == "__main__":
    import subprocess

    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        for variant in VARIANTS:  # separate processes, because of the patches
            subprocess.run([sys.executable, __file__, variant], check=True)
    collect()
