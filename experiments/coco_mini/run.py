"""Real photos: GM-MLIC on 340 MS-COCO photos, with an untrained ResNet-50-FPN and with a detector trained on them.

    python experiments/coco_mini/run.py SHARED   # SHARED holds coco-mini/ and glove/coco2014.npz

Runs the commands of README.md (finished runs are not repeated) and writes results.csv.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RUNS = Path("runs/coco_mini")
DETECTOR = RUNS / "detector" / "detector.safetensors"
SEEDS = range(2)

#: detector: overrides
DETECTORS = {
    "resnet50_fpn, untrained": [],
    "scenes_tiny, trained on the boxes": [
        "detector=scenes_tiny",
        "detector.min_size=240",
        f"detector.weights={DETECTOR}",
    ],
}
MODELS = {
    "mil_max": ["model=mil_max"],
    "concat": ["model.fusion=concat"],
    "product": ["model.fusion=product"],
}
SCHEDULE = ["trainer.max_epochs=12", "trainer.batch_size=16"]


def gm_mlic(*arguments: str) -> None:
    """Print and run a command."""
    print("gm-mlic", *arguments, flush=True)
    subprocess.run([str(Path(sys.executable).with_name("gm-mlic")), *arguments], check=True)


def main(shared: Path) -> None:
    data = ["dataset=coco2014", f"dataset.root={shared}/coco-mini"]
    labels = ["embedding=glove", f"embedding.path={shared}/glove/coco2014.npz"]
    # default settings
    gm_mlic("train", *data, *labels, f"run_dir={RUNS}/first")
    if not DETECTOR.exists():
        gm_mlic(
            "train-detector", *data, "detector=scenes_tiny", "detector.min_size=240", "epochs=15",
            f"run_dir={DETECTOR.parent}",
        )  # fmt: skip
    rows = [row("resnet50_fpn, untrained", "product, the first command", 0, RUNS / "first")]
    for detector, choice in DETECTORS.items():
        for model, overrides in MODELS.items():
            for seed in SEEDS:
                run = RUNS / f"{detector.split(',')[0]}-{model}-{seed}"
                gm_mlic("train", *data, *labels, *choice, *overrides, *SCHEDULE, f"seed={seed}", f"run_dir={run}")
                rows.append(row(detector, model, seed, run))
    with (HERE / "results.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for detector, model in dict.fromkeys((r["detector"], r["model"]) for r in rows):
        values = [r["mAP"] for r in rows if (r["detector"], r["model"]) == (detector, model)]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{detector:36s} {model:28s} {statistics.mean(values):5.1f}{spread}  ({len(values)} seeds)")


def row(detector: str, model: str, seed: int, run: Path) -> dict[str, object]:
    """Test metrics of a run, from its metrics.json."""
    result = json.loads((run / "metrics.json").read_text())
    test = result["test"]
    return {
        "detector": detector,
        "model": model,
        "seed": seed,
        "mAP": round(test["mAP"], 2),
        "CF1": round(test["CF1"], 2),
        "OF1": round(test["OF1"], 2),
        "best_epoch": result["best_epoch"],
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
