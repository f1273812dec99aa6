"""GM-MLIC and published baselines on the same scenes, backbone, training and evaluation.

    python experiments/baselines/run.py            # everything; finished runs are not repeated
    python experiments/baselines/run.py collect    # only the table, from finished runs

results.csv has a row per finished run; delete a row to repeat the run. results.md is the table.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from gm_mlic.bench.measure import FlopCounter, interleaved
from gm_mlic.cli.bench import describe_machine
from gm_mlic.cli.compose import compose
from gm_mlic.cli.main import run as command
from gm_mlic.datasets.scenes import LABELS, Scenes
from gm_mlic.graphs import AssignmentBatch
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.training import build
from gm_mlic.training.run import build_module

HERE = Path(__file__).parent
RESULTS, RUNS = HERE / "results.csv", Path("runs/baselines")
SEEDS = (0, 1, 2)
#: The learning rate of experiments/recipe, selected for GM-MLIC and mil_max.
OURS = ("1e-3",)
#: Candidates of the other models, selected by validation mAP with seed 0.
THEIRS = ("1e-3", "3e-3", "1e-2", "3e-2")
#: A linear model on small features needs larger ones.
LINEAR = (*THEIRS, "1e-1", "3e-1", "1", "3", "10", "30")
GRID = ["detector.grid_size=10"]
BATCH, ROUNDS = 32, 15


@dataclass(frozen=True)
class Row:
    """A row of the table: name, input, overrides of experiment=scenes, learning rates."""

    model: str
    input: str
    overrides: list[str]
    rates: tuple[str, ...]


#: In order of cost. Widths suit two cores; 64 is also that of gm_mlic_small.
ROWS = {
    "detector_labels": Row("detector's own labels", "boxes", ["model=detector_labels"], OURS),
    "mil_max": Row("max-pooled MIL", "boxes", ["model=mil_max"], OURS),
    "gm_mlic": Row("GM-MLIC", "boxes", [], OURS),
    "gap_linear": Row("global pooling", "grid", ["model=gap_linear"], LINEAR),
    "ml_gcn": Row("ML-GCN", "grid", ["model=ml_gcn"], THEIRS),
    "query2label": Row("Query2Label", "grid", ["model=query2label", "model.width=64"], THEIRS),
    "mil_max-grid": Row("max-pooled MIL", "grid", ["model=mil_max", *GRID], OURS),
    "ssgrl": Row("SSGRL", "grid", ["model=ssgrl", "model.width=256"], THEIRS),
    "gm_mlic-grid": Row("GM-MLIC", "grid", GRID, OURS),
}
#: Labels with a unique appearance; labels that differ from a label of another theme only by context; labels that
#: differ only by their position relative to an anchor object.
KINDS = {
    "plain": [LABELS[4 * theme + place] for theme in range(4) for place in (0, 1)] + ["house", "moon"],
    "context": [LABELS[4 * theme + place] for theme in range(4) for place in (2, 3)],
    "spatial": ["gate", "hatch", "comet", "satellite"],
}
MEASURES = ("mAP", *KINDS)


def train(name: str, rate: str, seed: int) -> None:
    """Train and test, unless results.csv has the run; an interrupted run resumes."""
    rows = read()
    if any(found["row"] == name and found["lr"] == rate and int(found["seed"]) == seed for found in rows):
        return
    run_dir = RUNS / f"{name}-lr{rate}-{seed}"
    settings = ["experiment=scenes", *ROWS[name].overrides, f"optimizer.lr={rate}", f"seed={seed}"]
    code = command(["train", *settings, f"run_dir={run_dir}"])
    if code:
        sys.exit(code)
    done = json.loads((run_dir / "metrics.json").read_text())
    row = {
        "row": name,
        "lr": rate,
        "seed": seed,
        "val_mAP": round(done["val"]["mAP"], 2),
        **{measure: round(value, 2) for measure, value in measured(done["test"]).items()},
        "parameters": done["model"]["parameters"],
        "train_seconds": done["train_seconds"],
    }
    rows = sorted([*rows, row], key=lambda r: (list(ROWS).index(r["row"]), float(r["lr"]), int(r["seed"])))
    with RESULTS.open("w", newline="") as out:
        writer = csv.DictWriter(out, row.keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read() -> list[dict[str, Any]]:
    """The finished runs."""
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def best_rate(name: str) -> str:
    """The learning rate with the best validation mAP of finished runs with seed 0."""
    found = {r["lr"]: float(r["val_mAP"]) for r in read() if r["row"] == name and r["seed"] == "0"}
    return max(found, key=found.__getitem__, default=ROWS[name].rates[0])


def train_all() -> None:
    for name, row in ROWS.items():
        for rate in row.rates:
            train(name, rate, 0)
        for seed in SEEDS[1:]:
            train(name, best_rate(name), seed)


# Tables


def measured(test: dict[str, Any]) -> dict[str, float]:
    """mAP, and the mean AP of each kind of label."""
    of = {kind: statistics.mean(test["AP"][label] for label in labels) for kind, labels in KINDS.items()}
    return {"mAP": float(test["mAP"]), **of}


def known_limit() -> dict[str, float]:
    """The limit of any method on the test scenes."""
    config = compose("train", ["experiment=scenes"])
    test = build.build_dataset(config, "test")
    assert isinstance(test, Scenes)
    metrics = MultiLabelMetrics(len(LABELS), convention=config.metrics.convention)
    metrics.update(torch.from_numpy(test.limit_scores).float(), torch.from_numpy(test.targets))
    values = metrics.compute()
    return measured({"mAP": values["mAP"], "AP": dict(zip(LABELS, values["AP"].tolist(), strict=True))})


def network(config: DictConfig) -> tuple[torch.nn.Module, AssignmentBatch]:
    """The network of a row with random weights, and a batch of random instances of matching sizes."""
    extractor = build.build_detector(config)
    module, graph = build_module(config, build.build_dataset(config, "train"), extractor)
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, BATCH, config.graph.m, 2, generator=generator) / 2
    batch = AssignmentBatch.from_padded(
        x=torch.rand(BATCH, config.graph.m, extractor.feature_dim, generator=generator),
        box=torch.cat([corner, corner + size], dim=-1),
        mask=torch.ones(BATCH, config.graph.m, dtype=torch.bool),
        label_vectors=graph.label_vectors,
        num_neighbors=graph.num_neighbors,
        edge_types=graph.edge_types,
        score=torch.rand(BATCH, config.graph.m, generator=generator),
        detected_label=torch.zeros(BATCH, config.graph.m, dtype=torch.int64),
    )
    return module.model.eval(), batch


def flops_of(model: torch.nn.Module, batch: AssignmentBatch) -> int:
    """Multiplications and additions of all matrix products (fused attention is disabled, as it is not counted)."""
    model.requires_grad_(False)  # the counter does not support views of parameters
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounter() as counter:
            model(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


@torch.no_grad()
def costs() -> dict[str, tuple[int, float, float]]:
    """Parameters, GFLOPs per image and images/s of each network, without detector and backbone."""
    networks = {}
    for name, row in ROWS.items():
        networks[name] = network(compose("train", ["experiment=scenes", "dataset.sizes.train=64", *row.overrides]))
    flops = {name: flops_of(model, batch) for name, (model, batch) in networks.items()}
    timings = interleaved(
        {name: lambda model=model, batch=batch: model(batch) for name, (model, batch) in networks.items()}, ROUNDS
    )
    return {
        name: (
            sum(p.numel() for p in model.parameters()),
            flops[name] / BATCH / 1e9,
            BATCH / statistics.median(timings[name]),
        )
        for name, (model, _) in networks.items()
    }


def collect() -> None:
    rows = read()
    limit = " | ".join(f"{value:.1f}" for value in known_limit().values())
    lines = [
        "| model | input | lr | mAP | plain | context | spatial | parameters | GFLOPs per image | images/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| upper bound | | | {limit} | | | |",
    ]
    cost = costs()
    for name, row in ROWS.items():
        of = [r for r in rows if r["row"] == name and r["lr"] == best_rate(name)]
        if of:
            parameters, gflops, speed = cost[name]
            cells = [mean_and_std([float(r[measure]) for r in of]) for measure in MEASURES]
            lines.append(
                f"| {row.model} | {row.input} | {float(of[0]['lr']):g} | {' | '.join(cells)} | {parameters:,} | "
                f"{gflops:.3g} | {speed:,.0f} |"
            )
    machine = describe_machine("cpu")
    table = "\n".join(lines)
    print(table)
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    (HERE / "results.md").write_text(table + "\n")


def mean_and_std(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    mean, no_break = f"{statistics.mean(values):.1f}", "\u00a0"
    return f"{mean}{no_break}±{no_break}{statistics.stdev(values):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    if sys.argv[1:] != ["collect"]:
        train_all()
    collect()
