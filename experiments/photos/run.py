"""Real photos: GM-MLIC beside the detector whose boxes it reads. See README.md.

    python experiments/photos/run.py SHARED                  # everything; finished runs are not repeated
    python experiments/photos/run.py SHARED --only main      # one part: main, curve, m, k, coco, boxes, unseen
    python experiments/photos/run.py SHARED --select NAME    # cross-validation of one model on train and val
    python experiments/photos/run.py SHARED --report         # tables and figures of finished runs

SHARED holds data/voc2012-animals, data/coco-mini, data/glove and detector/nanodet.py (needs ncnn). Everything is
written to runs/photos/, tables and figures beside this file.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RUNS = Path("runs/photos")
SEEDS = range(5)
#: The labels with at least 10 training and 5 test photos; mAP is over these.
TWELVE = ["bottle", "car", "cat", "chair", "cow", "dog", "horse", "person", "pottedplant", "sheep", "sofa", "tvmonitor"]

#: What GM-MLIC adds to the paper, switched off.
PAPER = [
    "model.prior=false", "model.linear=false", "model.class_words=false", "model.components=null",
    "model.shrinkage=0", "model.pooling=max",
]  # fmt: skip
MIL = ["model=mil_max", "model.width=null", "model.prior=true", "model.linear=true"]
MIL += ["model.components=256", "model.shrinkage=30"]
ONE_VIEW = ["graph.views=1"]
#: Overrides of experiment=photos.
MODELS: dict[str, list[str]] = {
    "detector": ["model=detector_labels", *ONE_VIEW],
    "detector, 6 views": ["model=detector_labels"],
    "max-pooled": ["model=mil_max", *ONE_VIEW],
    "max-pooled, prior": [*MIL],
    "max-pooled, prior, one view": [*MIL, *ONE_VIEW],
    "logsumexp-pooled, prior": [*MIL, "model.pooling=logsumexp"],
    "paper, concat": ["model.fusion=concat", *PAPER, *ONE_VIEW],
    "paper, product": [*PAPER, *ONE_VIEW],
    "product, (a)": [*PAPER, *ONE_VIEW, "model.prior=true"],
    "product, (b)": [*PAPER, *ONE_VIEW, "model.class_words=true"],
    "product, (a) and (b)": [*PAPER, *ONE_VIEW, "model.prior=true", "model.class_words=true"],
    "GM-MLIC": [],
    "GM-MLIC, one view": [*ONE_VIEW],
    "w/o Gl": ["ablation=no_semantic"],
    "w/o Go": ["ablation=no_spatial"],
    "w/o ILM edges": ["ablation=no_matches"],
    "w/o prior": ["model.prior=false"],
    "w/o linear": ["model.linear=false"],
    "w/o holding back": ["model.shrinkage=0"],
}


# Data


def words(shared: Path) -> Path:
    """One table of word vectors for the labels of VOC and the classes of COCO."""
    file = RUNS / "words.npz"
    if not file.exists():
        voc, coco = (np.load(shared / "data/glove" / name) for name in ("voc2007.npz", "coco2014.npz"))
        table = dict(zip(map(str, voc["labels"]), voc["vectors"], strict=True))
        known = set(table)
        for name, vector in zip(map(str, coco["labels"]), coco["vectors"], strict=True):
            if name.replace(" ", "") not in known:
                table[name] = vector
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, labels=np.array(list(table)), vectors=np.stack(list(table.values())))
    return file


def photos(shared: Path) -> list[dict[str, str]]:
    with (shared / "data/voc2012-animals/labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_split(name: str, splits: dict[str, list[dict[str, str]]]) -> list[str]:
    """Annotation files of a split of the photos, and the overrides that read them."""
    folder = RUNS / "splits"
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, rows in splits.items():
        files[split] = (folder / f"{name}-{split}.csv").absolute()
        with files[split].open("w", newline="") as out:
            writer = csv.DictWriter(out, ["file", "labels"], extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return ["dataset.annotations={" + ",".join(f"{split}: {file}" for split, file in files.items()) + "}"]


def voc(shared: Path, *, size: int | None = None, seed: int = 0, fold: int | None = None) -> list[str]:
    """Overrides: the photos with their own split, a sample of the training photos, or a fold of train and val."""
    rows = photos(shared)
    parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")}
    labels = sorted({label for row in rows for label in row["labels"].split(";") if label})
    base = [
        "dataset=custom",
        f"dataset.root={shared.absolute()}/data/voc2012-animals",
        f"dataset.labels=[{','.join(labels)}]",
    ]
    if size is not None:
        order = np.random.default_rng(seed).permutation(len(parts["train"]))[:size]
        parts["train"] = [parts["train"][i] for i in np.sort(order)]
        return [*base, *write_split(f"{size}-{seed}", parts)]
    if fold is not None:
        both = parts["train"] + parts["val"]
        of = np.random.default_rng(seed).permutation(len(both)) % 5
        rest = [row for row, f in zip(both, of, strict=True) if f != fold]
        held_out = [row for row, f in zip(both, of, strict=True) if f == fold]
        parts = {"train": rest[20:], "val": rest[:20], "test": held_out}
        return [*base, *write_split(f"fold-{seed}-{fold}", parts)]
    return base


class Cached:
    """An extractor that keeps the instances of each image it has seen in files."""

    def __init__(self, extractor: Any, folder: Path, m: int = 35) -> None:
        self.extractor, self.folder, self.m = extractor, folder, m
        self.name, self.labels, self.feature_dim = extractor.name, extractor.labels, extractor.feature_dim
        self.fingerprint = extractor.fingerprint
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, images: Sequence[Any], m: int) -> list[Any]:
        return [self._one(image).top(m) for image in images]

    def _one(self, image: Any) -> Any:
        import torch

        from gm_mlic import Instances

        content = (image * 255).round().to(torch.uint8).contiguous().numpy()
        digest = hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()
        file = self.folder / digest[:2] / f"{digest[2:]}.npz"
        if not file.exists():
            (found,) = self.extractor([image], self.m)
            file.parent.mkdir(exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.npz")
            np.savez(
                part,
                boxes=found.boxes.numpy(),
                scores=found.scores.numpy(),
                labels=found.detected_labels.numpy(),
                features=found.features.numpy().astype(np.float16),
            )
            part.replace(file)
        with np.load(file) as z:
            boxes, scores, labels, features = (
                torch.from_numpy(z[k]) for k in ("boxes", "scores", "labels", "features")
            )
        return Instances(boxes, scores, labels, features.float())


def detector(shared: Path) -> Cached:
    spec = importlib.util.spec_from_file_location("nanodet", shared / "detector/nanodet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # imports ncnn, which has to come before torch
    return Cached(module.NanoDet(), RUNS / "cache")


# Runs


def train(shared: Path, extractor: Cached, name: str, data: list[str], overrides: list[str], seed: int) -> Path:
    """Train and test one model, unless it is finished; returns its run folder."""
    from gm_mlic.cli.compose import compose
    from gm_mlic.training.run import train as run

    part, _, rest = name.partition("/")
    run_dir = RUNS / part / f"{re.sub(r'[^a-zA-Z0-9.]+', '_', rest).strip('_')}-{seed}"
    if not (run_dir / "metrics.json").exists():
        settings = ["experiment=photos", *data, "embedding=glove", f"embedding.path={words(shared)}"]
        settings += [f"instances.root={RUNS / 'stores'}", *overrides, f"seed={seed}", f"run_dir={run_dir}"]
        run(compose("train", settings), command=f"gm-mlic train {' '.join(settings)}", extractor=extractor)
    return run_dir


def result(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return content


def twelve(run_dir: Path) -> float:
    """Test mAP over the twelve labels."""
    of = result(run_dir)["test"]["AP"]
    return float(np.mean([of[label] for label in TWELVE]))


def select(shared: Path, name: str, overrides: list[str], partitions: Sequence[int] = (0,)) -> None:
    """Cross-validation on the training and val photos: mean AP of the held-out fold."""
    extractor = detector(shared)
    values = []
    for seed in partitions:
        for fold in range(5):
            run_dir = train(
                shared, extractor, f"select/{name}-{fold}", voc(shared, seed=seed, fold=fold), overrides, seed
            )
            values.append(twelve(run_dir))
            print(name, seed, fold, round(values[-1], 2), flush=True)
    print(f"{name}: {np.mean(values):.2f}", [round(v, 2) for v in values], flush=True)


def parts(shared: Path) -> Iterator[tuple[str, str, list[str], list[str], int]]:
    """All training runs: part, name, data, overrides and seed."""
    for seed in SEEDS:
        for name, overrides in MODELS.items():
            yield "main", name, voc(shared), overrides, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--select")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.select:
        select(arguments.shared, arguments.select, MODELS.get(arguments.select, []) + arguments.overrides)
        return
    extractor = detector(arguments.shared)
    for part, name, data, overrides, seed in parts(arguments.shared):
        if arguments.only in (None, part):
            run_dir = train(arguments.shared, extractor, f"{part}/{name}", data, overrides, seed)
            print(part, name, seed, round(twelve(run_dir), 2), flush=True)


if __name__ == "__main__":
    sys.exit(main())
