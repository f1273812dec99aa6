"""Ablation of graphs, m and k on scenes: the sweeps of README.md, with results.csv and figures.

    python experiments/graphs/run.py [STUDY ...]     # default: all; two runs at a time, one thread each

Finished runs are not repeated. results.csv keeps the rows of other studies.
"""

from __future__ import annotations

import csv
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from gm_mlic.datasets.scenes import LABELS, Scenes
from gm_mlic.graphs import RELATIONS
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.runs import Run, find_runs

HERE = Path(__file__).parent
FIVE, THREE = "seed=0,1,2,3,4", "seed=0,1,2"
BOTH = "ablation=full,no_semantic"
#: study: overrides
SWEEPS = {
    "ablation": [
        "experiment=scenes",
        "ablation=full,no_semantic,no_spatial,no_matches",
        "model.fusion=concat,product",
        FIVE,
    ],
    "m": ["experiment=scenes", "graph.m=2,4,6,10,15", "model.fusion=product", THREE],
    "k": ["experiment=scenes", "model.k=1,2,3", "model.fusion=product", THREE],
    # Candidates and a late instance graph; then each of the two alone.
    "candidates": [
        "experiment=scenes_candidates",
        "ablation=full,no_semantic,no_spatial,no_matches",
        "model.fusion=concat,product",
        FIVE,
    ],
    "candidates-at-once": ["experiment=scenes_candidates", "trainer.instance_graph_warmup_epochs=null", BOTH, FIVE],
    "complete-in-turn": ["experiment=scenes_candidates", "graph.labels_per_class=null", BOTH, FIVE],
}
#: Titles of the studies of variants.
ABLATIONS = {
    "ablation": "complete matching edges",
    "complete-in-turn": "complete, late Go",
    "candidates-at-once": "candidates",
    "candidates": "candidates, late Go",
}
VARIANTS = {
    "full": "full",
    "no_semantic": "w/o Gl",
    "no_spatial": "w/o Go",
    "no_matches": "w/o ILM edges",
}
#: Labels with a unique appearance; labels that differ from a label of another theme only by context; labels that
#: differ only by their position relative to an anchor object.
KINDS = {
    "plain": [LABELS[4 * theme + place] for theme in range(4) for place in (0, 1)] + ["house", "moon"],
    "context": [LABELS[4 * theme + place] for theme in range(4) for place in (2, 3)],
    "spatial": ["gate", "hatch", "comet", "satellite"],
}
COLORS = {"concat": "#c25b00", "product": "#3b7dd8"}


def main(studies: list[str]) -> None:
    for study in studies:
        command = ["train", "-m", *SWEEPS[study], f"hydra.sweep.dir=runs/multirun/graphs-{study}"]
        print("gm-mlic", *command, flush=True)
        subprocess.run(
            [
                Path(sys.executable).with_name("gm-mlic"),
                *command,
                "hydra/launcher=joblib",
                "hydra.launcher.n_jobs=2",
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )
    with (HERE / "results.csv").open(newline="") as file:
        rows = [as_numbers(r) for r in csv.DictReader(file) if r["study"] not in studies]
    rows += [row(study, run) for study in studies for run in find_runs([f"runs/multirun/graphs-{study}"]) if run.result]
    rows.sort(key=lambda r: [str(value).rjust(20) for value in r.values()])
    with (HERE / "results.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print_limit()
    for study in ABLATIONS:
        print(f"{study}: {ABLATIONS[study]}")
        print_ablation([r for r in rows if r["study"] == study])
    for study in ("m", "k"):
        for value, group in grouped(rows, study):
            print(f"{study}={value}: {mean_and_std([r['mAP'] for r in group])} ({len(group)} seeds)")
    draw(rows, HERE / "results.png")


def as_numbers(r: dict[str, str]) -> dict[str, object]:
    """A row of results.csv with the types of :func:`row`."""
    whole = ("m", "k", "seed")
    texts = ("study", "variant", "fusion")
    return {key: value if key in texts else int(value) if key in whole else float(value) for key, value in r.items()}


def row(study: str, run: Run) -> dict[str, object]:
    assert run.result is not None
    test = run.result["test"]
    removed = [name for name in RELATIONS if name not in run.setting("model.edge_types")]
    return {
        "study": study,
        "variant": "full" if not removed else f"no_{removed[0]}",
        "fusion": run.setting("model.fusion"),
        "m": run.setting("graph.m"),
        "k": run.setting("model.k"),
        "seed": run.setting("seed"),
        "mAP": round(test["mAP"], 2),
        "CF1": round(test["CF1"], 2),
        "OF1": round(test["OF1"], 2),
        **{kind: round(statistics.mean(test["AP"][label] for label in labels), 2) for kind, labels in KINDS.items()},
        "train_seconds": run.result["train_seconds"],
    }


def print_limit() -> None:
    """Print the limit of any method on the test scenes, for each kind of label."""
    scenes = Scenes("test")
    metrics = MultiLabelMetrics(len(LABELS))
    metrics.update(torch.from_numpy(scenes.limit_scores).float(), torch.from_numpy(scenes.targets))
    values = metrics.compute()
    AP = dict(zip(LABELS, values["AP"].tolist(), strict=True))
    kinds = "  ".join(f"{kind} {statistics.mean(AP[label] for label in labels):.1f}" for kind, labels in KINDS.items())
    print(f"limit: mAP {float(values['mAP']):.1f}  {kinds}")


def print_ablation(rows: list[dict]) -> None:
    """Mean and standard deviation of each variant, and of the gain of the full model with the same seed."""
    for fusion in COLORS:
        full = {r["seed"]: r["mAP"] for r in rows if (r["fusion"], r["variant"]) == (fusion, "full")}
        for variant, name in VARIANTS.items():
            group = [r for r in rows if (r["fusion"], r["variant"]) == (fusion, variant)]
            if not group:
                continue
            lost = [full[r["seed"]] - r["mAP"] for r in group if r["seed"] in full]
            measured = "  ".join(f"{key} {mean_and_std([r[key] for r in group])}" for key in ("mAP", "CF1", *KINDS))
            print(
                f"{fusion:8s} {name:14s} {measured}  gain of full {mean_and_std(lost)}, "
                f"smallest gain {min(lost):.1f} ({len(group)} seeds)"
            )


def grouped(rows: list[dict], study: str) -> list[tuple[int, list[dict]]]:
    """The runs of study ``m`` or ``k`` by its value."""
    groups: dict[int, list[dict]] = {}
    for r in rows:
        if r["study"] == study:
            groups.setdefault(r[study], []).append(r)
    return sorted(groups.items())


def mean_and_std(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else "-"


def draw(rows: list[dict], path: Path) -> None:
    """Draw the ablations as dots, one per seed, and m and k as curves with standard deviations over seeds."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    axes[0, 1].sharey(axes[0, 0])
    for axis, study in zip(axes[0], ("ablation", "candidates"), strict=True):
        for (number, fusion), (place, variant) in itertools.product(enumerate(COLORS), enumerate(VARIANTS)):
            values = [r["mAP"] for r in rows if (r["study"], r["fusion"], r["variant"]) == (study, fusion, variant)]
            x = place + 0.24 * (number - 0.5)
            label = fusion if place == 0 else None
            axis.plot([x] * len(values), values, "o", color=COLORS[fusion], alpha=0.5, label=label)
            if values:
                axis.hlines(statistics.mean(values), x - 0.1, x + 0.1, color=COLORS[fusion])
        axis.set_xticks(range(len(VARIANTS)), list(VARIANTS.values()))
        axis.set_title(ABLATIONS[study], fontsize=10)
    axes[0, 0].legend()
    for axis, study in zip(axes[1], ("m", "k"), strict=True):
        groups = grouped(rows, study)
        x = [value for value, _ in groups]
        mean = [statistics.mean([r["mAP"] for r in group]) for _, group in groups]
        error = [statistics.stdev([r["mAP"] for r in group]) if len(group) > 1 else 0 for _, group in groups]
        axis.errorbar(x, mean, error, fmt="o-", color=COLORS["product"], capsize=3)
        axis.set_xlabel({"m": "m, instances per image", "k": "k, blocks"}[study])
        axis.set_xticks(x)
    for axis in axes.flat:
        axis.set_ylabel("test mAP, %")
        axis.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(SWEEPS)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: studies are {', '.join(SWEEPS)}")
    main(sys.argv[1:] or list(SWEEPS))
