"""Pointing game: is the argmax box of a label on an object of this label? See README.md.

    python experiments/pointing_game/run.py            # trains missing runs (a few minutes each), then measures
    python experiments/pointing_game/run.py measure    # measures finished runs
    python experiments/pointing_game/run.py FOLDER...  # measures the runs of GM-MLIC on scenes in these folders

Prints the tables of README.md. results.csv has a row per model, seed and label (except for runs in folders).
"""

from __future__ import annotations

import csv
import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_iou

from gm_mlic import Predictor, Scenes, build_extractor, extract
from gm_mlic.cli.main import run as command
from gm_mlic.datasets.scenes import LABELS
from gm_mlic.graphs import RELATIONS, AssignmentBatchDataset
from gm_mlic.instances import InstanceStore
from gm_mlic.runs import find_runs

HERE, RUNS = Path(__file__).parent, Path("runs/pointing_game")
#: Overrides of experiment=scenes.
MODELS = {
    "product": [],
    "concat": ["model.fusion=concat"],
    "w/o Gl": ["ablation=no_semantic"],
    "w/o Go": ["ablation=no_spatial"],
    "w/o ILM edges": ["ablation=no_matches"],
    "mil_max": ["model=mil_max"],
}
SHIPPED = "gm_mlic_scenes"
SEEDS = (0, 1, 2)
#: Labels with a unique appearance; labels that differ from a label of another theme only by context; labels that
#: differ only by their position relative to an anchor object.
KINDS = {
    "plain": [LABELS[4 * theme + place] for theme in range(4) for place in (0, 1)] + ["house", "moon"],
    "context": [LABELS[4 * theme + place] for theme in range(4) for place in (2, 3)],
    "spatial": ["gate", "hatch", "comet", "satellite"],
}
IOU, MARGIN, RANGE, BATCH = 0.5, 1.0, 5.0, 50
#: Rules that select an instance for a label: the argmax of eq. 14; the instance with the highest detector confidence
#: within MARGIN of the maximum logit; the instance with the largest softmax over labels, of all instances or of those
#: within RANGE of the maximum logit.
RULES = ("argmax", "confident", "softmax", "softmax in range")


def run_dir(model: str, seed: int) -> Path:
    return RUNS / f"{model.replace('w/o ', 'without-').replace(' ', '-')}-{seed}"


def train_all() -> None:
    for seed, (model, settings) in itertools.product(SEEDS, MODELS.items()):
        code = command(["train", "experiment=scenes", *settings, f"seed={seed}", f"run_dir={run_dir(model, seed)}"])
        if code:
            sys.exit(code)


def chosen(match: torch.Tensor) -> dict[str, torch.Tensor]:
    """The selected instances (C,) of each rule, from match logits (M, C), the most confident instance first."""
    best, softmax = match.amax(dim=0), match.softmax(dim=1)
    return {
        "argmax": match.argmax(dim=0),
        "confident": (match >= best - MARGIN).int().argmax(dim=0),
        "softmax": softmax.argmax(dim=0),
        "softmax in range": softmax.where(match >= best - RANGE, -1.0).argmax(dim=0),
    }


@torch.no_grad()
def measure(predictor: Predictor, store: InstanceStore, scenes: Scenes) -> Iterator[dict[str, Any]]:
    """A row per label: correct predictions of detected objects, and the number of boxes on the object by rule."""
    counts = {label: Counter[str]() for label in LABELS}
    elsewhere = {label: Counter[str]() for label in LABELS}
    graphs = AssignmentBatchDataset(store, predictor.graph)
    for start in range(0, len(scenes), BATCH):
        batch = graphs.__getitems__(range(start, start + BATCH))
        output = predictor.model(batch)
        for row, logits, matches, boxes, mask in zip(
            range(start, start + BATCH), output.logits, output.match_logits, batch.box, batch.mask, strict=True
        ):
            objects = scenes.boxes(row)
            overlap = box_iou(boxes[mask] * scenes.image_size, objects.boxes) >= IOU
            instances = chosen(matches[mask])
            for c in (logits >= 0).nonzero().flatten().tolist():
                on_it = overlap[:, objects.labels == c].any(dim=1)
                if not on_it.any():  # absent, or not detected
                    continue
                counts[LABELS[c]].update(
                    predictions=1,
                    close=int((matches[mask][:, c] >= logits[c] - MARGIN).sum()),
                    **{rule: int(on_it[instances[rule][c]]) for rule in RULES},
                )
                argmax = instances["argmax"][c]
                if not on_it[argmax]:
                    others = objects.labels[overlap[argmax]].tolist()
                    elsewhere[LABELS[c]][LABELS[others[0]] if others else "no object"] += 1
    for label, count in counts.items():
        yield {
            "label": label,
            "kind": next(kind for kind, labels in KINDS.items() if label in labels),
            **{key: count[key] for key in ("predictions", *RULES, "close")},
            "elsewhere": "; ".join(f"{name} {times}" for name, times in elsewhere[label].most_common(3)),
        }


def detected(m: int) -> tuple[Scenes, InstanceStore]:
    torch.set_num_threads(1)
    scenes = Scenes("test")
    store = extract(scenes, build_extractor("scenes_tiny", weights="scenes"), RUNS / f"test-{m}", m=m)
    assert store is not None
    return scenes, store


def measure_runs(folders: list[str]) -> list[dict[str, Any]]:
    """Rows of the runs in some folders, sorted by fusion, ablation and seed."""
    runs = [run for run in find_runs(folders) if run.result and run.setting("dataset.name") == "scenes"]
    runs = [run for run in runs if run.setting("model.name") == "gm_mlic"]
    if not runs:
        sys.exit(f"{', '.join(folders)}: no finished run of GM-MLIC on scenes")
    scenes, store = detected(max(run.setting("graph.m") for run in runs))
    rows = []
    for run in runs:
        removed = [name for name in RELATIONS if name not in run.setting("model.edge_types")]
        model = " ".join([run.setting("model.fusion"), *(f"no_{name}" for name in removed)])
        found = measure(Predictor.load(run.path / "checkpoints" / "best.ckpt"), store, scenes)
        rows += [{"model": model, "seed": run.setting("seed"), **row} for row in found]
    return sorted(rows, key=lambda row: (row["model"], row["seed"]))


def measure_all() -> list[dict[str, Any]]:
    scenes, store = detected(10)
    rows = []
    trained = [(model, seed, run_dir(model, seed) / "checkpoints" / "best.ckpt") for model in MODELS for seed in SEEDS]
    for model, seed, file in [(SHIPPED, 0, SHIPPED), *trained]:
        if file == SHIPPED or (Path(file).parents[1] / "metrics.json").exists():
            found = measure(Predictor.load(file), store, scenes)
            rows += [{"model": model, "seed": seed, **row} for row in found]
    with (HERE / "results.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def print_tables(rows: list[dict[str, Any]]) -> None:
    """Print the tables of README.md."""
    print("| model | seeds | argmax | plain | context | spatial | confident | softmax | softmax in range |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for model, group in itertools.groupby(rows, key=lambda row: row["model"]):
        runs = [list(run) for _, run in itertools.groupby(group, key=lambda row: row["seed"])]
        cells = [mean_and_std([percent(run, "argmax") for run in runs])]
        for kind in KINDS:
            cells.append(mean_and_std([percent([r for r in run if r["kind"] == kind], "argmax") for run in runs]))
        cells += [mean_and_std([percent(run, rule) for run in runs]) for rule in RULES[1:]]
        print(f"| {model} | {len(runs)} | {' | '.join(cells)} |")
    shares = [
        row["argmax"] / row["predictions"] for row in rows if row["model"] != SHIPPED and row["predictions"] >= 10
    ]
    never, always = sum(share < 0.1 for share in shares), sum(share > 0.9 for share in shares)
    print(f"\n{len(shares)} pairs of label and run: {never} below 10 %, {always} above 90 %")
    print("\n| model | seed | labels with less than 50 % (objects under the argmax box) | close |")
    print("| --- | ---: | --- | ---: |")
    for (model, seed), group in itertools.groupby(rows, key=lambda row: (row["model"], row["seed"])):
        few = [row for row in group if row["predictions"] >= 10 and row["argmax"] < row["predictions"] / 2]
        text = ", ".join(f"{row['label']} {percent([row], 'argmax'):.0f} ({row['elsewhere']})" for row in few)
        close = ", ".join(f"{row['close'] / row['predictions']:.1f}" for row in few)
        print(f"| {model} | {seed} | {text or '-'} | {close or '-'} |")


def percent(rows: list[dict[str, Any]], rule: str) -> float:
    return 100 * sum(row[rule] for row in rows) / max(1, sum(row["predictions"] for row in rows))


def mean_and_std(values: list[float]) -> str:
    mean, no_break = f"{statistics.mean(values):.1f}", "\u00a0"
    return f"{mean}{no_break}±{no_break}{statistics.stdev(values):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["measure"]):
        print_tables(measure_runs(sys.argv[1:]))
        sys.exit()
    if sys.argv[1:] != ["measure"]:
        train_all()
    print_tables(measure_all())
