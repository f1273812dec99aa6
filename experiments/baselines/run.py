"""All models on scenes, on equal terms; see README.md.

    python experiments/baselines/run.py [SEEDS]      # default 3; finished runs are not run again

Boxes: instances of the tiny detector. Grid: the cells of the same detector's backbone, with the same weights.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from gm_mlic import build_extractor
from gm_mlic.cli.compose import compose
from gm_mlic.cli.demo import detector_scores
from gm_mlic.datasets.scenes import LABELS, Scenes
from gm_mlic.graphs import AssignmentBatch
from gm_mlic.instances import extract
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.nn import create_model
from gm_mlic.runs import read_run

HERE = Path(__file__).parent
#: model: overrides beside the preset's. SSGRL's attention at the paper's width costs 20 times the rest of it here.
MODELS = {
    "mil_max": [],
    "resnet101": [],
    "ml_gcn": [],
    "ssgrl": ["model.width=256"],
    "query2label": [],
    "gm_mlic": [],
}
NAMES = {
    "detector": "detector's own labels",
    "mil_max": "max-pooled (`mil_max`)",
    "resnet101": "global pooling (`resnet101`'s head)",
    "ml_gcn": "ML-GCN (`ml_gcn`)",
    "ssgrl": "SSGRL (`ssgrl`)",
    "query2label": "Query2Label (`query2label`)",
    "gm_mlic": "GM-MLIC (`gm_mlic`)",
}
PRESETS = {"boxes": "scenes", "grid": "scenes_grid"}
BATCH, REPEATS = 32, 7
COLUMNS = ("instances", "model", "seed", "mAP", "CF1", "OF1", "parameters")


def rows_wanted() -> list[tuple[str, str]]:
    """GM-MLIC on 100 cells has 2,200 matching edges an image, and is left out there."""
    return [(kind, model) for kind in PRESETS for model in MODELS if (kind, model) != ("grid", "gm_mlic")]


def overrides(kind: str, model: str) -> list[str]:
    chosen = [] if model == "gm_mlic" else [f"model={model}"]
    return [f"experiment={PRESETS[kind]}", *chosen, *MODELS[model]]


def main(seeds: int) -> None:
    path = HERE / "results.csv"
    for seed in range(seeds):
        for kind, model in rows_wanted():
            folder = f"runs/baselines/{kind}-{model}-{seed}"
            command = ["train", *overrides(kind, model), f"seed={seed}", f"run_dir={folder}"]
            if not (Path(folder) / "metrics.json").is_file():
                print("gm-mlic", *command, flush=True)
                subprocess.run([sys.executable, "-W", "ignore", "-m", "gm_mlic", *command], check=True)
        write(path, seed + 1)
    tell(list(csv.DictReader(path.open())))


def write(path: Path, seeds: int) -> None:
    rows = []
    for seed in range(seeds):
        rows.append({"instances": "boxes", "model": "detector", "seed": seed, **detector_row(), "parameters": 0})
        for kind, model in rows_wanted():
            result = read_run(f"runs/baselines/{kind}-{model}-{seed}").result
            assert result is not None
            test = {key: round(result["test"][key], 2) for key in ("mAP", "CF1", "OF1")}
            parameters = result["model"]["parameters"]
            rows.append({"instances": kind, "model": model, "seed": seed, **test, "parameters": parameters})
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def detector_row() -> dict[str, float]:
    """The labels that the detector itself gives; no training, so no seed."""
    scenes, detector = Scenes("test"), build_extractor("scenes_tiny", weights="scenes")
    store = extract(scenes, detector, Path("runs/baselines/detector"), m=15, progress=False)
    assert store is not None
    metrics = MultiLabelMetrics(len(LABELS))
    metrics.update(torch.from_numpy(detector_scores(store)), torch.from_numpy(np.asarray(store.targets)))
    values = metrics.compute()
    return {key: round(float(values[key]), 2) for key in ("mAP", "CF1", "OF1")}


def cost(kind: str, model: str) -> tuple[float, float]:
    """GFLOPs of an image, and images/s on this machine, of the network without the detector."""
    config = compose("train", overrides(kind, model))
    D = build_extractor("scenes_tiny", weights="scenes", grid=config.detector.grid).feature_dim
    sizes = {"instance_dim": D, "label_dim": 300, "num_labels": len(LABELS)}
    takes = {"gm_mlic": ("label_dim",), "ml_gcn": ("label_dim", "num_labels"), "ssgrl": ("label_dim", "num_labels")}
    settings = {key: config.model[key] for key in config.model if key != "name"}
    settings |= {key: sizes[key] for key in ("instance_dim", *takes.get(model, ("num_labels",)))}
    network = create_model(config.model.name, **settings).eval()
    m = config.graph.m
    batch = AssignmentBatch.build(
        torch.randn(BATCH, m, D), torch.rand(BATCH, m, 4), torch.ones(BATCH, m, dtype=torch.bool),
        torch.randn(len(LABELS), 300), neighbours=5 if model == "gm_mlic" else None, label_graph=model == "gm_mlic",
    )  # fmt: skip
    with torch.no_grad():
        counter = FlopCounterMode(display=False)
        with counter:
            network(batch)
        seconds = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            network(batch)
            seconds.append(time.perf_counter() - begin)
    return counter.get_total_flops() / BATCH / 1e9, BATCH / statistics.median(seconds)


def tell(rows: list[dict[str, str]]) -> None:
    """The table of README.md."""
    print("| on | model | mAP | CF1 | OF1 | parameters | GFLOPs per image | images/s |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind, model in [("boxes", "detector"), *rows_wanted()]:
        some = [r for r in rows if (r["instances"], r["model"]) == (kind, model)]
        cells = [say([float(r[key]) for r in some]) for key in ("mAP", "CF1", "OF1")]
        if model == "detector":
            cells = [cell.split(" ")[0] for cell in cells] + ["-"] * 3
        else:
            flops, speed = cost(kind, model)
            cells += [f"{int(some[0]['parameters']):,}", f"{flops:.4f}", f"{speed:,.0f}"]
        print(f"| {kind} | {NAMES[model]} | {' | '.join(cells)} |")


def say(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
