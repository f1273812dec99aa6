"""Real photos: GM-MLIC beside the detector whose boxes it reads. See README.md.

    python experiments/photos/run.py SHARED                   # everything; finished runs are not repeated
    python experiments/photos/run.py SHARED --only main m     # some parts; also --models and --seeds
    python experiments/photos/run.py SHARED --select NAME     # cross-validation of one model on train and val
    python experiments/photos/run.py SHARED --select NAME --folds 0 --train 50 --seeds 0 1 2   # few training photos
    python experiments/photos/run.py SHARED --report          # tables and figures of finished runs

Parts: main, curve, m, k, coco, unseen, oracle, boxes. SHARED holds data/voc2012-animals, data/coco-mini, data/glove and
detector/nanodet.py (needs ncnn); a model of open_labels is read from ../open_labels. Runs are written to runs/photos/
in the current folder, tables and figures beside this file.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
RUNS = Path("runs/photos")
SEEDS = range(5)
#: The labels with at least 10 training and 5 test photos; mAP is over these.
TWELVE = ["bottle", "car", "cat", "chair", "cow", "dog", "horse", "person", "pottedplant", "sheep", "sofa", "tvmonitor"]

#: The network of the paper, narrow (k = 2, width 64), tested at its best epoch on val.
PAPER = ["model=gm_mlic_small", "trainer.checkpoint=best"]
MIL = ["model=mil_max", "model.width=null", "model.prior=true", "model.linear=true"]
MIL += ["model.components=256", "model.shrinkage=30"]
ONE_VIEW = ["graph.views=1"]
#: Overrides of experiment=photos.
MODELS: dict[str, list[str]] = {
    "detector": ["model=detector_labels", *ONE_VIEW],
    "detector, 6 views": ["model=detector_labels"],
    "max-pooled": ["model=mil_max", "trainer.checkpoint=best", *ONE_VIEW],
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
    "w/o holding back": ["model.shrinkage=0", "model.network_shrinkage=0"],
}
#: Models without training by gradient descent, of one view: see :func:`raw` and :func:`stack`. They are deterministic.
CLOSED = ("detector, raw", "linear stack")
#: Order of tables and figures.
ORDER = ("detector, raw", *list(MODELS)[:2], "linear stack", *list(MODELS)[2:])
SIZES = (50, 200, 800)
CURVE = ("detector", "detector, 6 views", "linear stack", "max-pooled, prior", "logsumexp-pooled, prior", "GM-MLIC")
COCO = (*CURVE[:5], "paper, product", "GM-MLIC")
#: Labels left out of training, by seed: two that a class of the detector has the name of, and two of the three whose
#: class has another name (couch, tv, potted plant).
UNSEEN = {
    0: ("cat", "horse", "sofa", "tvmonitor"),
    1: ("dog", "cow", "sofa", "pottedplant"),
    2: ("sheep", "car", "tvmonitor", "pottedplant"),
}
#: Without classes, the prior is a bias for each label and nothing else.
ORACLE = {
    "max-pooled": [*MIL, *ONE_VIEW, "instances.num_augmentations=0"],
    "GM-MLIC": [*ONE_VIEW, "instances.num_augmentations=0"],
}
PARTS = ("main", "curve", "m", "k", "coco", "unseen", "oracle", "boxes")


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
        part = files[split].with_suffix(f".{os.getpid()}")  # another process may read the file
        with part.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["file", "labels"], extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(files[split])
    return ["dataset.annotations={" + ",".join(f"{split}: {file}" for split, file in files.items()) + "}"]


def voc(
    shared: Path,
    *,
    size: int | None = None,
    seed: int = 0,
    fold: int | None = None,
    unseen: Sequence[str] = (),
    limit: int | None = None,
) -> list[str]:
    """Overrides: the photos with their own split.

    Args:
        shared: see above.
        size: draw as many of the training photos.
        fold: of five folds of the training and val photos; tests on the fold.
        unseen: labels to leave out; their photos stay.
        seed: of the draw.
        limit: draw as many photos of each split, to try the study.
    """
    rows = photos(shared)
    labels = sorted({label for row in rows for label in row["labels"].split(";") if label} - set(unseen))
    for row in rows:
        row["labels"] = ";".join(label for label in row["labels"].split(";") if label in labels)
    parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")}
    base = [
        "dataset=custom",
        f"dataset.root={shared.absolute()}/data/voc2012-animals",
        f"dataset.labels=[{','.join(labels)}]",
    ]
    if fold is not None:
        both = parts["train"] + parts["val"]
        of = np.random.default_rng(0).permutation(len(both)) % 5
        rest = [row for row, f in zip(both, of, strict=True) if f != fold]
        held_out = [row for row, f in zip(both, of, strict=True) if f == fold]
        train = rest[20:] if size is None else sample(rest[20:], size, seed)
        name = f"fold-{fold}" if size is None else f"fold-{fold}-{size}-{seed}"
        return [*base, *write_split(name, {"train": train, "val": rest[:20], "test": held_out})]
    name = []
    if limit is not None:
        parts = {split: sample(part, limit, 0) for split, part in parts.items()}
        name += [f"limit-{limit}"]
    if size is not None:
        parts["train"] = sample(parts["train"], size, seed)
        parts["val"] = parts["val"][:20]  # not used; with few training photos there are many epochs
        name += [f"{size}-{seed}"]
    if unseen:
        name += ["without", *unseen]
    return [*base, *write_split("-".join(name), parts)] if name else base


def sample(rows: list[dict[str, str]], size: int, seed: int) -> list[dict[str, str]]:
    """Some rows, in their order."""
    order = np.random.default_rng(seed).permutation(len(rows))[:size]
    return [rows[i] for i in np.sort(order)]


def coco(shared: Path) -> list[str]:
    return ["dataset=coco2014", f"dataset.root={shared.absolute()}/data/coco-mini"]


def true_boxes(shared: Path) -> dict[str, tuple[np.ndarray, list[str]]]:
    """VOC's boxes (n, 4) of each photo as fractions of its size, and their labels."""
    content = json.loads((shared / "data/voc2012-animals/annotations.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: f"images/{image['file_name']}" for image in content["images"]}
    sizes = {image["id"]: np.array([image["width"], image["height"]] * 2) for image in content["images"]}
    found: dict[str, tuple[list[np.ndarray], list[str]]] = {file: ([], []) for file in files.values()}
    for annotation in content["annotations"]:
        image = annotation["image_id"]
        x, y, w, h = annotation["bbox"]
        boxes, labels = found[files[image]]
        boxes.append(np.array([x, y, x + w, y + h]) / sizes[image])
        labels.append(names[annotation["category_id"]])
    return {file: (np.array(boxes).reshape(-1, 4).clip(0, 1), labels) for file, (boxes, labels) in found.items()}


# Detectors


def content_hash(image: Any) -> str:
    """SHA-256 of an image tensor as 8-bit values."""
    import torch

    content = (image * 255).round().to(torch.uint8).contiguous().numpy()
    return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()


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

        digest = content_hash(image)
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


class TrueBoxes:
    """VOC's own boxes, without classes, with NanoDet's features at them."""

    name, labels = "true_boxes", ()

    def __init__(self, nanodet: Any, shared: Path) -> None:
        self.nanodet, self.shared, self.net = nanodet, shared, nanodet.NanoDet()
        self.feature_dim = self.net.feature_dim
        annotations = (shared / "data/voc2012-animals/annotations.json").read_bytes()
        self.fingerprint = hashlib.sha256(self.net.fingerprint.encode() + annotations).hexdigest()

    @cached_property
    def boxes(self) -> dict[str, np.ndarray]:
        """The boxes of each photo, the largest first, by the content of the photo."""
        from gm_mlic.datasets.images import read_image, to_tensor

        table = {}
        for file, (boxes, _) in true_boxes(self.shared).items():
            order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable")
            table[content_hash(to_tensor(read_image(self.shared / "data/voc2012-animals" / file)))] = boxes[order]
        return table

    def __call__(self, images: Sequence[Any], m: int) -> list[Any]:
        import torch
        from torchvision.ops import roi_align

        from gm_mlic import Instances

        found = []
        for image in images:
            boxes = torch.from_numpy(self.boxes[content_hash(image)][:m]).float()
            score = 1.0 if len(boxes) else 0.0
            boxes = boxes if len(boxes) else torch.tensor([[0.0, 0.0, 1.0, 1.0]])
            *_, maps, (h, w) = self.net._network(image)
            at = [boxes * torch.tensor([w, h, w, h])]
            parts = [roi_align(maps[k][None], at, 1, 1 / stride, 4, True) for k, stride in self.nanodet.MAPS.items()]
            features = torch.cat([part.flatten(1) for part in parts], dim=1).float()
            n = len(boxes)
            found.append(Instances(boxes, torch.full((n,), score), torch.full((n,), -1), features))
        return found


def extractors(shared: Path) -> tuple[Cached, Cached]:
    """NanoDet, and VOC's own boxes."""
    spec = importlib.util.spec_from_file_location("nanodet", shared / "detector/nanodet.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # imports ncnn, which has to come before torch
    return Cached(module.NanoDet(), RUNS / "cache"), Cached(TrueBoxes(module, shared), RUNS / "cache-true-boxes")


# Models in closed form


def stores(shared: Path, extractor: Cached, data: list[str], overrides: list[str], splits: Sequence[str]) -> list[Any]:
    """Instance stores of some splits, extracted if they are missing."""
    from gm_mlic.cli.compose import compose
    from gm_mlic.training import build
    from gm_mlic.training.run import split_data

    config = compose("train", settings(shared, data, overrides))
    return [split_data(config, build.build_dataset(config, split), extractor).store for split in splits]


def raw(parts: Sequence[Any]) -> list[np.ndarray]:
    """The highest confidence of the instances that are detected as each label, 0 where there is none: (n, C)."""
    return [best_confidence(store) for store in parts]


def best_confidence(store: Any, floor: float = 0.0) -> np.ndarray:
    from gm_mlic.embeddings import labels_of

    labels = store.manifest.labels
    column = np.array([*labels_of(store.manifest.detector_labels, labels), -1])  # the last one is for -1
    detected = column[store.detected_labels[store.rows, 0]]
    detected[~mask(store)] = -1
    score = store.scores[store.rows, 0].astype(np.float64)
    return np.stack([np.where(detected == c, score, floor).max(axis=1) for c in range(len(labels))], axis=1)


def mask(store: Any) -> np.ndarray:
    return np.arange(store.scores.shape[2]) < store.counts[store.rows, :1]


def stack(parts: Sequence[Any]) -> list[np.ndarray]:
    """Logistic regression of each label on the mean and the most confident instance, plus the detector's logit."""
    from sklearn.linear_model import LogisticRegression

    x = []
    for store in parts:
        features = store.features[store.rows, 0].astype(np.float32)
        mean = (features * mask(store)[..., None]).sum(axis=1) / mask(store).sum(axis=1, keepdims=True)
        x.append(np.concatenate([mean, features[:, 0]], axis=1))
    center, scale = x[0].mean(axis=0), x[0].std(axis=0) + 1e-6
    x = [(values - center) / scale for values in x]
    q = [best_confidence(store, 1e-3).clip(1e-3, 1 - 1e-6) for store in parts]
    logits = [np.log(values) - np.log1p(-values) for values in q]
    for c, y in enumerate(np.asarray(parts[0].targets)[parts[0].rows].T):
        if y.min() < y.max():
            fitted = LogisticRegression(C=1e-4, max_iter=300).fit(x[0], y)
            for values, of in zip(x, logits, strict=True):
                of[:, c] += fitted.decision_function(values)
    return [1 / (1 + np.exp(-values)) for values in logits]


def fit_closed(run: Run, shared: Path, extractor: Cached, changed: list[str]) -> None:
    """Fit and test a model of CLOSED, and write metrics and scores as a training run does."""
    import torch

    from gm_mlic.metrics import get_convention, write_scored_images
    from gm_mlic.metrics.evaluation import metrics_of
    from gm_mlic.runs import SCORES

    parts = stores(shared, extractor, run.data(), [*ONE_VIEW, *changed], ("train", "val", "test"))
    scores = (raw if run.model == "detector, raw" else stack)(parts)
    values = []
    for store, of in zip(parts[1:], scores[1:], strict=True):
        y = torch.from_numpy(np.asarray(store.targets)[store.rows])
        values.append(metrics_of(torch.from_numpy(of), y, get_convention("mlgcn"), store.manifest.labels))
    ids = [store.manifest.ids[row] for row in store.rows]
    run.path.mkdir(parents=True, exist_ok=True)
    write_scored_images(run.path / SCORES, torch.from_numpy(of), y, ids, store.manifest.labels)
    sizes = {split: len(store.rows) for split, store in zip(("train", "val", "test"), parts, strict=True)}
    content = {"test": values[1], "val": values[0], "seed": run.seed, "dataset": {"sizes": sizes}}
    (run.path / "metrics.json").write_text(json.dumps(content, indent=2) + "\n")


# Runs


@dataclass(frozen=True)
class Run:
    """One model, trained with one seed.

    Attributes:
        part: one of PARTS.
        data: returns the overrides of the data.
        setting: what differs from the model of the main part.
        boxes: ``detected`` or ``true``.
    """

    part: str
    model: str
    seed: int
    data: Callable[[], list[str]]
    overrides: list[str]
    setting: str = ""
    boxes: str = "detected"

    @property
    def path(self) -> Path:
        name = re.sub(r"[^a-zA-Z0-9.]+", "_", f"{self.model} {self.setting}").strip("_")
        return RUNS / self.part / f"{name}-{self.seed}"

    @property
    def finished(self) -> bool:
        return (self.path / "metrics.json").exists()

    @cached_property
    def result(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / "metrics.json").read_text())
        return content

    def mean(self) -> float:
        """Test mAP: of VOC over the twelve labels, of COCO over all with a positive."""
        of = self.result["test"]["AP"]
        if self.part == "coco":
            return float(self.result["test"]["mAP"])
        values = [of[label] for label in TWELVE if of.get(label) is not None]  # fewer with unseen labels or a limit
        return float(np.mean(values))


def settings(shared: Path, data: list[str], overrides: Sequence[str]) -> list[str]:
    fixed = ["experiment=photos", *data, "embedding=glove", f"embedding.path={words(shared)}"]
    return [*fixed, f"instances.root={RUNS / 'stores'}", *overrides]


def execute(run: Run, shared: Path, extractor: Cached, changed: list[str]) -> None:
    """Train and test one model, unless it is finished."""
    from gm_mlic.cli.compose import compose
    from gm_mlic.training.run import train

    if run.finished:
        return
    if run.model in CLOSED:
        fit_closed(run, shared, extractor, changed)
        return
    given = settings(shared, run.data(), [*run.overrides, *changed, f"seed={run.seed}", f"run_dir={run.path}"])
    train(compose("train", given), command=f"gm-mlic train {' '.join(given)}", extractor=extractor)


def all_runs(shared: Path, limit: int | None = None) -> Iterator[Run]:
    """All runs of the study; models in closed form have one for each training set."""
    whole = partial(voc, shared, limit=limit)
    for seed in SEEDS:
        for model in [*MODELS, *CLOSED] if seed == 0 else MODELS:
            yield Run("main", model, seed, whole, MODELS.get(model, []))
    for size in SIZES:
        for seed in SEEDS:
            for model in CURVE:
                data = partial(voc, shared, size=size, seed=seed, limit=limit)
                yield Run("curve", model, seed, data, MODELS.get(model, []), f"n={size}")
    for seed in SEEDS:
        for m in (5, 10, 35):
            yield Run("m", "GM-MLIC", seed, whole, [f"graph.m={m}", "detector.max_instances=35"], f"m={m}")
        for k in (2, 3):
            yield Run("k", "GM-MLIC", seed, whole, [f"model.k={k}"], f"k={k}")
    for seed in SEEDS:
        for model in COCO:
            if model not in CLOSED or seed == 0:
                yield Run("coco", model, seed, partial(coco, shared), MODELS.get(model, []))
    for seed, labels in UNSEEN.items():
        yield Run("unseen", "GM-MLIC", seed, partial(voc, shared, unseen=labels, limit=limit), [])
    for seed in SEEDS:
        for model, overrides in ORACLE.items():
            yield Run("oracle", model, seed, whole, overrides, boxes="true")


def select(
    shared: Path, name: str, changed: list[str], folds: Sequence[int], seeds: Sequence[int], size: int | None
) -> None:
    """Cross-validation on the training and val photos: mean AP of the held-out fold.

    Args:
        shared: see above.
        name: one of MODELS.
        changed: changed settings.
        folds: of five.
        seeds: of training, and of the draw of training photos.
        size: number of training photos; None for all of the other folds.
    """
    extractor, _ = extractors(shared)
    values = []
    for seed in seeds:
        for fold in folds:
            setting = " ".join([f"fold={fold}", *([] if size is None else [f"n={size}"]), *changed])
            data = partial(voc, shared, size=size, seed=seed, fold=fold)
            run = Run("select", name, seed, data, [*MODELS[name], *changed], setting)
            execute(run, shared, extractor, [])
            values.append(run.mean())
            print(name, setting, seed, round(values[-1], 2), flush=True)
    print(f"{name}: {np.mean(values):.2f}", [round(v, 2) for v in values], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 4; 0 (select)")
    parser.add_argument("--select", choices=MODELS, metavar="NAME")
    parser.add_argument("--folds", nargs="+", type=int, choices=range(5), default=range(5), help="only these (select)")
    parser.add_argument("--train", type=int, metavar="N", help="number of training photos (select)")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--size", type=int, help="try the study with as many photos of each split")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of tables and figures")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="changed settings of all runs")
    given = parser.parse_args()
    if given.select:
        select(given.shared, given.select, given.override, given.folds, given.seeds or [0], given.train)
        return
    given.seeds = given.seeds or list(SEEDS)
    runs = list(all_runs(given.shared, given.size))
    if given.report:
        import analysis

        analysis.report(given.shared, runs, given.out)
        return
    detected, true = extractors(given.shared)
    import analysis

    for run in runs:
        if run.part in given.only and run.seed in given.seeds and (not given.models or run.model in given.models):
            execute(run, given.shared, true if run.boxes == "true" else detected, given.override)
            print(run.part, run.model, run.setting, run.seed, round(run.mean(), 2), flush=True)
    for part, measure in (("boxes", analysis.measure_boxes), ("unseen", analysis.measure_unseen)):
        if part in given.only:
            measure(given.shared, [run for run in runs if run.seed in given.seeds], detected, given.size)


if __name__ == "__main__":
    sys.exit(main())
