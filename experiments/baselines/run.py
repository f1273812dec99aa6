"""GM-MLIC and published baselines on the same images, backbone, training and evaluation. See README.md.

    python experiments/baselines/run.py scenes                              # all rows; finished runs are not repeated
    python experiments/baselines/run.py scenes --only ml_gcn gm_mlic        # some rows
    python experiments/baselines/run.py animals --shared SHARED             # real photos
    python experiments/baselines/run.py scenes --collect                    # only the table, from finished runs
    python experiments/baselines/run.py scenes --only ml_gcn --override trainer.max_epochs=1     # a trial

scenes.csv and animals.csv have a row per finished run; delete a row to repeat the run. scenes.md and animals.md are the
tables, scenes.png and animals.png the figures. Runs and instance stores are in runs/baselines/ of the current folder,
and so are all results of a trial. Several processes may train different rows. SHARED contains data/voc2012-animals,
data/glove and detector/nanodet.py, which needs ncnn.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

with contextlib.suppress(ImportError):
    import ncnn  # noqa: F401 - before torch: each has an OpenMP runtime

import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from omegaconf import DictConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from gm_mlic.bench.measure import FlopCounter, interleaved
from gm_mlic.cli.bench import describe_machine
from gm_mlic.cli.compose import compose
from gm_mlic.cli.main import run as command
from gm_mlic.datasets.scenes import LABELS, Scenes
from gm_mlic.graphs import AssignmentBatch
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.reporting.report import read_paper
from gm_mlic.training import build
from gm_mlic.training.run import build_module

HERE = Path(__file__).parent
RUNS = Path("runs/baselines")
SEEDS = (0, 1, 2)
#: Learning rates. Those of RATES are candidates of every model, selected by validation mAP with seed 0. While the best
#: one is the largest or smallest that was tried, the next one is tried too.
LADDER = ("1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2", "1e-1", "3e-1", "1", "3", "10", "30", "100")
RATES = ("3e-4", "1e-3", "3e-3", "1e-2")
BATCH, ROUNDS = 32, 15
#: Data sets of the paper's mAPs.
PAPER = {"voc2007": "VOC 2007", "coco2014": "MS-COCO", "nuswide": "NUS-WIDE"}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: its name.
        model: registered name of the model.
        input: ``boxes`` or ``grid``.
        settings: overrides of the data set's settings.
    """

    title: str
    model: str
    input: str
    settings: Sequence[str] = ()


#: Widths suit two cores; 64 is also that of gm_mlic_small.
ROWS = {
    "detector_labels": Row("detector's own labels", "detector_labels", "boxes"),
    "mil_max": Row("max-pooled MIL (HCP)", "mil_max", "boxes"),
    "gm_mlic": Row("GM-MLIC", "gm_mlic", "boxes", ["model=gm_mlic_small"]),
    "gm_mlic-prior": Row("GM-MLIC, detector as prior", "gm_mlic", "boxes", ["model=gm_mlic_photos"]),
    "gap_linear": Row("global pooling (ResNet-101)", "gap_linear", "grid"),
    "gap_linear-asl": Row("global pooling, asymmetric loss (ASL)", "gap_linear", "grid", ["loss=asymmetric"]),
    "ml_gcn": Row("ML-GCN", "ml_gcn", "grid"),
    "cma": Row("CMA", "cma", "grid"),
    "add_gcn": Row("ADD-GCN", "add_gcn", "grid", ["model.width=256"]),
    "tsgcn": Row("TSGCN", "tsgcn", "grid", ["model.width=256"]),
    "query2label": Row("Query2Label", "query2label", "grid", ["model.width=64"]),
    "ml_decoder": Row("ML-Decoder", "ml_decoder", "grid", ["model.width=64", "model.hidden=256"]),
    "ml_decoder-asl": Row(
        "ML-Decoder, asymmetric loss", "ml_decoder", "grid", ["model.width=64", "model.hidden=256", "loss=asymmetric"]
    ),
    "c_tran": Row("C-Tran", "c_tran", "grid", ["model.width=64"]),
    "cnn_rnn": Row("CNN-RNN", "cnn_rnn", "grid"),
    "pla": Row("PLA", "pla", "grid", ["model.width=64", "model.hidden=256"]),
    "rnn_attention": Row("RNN-Attention", "rnn_attention", "grid", ["model.width=128", "model.map_size={grid}"]),
    "kd_wsd": Row("MLIC-KD-WSD", "kd_wsd", "grid", ["model.width=256", "model.map_size={grid}"]),
    "srn": Row("SRN", "srn", "grid", ["model.width=128", "model.map_size={grid}"]),
    "tdrg": Row("TDRG", "tdrg", "grid", ["model.width=64", "model.hidden=256", "model.map_size={grid}"]),
    "ssgrl": Row("SSGRL", "ssgrl", "grid", ["model.width=256"]),
    "mil_max-grid": Row("max-pooled MIL", "mil_max", "grid", ["model.components={dim}"]),
    "gm_mlic-grid": Row("GM-MLIC", "gm_mlic", "grid", ["model=gm_mlic_small", "model.components={dim}"]),
}
#: Labels with a unique appearance; labels that differ from a label of another theme only by context; labels that
#: differ only by their position relative to an anchor object.
KINDS = {
    "plain": [LABELS[4 * theme + place] for theme in range(4) for place in (0, 1)] + ["house", "moon"],
    "context": [LABELS[4 * theme + place] for theme in range(4) for place in (2, 3)],
    "spatial": ["gate", "hatch", "comet", "satellite"],
}
#: The labels of animals with at least 10 training and 5 test photos.
TWELVE = ["bottle", "car", "cat", "chair", "cow", "dog", "horse", "person", "pottedplant", "sheep", "sofa", "tvmonitor"]


def of_scenes(test: dict[str, Any]) -> dict[str, float]:
    """mAP, and the mean AP of each kind of label."""
    of = {kind: statistics.mean(test["AP"][label] for label in labels) for kind, labels in KINDS.items()}
    return {"mAP": float(test["mAP"]), **of}


def of_animals(test: dict[str, Any]) -> dict[str, float]:
    """Mean AP over the twelve labels, and F1 over all labels."""
    known = [test["AP"][label] for label in TWELVE if test["AP"].get(label) is not None]  # fewer in a trial
    return {"mAP12": statistics.mean(known), "CF1": float(test["CF1"]), "OF1": float(test["OF1"])}


@dataclass(frozen=True)
class Data:
    """A data set and its backbone.

    Attributes:
        name: name of its files.
        settings: its overrides.
        boxes, grid: overrides of a model on boxes, on a grid.
        grid_size: cells along each side.
        grid_dim: features of a cell.
        measure: the measures of a table, from those of a split.
    """

    name: str
    settings: list[str]
    boxes: list[str]
    grid: list[str]
    grid_size: int
    grid_dim: int
    measure: Callable[[dict[str, Any]], dict[str, float]]

    def of(self, row: Row) -> list[str]:
        """Overrides of a row."""
        model = [setting.format(grid=self.grid_size, dim=self.grid_dim) for setting in row.settings]
        chosen = [] if any(setting.startswith("model=") for setting in model) else [f"model={row.model}"]
        given = self.boxes if row.input == "boxes" else [*self.grid, f"detector.grid_size={self.grid_size}"]
        return [*self.settings, *given, *chosen, *model]


def scenes() -> Data:
    return Data("scenes", ["experiment=scenes"], [], [], 10, 48, of_scenes)


def animals(shared: Path) -> Data:
    """The photos of experiments/photos, in one view, with NanoDet's boxes or its features at the cells of a grid."""
    sys.path[:0] = map(str, (shared / "detector", HERE, HERE.parent / "photos"))
    settings = [
        "experiment=photos",
        f"dataset.root={shared.absolute()}/data/voc2012-animals",
        f"embedding.path={shared.absolute()}/data/glove/voc2007.npz",
        f"instances.root={RUNS / 'stores'}",
        "graph.views=1",
        "trainer.checkpoint=best",
    ]
    plugin = "plugins=[nanodet_plugin]", "plugins=[nanodet_grid]"
    boxes, grid = ([plugin[0], "detector=nanodet"], [plugin[1], "detector=nanodet_grid"])
    return Data("animals", settings, boxes, grid, 7, 752, of_animals)


# Runs


@dataclass(frozen=True)
class Study:
    """The runs of a data set.

    Attributes:
        data: the data set.
        changed: changed settings, of a trial.
    """

    data: Data
    changed: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        return RUNS / "trial" if self.changed else HERE

    @property
    def results(self) -> Path:
        return self.folder / f"{self.data.name}.csv"

    def settings(self, name: str) -> list[str]:
        return [*self.data.of(ROWS[name]), *self.changed]

    def read(self) -> list[dict[str, Any]]:
        """The finished runs."""
        return list(csv.DictReader(self.results.open())) if self.results.exists() else []

    def train(self, name: str, rate: str, seed: int) -> None:
        """Train and test, unless the run is finished; an interrupted run resumes."""
        if any((found["row"], found["lr"], found["seed"]) == (name, rate, str(seed)) for found in self.read()):
            return
        run_dir = RUNS / ("trial" if self.changed else "") / f"{self.data.name}-{name}-lr{rate}-{seed}"
        run = [f"optimizer.lr={rate}", f"seed={seed}", f"run_dir={run_dir}"]
        code = command(["train", *self.settings(name), *run])
        if code:
            sys.exit(code)
        done = json.loads((run_dir / "metrics.json").read_text())
        measures = self.data.measure(done["test"])
        row = {
            "row": name,
            "lr": rate,
            "seed": seed,
            "val_mAP": round(done["val"]["mAP"], 2),
            **{measure: round(value, 2) for measure, value in measures.items()},
            "parameters": done["model"]["parameters"],
            "train_seconds": done["train_seconds"],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.results.open("a", newline="") as out:  # other processes may append too
            writer = csv.DictWriter(out, row.keys(), lineterminator="\n")
            if out.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def tried(self, name: str) -> dict[str, float]:
        """Validation mAP of finished runs with seed 0, by ascending learning rate."""
        found = {r["lr"]: float(r["val_mAP"]) for r in self.read() if (r["row"], r["seed"]) == (name, "0")}
        return {rate: found[rate] for rate in LADDER if rate in found}

    def best_rate(self, name: str) -> str:
        """The learning rate with the best validation mAP; of equal ones, the smallest."""
        tried = self.tried(name)
        return max(tried, key=tried.__getitem__)

    def next_rate(self, name: str) -> str | None:
        """The rate beyond the best one, if that is the largest or smallest tried; None if it is neither."""
        tried, best = self.tried(name), self.best_rate(name)
        first, *_, last = tried
        beyond = LADDER.index(best) + {first: -1, last: 1}.get(best, 0)
        is_new = 0 <= beyond < len(LADDER) and LADDER[beyond] not in tried
        return LADDER[beyond] if is_new and len(set(tried.values())) > 1 else None

    def train_all(self, names: Iterable[str]) -> None:
        for name in names:
            for rate in RATES:
                self.train(name, rate, 0)
            while rate := self.next_rate(name):
                self.train(name, rate, 0)
            for seed in SEEDS[1:]:
                self.train(name, self.best_rate(name), seed)


# Tables


def known_limit() -> dict[str, float]:
    """The limit of any method on the test scenes."""
    config = compose("train", ["experiment=scenes"])
    test = build.build_dataset(config, "test")
    assert isinstance(test, Scenes)
    metrics = MultiLabelMetrics(len(LABELS), convention=config.metrics.convention)
    metrics.update(torch.from_numpy(test.limit_scores).float(), torch.from_numpy(test.targets))
    values = metrics.compute()
    return of_scenes({"mAP": values["mAP"], "AP": dict(zip(LABELS, values["AP"].tolist(), strict=True))})


def network(config: DictConfig) -> tuple[torch.nn.Module, AssignmentBatch]:
    """The network of a row with random weights, and a batch of random instances of matching sizes."""
    extractor = build.build_detector(config)
    module, graph, _ = build_module(config, build.build_dataset(config, "train"), extractor)
    generator = torch.Generator().manual_seed(0)
    m = config.graph.m
    box = grid_boxes(config.detector.grid_size) if config.detector.get("grid_size") else torch.tensor([[0, 0, 1, 1]])
    batch = AssignmentBatch.from_padded(
        x=torch.rand(BATCH, m, extractor.feature_dim, generator=generator),
        box=box.float().expand(BATCH, m, 4),
        mask=torch.ones(BATCH, m, dtype=torch.bool),
        label_vectors=graph.label_vectors,
        num_neighbors=graph.num_neighbors,
        edge_types=graph.edge_types,
        score=torch.rand(BATCH, m, generator=generator),
        detected_label=torch.zeros(BATCH, m, dtype=torch.int64),
    )
    confidence = torch.rand(BATCH, m, batch.num_labels, generator=generator)  # used by the detector as prior
    batch = replace(batch, confidence=confidence, label_counts=torch.ones(batch.num_labels))
    return module.model.eval(), batch


def grid_boxes(size: int) -> torch.Tensor:
    """Boxes (G * G, 4) of the cells of a grid."""
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    corner = torch.stack([column, row], dim=-1).view(-1, 2)
    return torch.cat([corner, corner + 1], dim=1) / size


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
def costs(study: Study, names: Sequence[str]) -> dict[str, tuple[int, float, float]]:
    """Parameters, GFLOPs per image and images/s of each network, without detector and backbone."""
    small = ["dataset.sizes.train=64"] if study.data.name == "scenes" else []
    networks = {name: network(compose("train", [*study.settings(name), *small])) for name in names}
    flops = {name: flops_of(model, batch) for name, (model, batch) in networks.items()}
    timings = interleaved(
        {name: lambda model=model, batch=batch: model(batch) for name, (model, batch) in networks.items()}, ROUNDS
    )
    return {
        name: (
            sum(p.numel() for p in model.parameters()),
            flops[name] / BATCH / 1e9,
            BATCH / min(timings[name]),  # the round that other processes disturbed least
        )
        for name, (model, _) in networks.items()
    }


def printed_in_the_paper() -> dict[str, list[str]]:
    """The paper's printed mAP of each model on the data sets of PAPER; empty where it has none."""
    paper = read_paper()
    found = {}
    for system, models in paper["models"].items():
        values = [paper[data]["rows"].get(system) for data in PAPER]
        columns = [[name for part in paper[data]["columns"] for name in part] for data in PAPER]
        cells = [v[c.index("mAP")] if v else None for v, c in zip(values, columns, strict=True)]
        found[models[0]] = ["" if cell is None else f"{cell:.1f}" for cell in cells]
    return found


def collect(study: Study) -> None:
    """Print and write the table of finished runs."""
    runs = study.read()
    if not runs:
        return
    names = [name for name in ROWS if any(run["row"] == name for run in runs)]
    measures = [key for key in runs[0] if key not in ("row", "lr", "seed", "val_mAP", "parameters", "train_seconds")]
    head = [
        "model", "input", "rates", "lr", "seeds", *measures,
        "parameters", "GFLOPs per image", "images/s", "training, minutes",
        *(f"{title}, paper" for title in PAPER.values()),
    ]  # fmt: skip
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    if study.data.name == "scenes":
        limit = [f"{value:.1f}" for value in known_limit().values()]
        lines.append(["upper bound", "", "", "", "", *limit, *[""] * (4 + len(PAPER))])
    cost, printed = costs(study, names), printed_in_the_paper()
    for name in names:
        row = ROWS[name]
        rates = str(len(study.tried(name)))
        of = [run for run in runs if run["row"] == name and run["lr"] == study.best_rate(name)]
        parameters, gflops, speed = cost[name]
        spread = [mean_and_std([float(run[measure]) for run in of]) for measure in measures]
        minutes = statistics.median(float(run["train_seconds"]) for run in of) / 60
        sizes = [f"{parameters:,}", f"{gflops:.3g}", f"{speed:,.0f}", f"{minutes:.1f}"]
        theirs = printed.pop(row.model, [""] * len(PAPER))  # in the first row of the model
        lines.append([row.title, row.input, rates, f"{float(of[0]['lr']):g}", str(len(of)), *spread, *sizes, *theirs])
    table = "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |").replace("|  |", "| |") for line in lines)
    machine = describe_machine("cpu")
    print(table)
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    (study.folder / f"{study.data.name}.md").write_text(table)
    draw(study, measures, study.folder / f"{study.data.name}.png")


def draw(study: Study, measures: Sequence[str], path: Path) -> None:
    """Each measure of each row: a dot for a seed, a line for the mean."""
    names = [name for name in ROWS if study.tried(name)]
    figure, axes = plt.subplots(
        1, len(measures), figsize=(2.2 * len(measures) + 2, 0.24 * len(names) + 1), layout="constrained", sharey=True
    )
    colors = {"boxes": "tab:blue", "grid": "tab:orange"}
    for axis, measure in zip(axes, measures, strict=True):
        for y, name in enumerate(names):
            runs = [run for run in study.read() if run["row"] == name and run["lr"] == study.best_rate(name)]
            values, color = [float(run[measure]) for run in runs], colors[ROWS[name].input]
            axis.plot(values, [y] * len(values), "o", color=color, alpha=0.5, markersize=4)
            axis.plot([statistics.mean(values)] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2)
        axis.set_title(measure, fontsize=10)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(names)), [ROWS[name].title for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    handles = [Line2D([], [], marker="o", color=color, label=f"on {kind}") for kind, color in colors.items()]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def mean_and_std(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    mean, no_break = f"{statistics.mean(values):.1f}", "\u00a0"
    return f"{mean}{no_break}±{no_break}{statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("scenes", "animals"))
    parser.add_argument("--shared", type=Path, help="folder of photos, word vectors and detector (animals)")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="default: all rows")
    parser.add_argument("--collect", action="store_true", help="train nothing")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="changed settings, for a trial")
    given = parser.parse_args()
    if given.data == "animals" and given.shared is None:
        parser.error("animals needs --shared SHARED")
    study = Study(scenes() if given.data == "scenes" else animals(given.shared), given.override)
    if not given.collect:
        study.train_all(given.only)
    collect(study)


if __name__ == "__main__":
    main()
