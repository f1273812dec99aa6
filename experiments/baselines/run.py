"""GM-MLIC and published baselines on the same scenes, backbone, training and evaluation.

    python experiments/baselines/run.py            # everything; finished runs are not run again
    python experiments/baselines/run.py collect    # the tables again, from whatever is finished

Writes results.csv (a row for each run) and results.md (the table) beside this file, from the metrics.json of each run
in runs/baselines/.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gm_mlic.bench.measure import interleaved
from gm_mlic.cli.bench import describe_machine
from gm_mlic.cli.compose import compose
from gm_mlic.cli.demo import detector_scores
from gm_mlic.cli.main import run as command
from gm_mlic.datasets.scenes import LABELS, Scenes
from gm_mlic.graphs import AssignmentBatch
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.training import build
from gm_mlic.training.run import build_module, split_data

HERE = Path(__file__).parent
RUNS = Path("runs/baselines")
SEEDS = (0, 1, 2)
#: The recipe of experiments/recipe, which GM-MLIC and mil_max were tuned with.
OURS = ("1e-3",)
#: What the others may choose from, by validation mAP with seed 0: theirs were made for other data and optimisers.
THEIRS = ("1e-3", "3e-3", "1e-2")
GRID = ["detector.grid=10", "detector.max_instances=100", "graph.m=100"]
BATCH, ROUNDS = 32, 15


@dataclass(frozen=True)
class Row:
    """A line of the table: what it is called, what it reads, what is set beside experiment=scenes, learning rates."""

    model: str
    reads: str
    overrides: list[str]
    rates: tuple[str, ...]


#: From the cheapest to the dearest. Widths are a matter of two cores: 64 is what gm_mlic_small has, too.
ROWS = {
    "mil_max": Row("max-pooled MIL", "boxes", ["model=mil_max"], OURS),
    "gm_mlic": Row("GM-MLIC", "boxes", [], OURS),
    "resnet101": Row("global pooling", "grid", ["baseline=resnet101"], THEIRS),
    "ml_gcn": Row("ML-GCN", "grid", ["baseline=ml_gcn"], THEIRS),
    "query2label": Row("Query2Label", "grid", ["baseline=query2label", "model.width=64"], THEIRS),
    "mil_max-grid": Row("max-pooled MIL", "grid", ["model=mil_max", *GRID], OURS),
    "ssgrl": Row("SSGRL", "grid", ["baseline=ssgrl", "model.width=256"], THEIRS),
    "gm_mlic-grid": Row("GM-MLIC", "grid", GRID, OURS),
}
#: Labels with a look of their own; those that share it with a label of another theme; twins, told apart by where they
#: stand.
KINDS = {
    "plain": [LABELS[4 * theme + place] for theme in range(4) for place in (0, 1)] + ["house", "moon"],
    "company": [LABELS[4 * theme + place] for theme in range(4) for place in (2, 3)],
    "spatial": ["gate", "hatch", "comet", "satellite"],
}
MEASURES = ("mAP", *KINDS)


def folder(name: str, rate: str, seed: int) -> Path:
    return RUNS / f"{name}-lr{rate}-{seed}"


def train(name: str, rate: str, seed: int) -> None:
    settings = ["experiment=scenes", *ROWS[name].overrides, f"optimizer.lr={rate}", f"seed={seed}"]
    code = command(["train", *settings, f"run_dir={folder(name, rate, seed)}"])
    if code:
        sys.exit(code)


def result(name: str, rate: str, seed: int) -> dict[str, Any] | None:
    file = folder(name, rate, seed) / "metrics.json"
    return json.loads(file.read_text()) if file.exists() else None


def best_rate(name: str) -> str:
    """The learning rate whose run with seed 0 has the best validation mAP, of those that are finished."""
    found = {rate: done["val"]["mAP"] for rate in ROWS[name].rates if (done := result(name, rate, 0))}
    return max(found, key=found.__getitem__, default=ROWS[name].rates[0])


def train_all() -> None:
    for name, row in ROWS.items():
        for rate in row.rates:
            train(name, rate, 0)
        for seed in SEEDS[1:]:
            train(name, best_rate(name), seed)


# Tables


def runs() -> Iterator[dict[str, Any]]:
    """A row for each finished run."""
    for name, row in ROWS.items():
        for rate in row.rates:
            for seed in SEEDS:
                if done := result(name, rate, seed):
                    yield {
                        "row": name,
                        "reads": row.reads,
                        "lr": rate,
                        "chosen": rate == best_rate(name),
                        "seed": seed,
                        "val_mAP": round(done["val"]["mAP"], 2),
                        **{measure: round(value, 2) for measure, value in measured(done["test"]).items()},
                        "parameters": done["model"]["parameters"],
                        "train_seconds": done["train_seconds"],
                    }


def measured(test: dict[str, Any]) -> dict[str, float]:
    """mAP, and the mean AP of each kind of label."""
    of = {kind: statistics.mean(test["AP"][label] for label in labels) for kind, labels in KINDS.items()}
    return {"mAP": float(test["mAP"]), **of}


def known() -> dict[str, dict[str, float]]:
    """What needs no training: the best that any method could reach, and the detector's own labels."""
    config = compose("train", ["experiment=scenes"])
    test = split_data(config, build.build_dataset(config, "test"), build.build_detector(config))
    assert isinstance(test.dataset, Scenes)
    assert test.store is not None
    found = {}
    all_scores = {"known limit": test.dataset.limit_scores, "detector's own labels": detector_scores(test.store)}
    for name, scores in all_scores.items():
        metrics = MultiLabelMetrics(len(LABELS), preset=config.metrics.preset)
        metrics.update(torch.from_numpy(scores).float(), torch.from_numpy(test.dataset.targets))
        values = metrics.compute()
        AP = dict(zip(LABELS, values["AP"].tolist(), strict=True))
        found[name] = measured({"mAP": values["mAP"], "AP": AP})
    return found


def network(config: DictConfig) -> tuple[torch.nn.Module, AssignmentBatch]:
    """The network of a row with random weights, and a batch of random instances of the size that it reads."""
    extractor = build.build_detector(config)
    module, graph = build_module(config, build.build_dataset(config, "train"), extractor)
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, BATCH, config.graph.m, 2, generator=generator) / 2
    batch = AssignmentBatch.build(
        x=torch.rand(BATCH, config.graph.m, extractor.feature_dim, generator=generator),
        box=torch.cat([corner, corner + size], dim=-1),
        mask=torch.ones(BATCH, config.graph.m, dtype=torch.bool),
        label_vectors=graph.label_vectors,
        neighbours=graph.neighbours if graph.instance_graph else None,
        label_graph=graph.label_graph,
    )
    return module.model.eval(), batch


def flops_of(model: torch.nn.Module, batch: AssignmentBatch) -> int:
    """Multiplications and additions of matrix products, all of them: fused kernels of attention are not counted."""
    model.requires_grad_(False)  # the counter stumbles over views of parameters otherwise
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


@torch.no_grad()
def costs() -> dict[str, tuple[int, float, float]]:
    """Of each row: parameters, GFLOPs for an image, images/s; of the network alone, without detector and backbone."""
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
            BATCH / timings[name].median,
        )
        for name, (model, _) in networks.items()
    }


def collect() -> None:
    rows = list(runs())
    if rows:
        with (HERE / "results.csv").open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    lines = [
        "| model | reads | lr | mAP | plain | company | spatial | parameters | GFLOPs per image | images/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, values in known().items():
        lines.append(f"| {name} | | | {' | '.join(f'{values[measure]:.1f}' for measure in MEASURES)} | | | |")
    cost = costs()
    for name, row in ROWS.items():
        of = [r for r in rows if r["row"] == name and r["chosen"]]
        if of:
            parameters, gflops, speed = cost[name]
            cells = [spread([r[measure] for r in of]) for measure in MEASURES]
            lines.append(
                f"| {row.model} | {row.reads} | {of[0]['lr']} | {' | '.join(cells)} | {parameters:,} | {gflops:.3g} | "
                f"{speed:,.0f} |"
            )
    machine = describe_machine("cpu")
    table = "\n".join(lines)
    print(table)
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    (HERE / "results.md").write_text(table + "\n")


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    if sys.argv[1:] != ["collect"]:
        train_all()
    collect()
