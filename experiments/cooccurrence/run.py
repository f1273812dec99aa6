"""Gain of graphs on real co-occurrence: label sets of COCO, simulated instances; see README.md.

    python experiments/cooccurrence/run.py LABELS GLOVE [--jobs N]      # everything; finished runs are not repeated
    python experiments/cooccurrence/run.py LABELS GLOVE --tune          # learning rates, on validation images

LABELS is an .npz with ``labels`` (C,), ``train`` and ``val``, (N, ceil(C / 8)) bits of ``numpy.packbits``; GLOVE is
an .npz with ``labels`` and ``vectors`` (C, D), in the same order.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from gm_mlic import create_model
from gm_mlic.graphs import RELATIONS, AssignmentBatch, AssignmentBatchDataset, AssignmentGraph
from gm_mlic.losses import WeightedBCE
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.nn import ModelOutput

HERE = Path(__file__).parent
FEATURE, M, NEIGHBORS = 64, 12, 10
SIZES = {"train": 4000, "val": 1000, "test": 4000}
EPOCHS, BATCH = 10, 32
#: Learning rate of each model, the best of --tune.
RATES = {"mil_max": 3e-4, "mil_max+labels": 1e-3, "gm_mlic": 3e-3, "gm_mlic w/o Gl": 3e-3}


@dataclass(frozen=True)
class World:
    """Parameters of the simulated instances.

    Attributes:
        noise: norm of the noise on a feature; the prototypes of the classes have norm 1.
        miss: probability that the instances of a label are not detected.
        false: expected number of instances of absent classes.
    """

    noise: float = 1.0
    miss: float = 0.2
    false: float = 2.0


#: Varied parameters and their values; the others have the defaults of World().
PARAMETERS = {"noise": (0.5, 1.0, 1.5), "miss": (0.2, 0.4), "false": (2.0, 5.0)}
MODELS = ("mil_max", "mil_max+labels", "gm_mlic")
SEEDS = (0, 1)
#: Trained with default parameters only, with more seeds, because the difference from the full model is small.
ABLATION = "gm_mlic w/o Gl"
ABLATION_SEEDS = (0, 1, 2, 3, 4)


def simulate(present: np.ndarray, world: World, prototypes: np.ndarray, rng: np.random.Generator) -> SimpleNamespace:
    """An instance store in memory for label sets ``present`` (N, C): input of :class:`AssignmentBatchDataset`."""
    N, C = present.shape
    frequency = present.mean(axis=0) / present.mean(axis=0).sum()
    features = np.zeros((N, 1, M, FEATURE), dtype=np.float32)
    boxes = np.zeros((N, 1, M, 4), dtype=np.float32)
    counts = np.zeros((N, 1), dtype=np.int64)
    for image in range(N):
        labels = np.flatnonzero(present[image])
        detected = labels[rng.random(len(labels)) >= world.miss]
        seen = np.repeat(detected, 1 + rng.poisson(0.5, size=len(detected)))
        wrong = rng.choice(C, size=rng.poisson(world.false), p=frequency)
        classes = np.concatenate([seen, wrong[~present[image, wrong]]])
        if len(classes) == 0:  # an image has at least one instance
            classes = rng.choice(C, size=1, p=frequency)
        classes = rng.permutation(classes)[:M]
        count = counts[image, 0] = len(classes)
        noise = rng.normal(size=(count, FEATURE)) * world.noise / np.sqrt(FEATURE)
        features[image, 0, :count] = prototypes[classes] + noise
        corner = rng.uniform(0, 0.7, size=(count, 2))
        boxes[image, 0, :count] = np.concatenate([corner, corner + rng.uniform(0.1, 0.3, size=(count, 2))], axis=1)
    return SimpleNamespace(
        features=features * np.sqrt(FEATURE),  # entries of unit variance
        boxes=boxes,
        scores=np.ones((N, 1, M), dtype=np.float32),
        detected_labels=np.zeros((N, 1, M), dtype=np.int64),
        counts=counts,
        targets=present.astype(np.int8),
        difficult=None,
        rows=np.arange(N),
    )


class PooledLabels(nn.Module):
    """The max-pooled classifier and an MLP on its C label logits: co-occurrence without a graph."""

    def __init__(self, num_labels: int, width: int = 256) -> None:
        super().__init__()
        self.instances = create_model("mil_max", instance_dim=FEATURE, num_labels=num_labels, width=512)
        self.labels = nn.Sequential(nn.Linear(num_labels, width), nn.ReLU(), nn.Linear(width, num_labels))
        nn.init.zeros_(self.labels[-1].weight)  # initially equal to the max-pooled classifier
        nn.init.zeros_(self.labels[-1].bias)

    def forward(self, data: AssignmentBatch) -> ModelOutput:
        out: ModelOutput = self.instances(data)
        return replace(out, logits=out.logits + self.labels(out.logits))


def edge_types(model: str) -> tuple[str, ...]:
    return tuple(name for name in RELATIONS if name != "semantic" or model != ABLATION)


def build(model: str, num_labels: int, label_dim: int) -> nn.Module:
    if model == "mil_max":
        return create_model("mil_max", instance_dim=FEATURE, num_labels=num_labels, width=512)
    if model == "mil_max+labels":
        return PooledLabels(num_labels)
    return create_model(
        "gm_mlic", instance_dim=FEATURE, label_dim=label_dim, k=2, widths=(64, 64), edge_types=edge_types(model)
    )


def loader(data: AssignmentBatchDataset, generator: torch.Generator | None = None) -> DataLoader[AssignmentBatch]:
    order = None if generator is None else RandomSampler(data, generator=generator)
    return DataLoader(data, BATCH, sampler=order, collate_fn=AssignmentBatchDataset.collate)


def train(
    model: str, world: World, seed: int, files: tuple[str, str], tested: str = "test", lr: float | None = None
) -> dict[str, float]:
    """Train one model, and return its metrics on the split ``tested``."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    begin = time.perf_counter()
    splits, vectors = read(files, seed)
    rng = np.random.default_rng([seed, 1])
    C = splits["train"].shape[1]
    prototypes = rng.normal(size=(C, FEATURE)) / np.sqrt(FEATURE)
    graph = AssignmentGraph(vectors, m=M, num_label_neighbors=NEIGHBORS, edge_types=edge_types(model))
    data = {
        split: AssignmentBatchDataset(simulate(splits[split], world, prototypes, rng), graph)
        for split in ("train", tested)
    }
    network = build(model, C, vectors.shape[1])
    lr = RATES[model] if lr is None else lr
    loss_of = WeightedBCE(torch.from_numpy(splits["train"].mean(axis=0)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-4)
    steps = EPOCHS * -(-SIZES["train"] // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for batch in loader(data["train"], order):
            optimizer.zero_grad()
            loss_of(network(batch).logits, batch.y).backward()
            optimizer.step()
            schedule.step()
    metrics = MultiLabelMetrics(C)
    network.eval()
    with torch.no_grad():
        for batch in loader(data[tested]):
            metrics.update(network(batch).logits.sigmoid(), batch.y)
    values = metrics.compute()
    figures = {key: round(float(values[key]), 2) for key in ("mAP", "CF1", "OF1")}
    return figures | {"seconds": round(time.perf_counter() - begin)}


def read(files: tuple[str, str], seed: int) -> tuple[dict[str, np.ndarray], Tensor]:
    """Label sets (N, C) of a seed's images for each split, and the label vectors."""
    labels, glove = (np.load(file) for file in files)
    assert labels["labels"].tolist() == glove["labels"].tolist()
    C = len(labels["labels"])
    rng = np.random.default_rng([seed, 0])
    train = rng.permutation(labels["train"])[: SIZES["train"] + SIZES["val"]]
    bits = {
        "train": train[: SIZES["train"]],
        "val": train[SIZES["train"] :],
        "test": rng.permutation(labels["val"])[: SIZES["test"]],
    }
    splits = {split: np.unpackbits(rows, axis=1, count=C).astype(bool) for split, rows in bits.items()}
    return splits, torch.from_numpy(glove["vectors"]).float()


def worlds() -> list[World]:
    """All settings of the simulation."""
    return list(
        dict.fromkeys(
            replace(World(), **{parameter: value}) for parameter, values in PARAMETERS.items() for value in values
        )
    )


def main(files: tuple[str, str], jobs: int) -> None:
    path = HERE / "results.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(r["model"], r["noise"], r["miss"], r["false"], r["seed"]) for r in rows}
    wanted = [(model, World(), seed) for seed in ABLATION_SEEDS for model in ("gm_mlic", ABLATION)]
    wanted += [(model, world, seed) for seed, world, model in itertools.product(SEEDS, worlds(), MODELS)]
    todo = [
        (model, world, seed)
        for model, world, seed in dict.fromkeys(wanted)
        if (model, *map(str, asdict(world).values()), str(seed)) not in done
    ]
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(train, model, world, seed, files): (model, world, seed) for model, world, seed in todo}
        for number, future in enumerate(as_completed(futures), 1):
            model, world, seed = futures[future]
            rows.append({"model": model, **asdict(world), "seed": seed, **future.result()})
            write(rows, path)
            print(f"{number}/{len(todo)}", rows[-1], flush=True)
    print_table(list(csv.DictReader(path.open())))


def write(rows: list[dict], path: Path) -> None:
    def place(row: dict) -> tuple:
        return (
            float(row["noise"]),
            float(row["miss"]),
            float(row["false"]),
            (*MODELS, ABLATION).index(row["model"]),
            int(row["seed"]),
        )

    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=place))


def print_table(rows: list[dict]) -> None:
    """Print the table and draw the figure of README.md."""
    figure, axes = plt.subplots(1, len(PARAMETERS), figsize=(11, 3.4), sharey=True, layout="constrained")
    for axis, (parameter, values) in zip(axes, PARAMETERS.items(), strict=True):
        for model, color in zip(MODELS, ("#777777", "#c25b00", "#3b7dd8"), strict=True):
            points = [of(rows, model, replace(World(), **{parameter: value})) for value in values]
            mean = [statistics.mean(p.values()) for p in points]
            spread = [statistics.stdev(p.values()) if len(p) > 1 else 0.0 for p in points]
            axis.errorbar(values, mean, spread, fmt="o-", capsize=3, color=color, label=model)
        axis.set_xlabel(parameter)
        axis.set_xticks(values)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test mAP, %")
    axes[0].legend()
    figure.savefig(HERE / "results.png", dpi=130)
    print("| noise | miss | false | max-pooled | + labels | GM-MLIC | gain over max-pooled | over + labels |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for world in worlds():
        pooled, labels, graphs = (of(rows, model, world) for model in MODELS)
        gains = [[graphs[seed] - other[seed] for seed in graphs if seed in other] for other in (pooled, labels)]
        cells = [mean_and_std(list(p.values())) for p in (pooled, labels, graphs)] + [
            mean_and_std(gain) for gain in gains
        ]
        print(f"| {world.noise} | {world.miss} | {world.false} | {' | '.join(cells)} |")
    full, ablated = of(rows, "gm_mlic", World()), of(rows, ABLATION, World())
    lost = [full[seed] - ablated[seed] for seed in ablated]
    print(f"w/o Gl: {mean_and_std(list(ablated.values()))}, gain of full {mean_and_std(lost)}")


def of(rows: list[dict], model: str, world: World) -> dict[str, float]:
    """Seed to mAP."""
    key = (model, *map(str, asdict(world).values()))
    return {r["seed"]: float(r["mAP"]) for r in rows if (r["model"], r["noise"], r["miss"], r["false"]) == key}


def mean_and_std(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def tune(files: tuple[str, str], jobs: int) -> None:
    """Validation mAP of each model at several learning rates, with default parameters."""
    with ProcessPoolExecutor(jobs) as pool:
        trials = {
            (model, lr): pool.submit(train, model, World(), 0, files, "val", lr)
            for model in MODELS
            for lr in (3e-4, 1e-3, 3e-3)
        }
        for (model, lr), trial in trials.items():
            print(f"{model:16s} lr {lr:.0e}  {trial.result()}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels")
    parser.add_argument("glove")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tune", action="store_true")
    given = parser.parse_args()
    (tune if given.tune else main)((given.labels, given.glove), given.jobs)
