"""Boxes, labels outside the training set, and tables of finished runs of ``run.py``."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from run import COCO, CURVE, HERE, ONE_VIEW, ORDER, SIZES, TWELVE, UNSEEN, Run, raw, stores, true_boxes, voc
from scipy.stats import ttest_1samp
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import box_iou

from gm_mlic import Predictor
from gm_mlic.embeddings import labels_of
from gm_mlic.graphs import AssignmentBatchDataset
from gm_mlic.instances import InstanceStore
from gm_mlic.metrics import average_precision, bootstrap_map, get_convention, interval, read_scored_images
from gm_mlic.runs import SCORES

#: Models whose argmax boxes are measured. That of the detector is the most confident box of the label's class.
EXPLAINED = ("detector", "max-pooled, prior", "paper, product", "GM-MLIC", "GM-MLIC, one view")
#: What the models of the main part are compared with.
REFERENCES = ("detector", "max-pooled, prior", "linear stack")
#: Models without one part of GM-MLIC, and the part. logsumexp-pooled is without graphs, and has one-hot labels.
REMOVED = {
    "w/o Gl": "label graph Gl",
    "w/o Go": "instance graph Go",
    "w/o ILM edges": "matching edges",
    "logsumexp-pooled, prior": "the whole network (logsumexp-pooled, prior)",
    "w/o prior": "prior",
    "w/o linear": "linear classifier",
    "w/o holding back": "holding back of labels with few photos",
    "GM-MLIC, one view": "six views",
}
#: Models whose scores are combined with the other labels of a photo.
WITH_CONTEXT = ("detector", "logsumexp-pooled, prior", "GM-MLIC")
#: Every photo has at least one of these (or a bird, which is not among the twelve labels).
ANIMALS = ("cat", "cow", "dog", "horse", "sheep")
RESAMPLES = 1000
BATCH = 32


# Boxes


def measure_boxes(shared: Path, runs: Sequence[Run], extractor: Any, limit: int | None) -> None:
    """Write boxes.json to the main runs of EXPLAINED: for each label, the boxes that are on an object of the label."""
    wanted = [run for run in runs if run.part == "main" and run.model in EXPLAINED and run.finished]
    if not wanted:
        return
    truth = true_boxes(shared)
    (one_view,) = stores(shared, extractor, voc(shared, limit=limit), ONE_VIEW, ["test"])
    for run in wanted:
        file = run.path / "boxes.json"
        if not file.exists():
            predictor = Predictor.from_checkpoint(run.path / "checkpoints/last.ckpt", extractor=extractor)
            store = InstanceStore.open(run.result["stores"]["test"]["path"])
            counts = boxes_on_objects(predictor, store, one_view, truth)
            file.write_text(json.dumps(counts, indent=1) + "\n")
        counts = json.loads(file.read_text())
        right, hits = (sum(row[name] for row in counts.values()) for name in ("right", "iou"))
        print("boxes", run.model, run.seed, f"{hits} of {right} on an object (IoU)", flush=True)


@torch.no_grad()
def boxes_on_objects(
    predictor: Predictor, store: InstanceStore, one_view: InstanceStore, truth: dict[str, tuple[np.ndarray, list[str]]]
) -> dict[str, dict[str, int]]:
    """Counts by label.

    ``right``: photos with the label, and p >= 0.5; ``iou`` and ``center``: of these, with an argmax box of IoU >= 0.5
    with an object of the label, or with its center in one; ``detector_iou``, ``detector_center``: the same for the
    most confident box of the label's class in the photo itself.
    """
    labels = predictor.metadata.labels
    counts: dict[str, Counter[str]] = {label: Counter() for label in labels}
    column = np.array([*labels_of(one_view.manifest.detector_labels, labels), -1])
    for batch in DataLoader(AssignmentBatchDataset(store, predictor.graph), BATCH, collate_fn=lambda batch: batch):
        output = predictor.model(batch)
        for b, c in ((output.logits >= 0) & (batch.y == 1)).nonzero().tolist():
            row, label = int(batch.row[b]), labels[c]
            boxes, names = truth[store.manifest.ids[row]]
            objects = torch.from_numpy(boxes[[name == label for name in names]]).float()
            found = on_object(batch.box[b, output.argmax_instance[b, c]], objects)
            n = int(one_view.counts[row, 0])
            own = np.flatnonzero(column[one_view.detected_labels[row, 0, :n]] == c)[:1]
            best = [on_object(torch.tensor(one_view.boxes[row, 0, i]), objects) for i in own] or [(False, False)]
            counts[label].update(
                right=1, iou=found[0], center=found[1], detector_iou=best[0][0], detector_center=best[0][1]
            )
    names = ("right", "iou", "center", "detector_iou", "detector_center")
    return {label: {name: int(count[name]) for name in names} for label, count in counts.items()}


def on_object(box: Tensor, objects: Tensor) -> tuple[bool, bool]:
    """Whether a box (4,) has IoU >= 0.5 with one of the objects (n, 4), and whether its center is in one."""
    x, y = (box[:2] + box[2:]) / 2
    inside = (objects[:, 0] <= x) & (x <= objects[:, 2]) & (objects[:, 1] <= y) & (y <= objects[:, 3])
    return bool((box_iou(box[None], objects) >= 0.5).any()), bool(inside.any())


# Labels outside the training set


def measure_unseen(shared: Path, runs: Sequence[Run], extractor: Any, limit: int | None) -> None:
    """Write unseen.json to the runs of the part: AP of the twelve labels by method."""
    trained = {run.seed: run for run in runs if (run.part, run.model) == ("main", "GM-MLIC") and run.finished}
    for run in runs:
        if run.part != "unseen" or not run.finished:
            continue
        file = run.path / "unseen.json"
        if not file.exists():
            content = unseen_labels(shared, run, extractor, limit)
            file.write_text(json.dumps(content, indent=1) + "\n")
        content = json.loads(file.read_text())
        if run.seed in trained and "GM-MLIC, trained on all labels" not in content["AP"]:
            of = trained[run.seed].result["test"]["AP"]
            content["AP"]["GM-MLIC, trained on all labels"] = {label: of[label] for label in TWELVE}
            file.write_text(json.dumps(content, indent=1) + "\n")
        for method, AP in content["AP"].items():
            print("unseen", run.seed, method, [round(v, 1) for v in seen_and_unseen(AP, UNSEEN[run.seed])], flush=True)


def unseen_labels(shared: Path, run: Run, extractor: Any, limit: int | None) -> dict[str, Any]:
    """AP by method and label."""
    predictor = Predictor.from_checkpoint(run.path / "checkpoints/last.ckpt", extractor=extractor)
    data = voc(shared, limit=limit)
    train, one_view = stores(shared, extractor, data, ONE_VIEW, ("train", "test"))
    (six_views,) = stores(shared, extractor, data, [], ["test"])
    labels = one_view.manifest.labels
    wide = predictor.with_labels(labels)
    unseen = UNSEEN[run.seed]
    vectors = wide.metadata.label_vectors
    seen = torch.tensor([label not in unseen for label in labels])
    scores = {
        "detector": torch.from_numpy(raw([one_view])[0]),
        "prior, 6 views": graph_scores(prior_alone(wide), six_views),
        "ridge regression": regression(train, one_view, vectors, seen),
        "GM-MLIC": graph_scores(wide, six_views),
    }
    targets = torch.from_numpy(np.asarray(six_views.targets)[six_views.rows])
    AP = {}
    for method, of in scores.items():
        values = (100 * average_precision(of, targets)).tolist()
        values = [None if np.isnan(value) else value for value in values]
        AP[method] = {label: values[labels.index(label)] for label in TWELVE}
    return {"AP": AP}


def prior_alone(predictor: Predictor) -> Predictor:
    """The predictor without what is learned: all labels have 0 training photos, and all are classes of the detector."""
    graph = {**predictor.metadata.graph, "label_counts": [0] * len(predictor.metadata.labels)}
    return Predictor(predictor.model, replace(predictor.metadata, graph=graph), predictor.detector)


@torch.no_grad()
def graph_scores(predictor: Predictor, store: InstanceStore) -> Tensor:
    loader = DataLoader(AssignmentBatchDataset(store, predictor.graph), BATCH, collate_fn=lambda batch: batch)
    return torch.cat([predictor.model(batch).logits.double().sigmoid() for batch in loader])


def regression(train: InstanceStore, test: InstanceStore, vectors: Tensor, seen: Tensor) -> Tensor:
    """Ridge regression from an instance to the mean label vector of its photo, as in open_labels."""
    spec = importlib.util.spec_from_file_location("open_labels", HERE.parent / "open_labels/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    used = np.asarray(train.features[train.rows, 0], dtype=np.float32)
    used = used[np.arange(used.shape[1]) < np.asarray(train.counts)[train.rows, :1]]
    center, scale = used.mean(axis=0), used.std(axis=0) + 1e-6
    views = {}
    for name, store in (("train", train), ("test", test)):
        features = (np.asarray(store.features[store.rows, :1], dtype=np.float32) - center) / scale
        counts, targets = np.asarray(store.counts)[store.rows], np.asarray(store.targets)[store.rows]
        views[name] = SimpleNamespace(features=features, counts=counts, targets=targets)
    scores: Tensor = module.regression(views, vectors, seen)
    return scores


def seen_and_unseen(AP: dict[str, float | None], unseen: Sequence[str]) -> tuple[float, float, float]:
    """Mean AP of seen and of unseen labels of the twelve, and their harmonic mean."""
    known = {label: value for label in TWELVE if (value := AP[label]) is not None}  # all, without a limit
    s = statistics.mean(value for label, value in known.items() if label not in unseen)
    u = statistics.mean(value for label, value in known.items() if label in unseen)
    return s, u, 2 * s * u / (s + u)


# Results


def report(shared: Path, runs: Sequence[Run], out: Path) -> None:
    """Write the tables of finished runs as CSV, print them as Markdown, and draw the figures."""
    from figures import draw_curve, draw_m_and_k, draw_models

    done = [run for run in runs if run.finished]
    out.mkdir(parents=True, exist_ok=True)
    write(out / "results.csv", [row(run) for run in done if run.part != "coco"])
    write(out / "results_coco.csv", [row(run) for run in done if run.part == "coco"])
    write(out / "boxes.csv", list(box_rows(done)))
    write(out / "unseen.csv", list(unseen_rows(done)))
    main = of_part(done, "main")
    if "detector" in main:
        drawn = resampled(done, "main", TWELVE)
        print("## What each graph and each addition is worth\n")
        print_worth(main, drawn)
        print("\n## Context\n")
        context = list(context_rows(done, shared))
        write(out / "context.csv", context)
        print_context(context)
        print("\n## Models\n")
        print_values([run for run in done if run.part == "main"])
        print()
        print_differences(main, drawn, ORDER, REFERENCES)
        print("\n## AP of each label\n")
        print_labels([run for run in done if run.part == "main"], shared)
        draw_models(main, {m: interval(r - drawn["detector"]) for m, r in drawn.items()}, out / "models.png")
    curve = {model: by_size(done, model) for model in CURVE}
    print("\n## Training photos\n")
    print_grid(curve, [*SIZES, 1800], "photos")
    draw_curve(curve, out / "curve.png")
    for part, default in (("m", 20), ("k", 1)):
        print(f"\n## {part}\n")
        print_grid({"GM-MLIC": by_setting(done, part, default)}, sorted(by_setting(done, part, default)), part)
    draw_m_and_k(by_setting(done, "m", 20), by_setting(done, "k", 1), out / "m_k.png")
    coco = of_part(done, "coco")
    if coco:
        print("\n## COCO\n")
        print_values([run for run in done if run.part == "coco"])
        print()
        drawn = resampled(done, "coco", None)
        print_differences(coco, drawn, COCO, REFERENCES)
    print("\n## True boxes\n")
    print_values([run for run in done if run.part == "oracle"])
    print("\n## Argmax boxes\n")
    print_boxes(list(box_rows(done)))
    print("\n## Labels outside the training set\n")
    print_unseen(list(unseen_rows(done)))


def row(run: Run) -> dict[str, Any]:
    """A row of results.csv.

    ``mAP12`` is the mean over the twelve labels (of part unseen: over the eight trained ones), ``val mAP`` that of the
    tested epoch, over all labels.
    """
    test = run.result["test"]
    val = run.result["val"]["mAP"]
    if (run.path / "metrics.csv").exists():
        with (run.path / "metrics.csv").open(newline="") as file:
            val = float(list(csv.DictReader(file))[-1]["val/mAP"])
    values = {} if run.part == "coco" else {"mAP12": run.mean()}
    values |= {"mAP": test["mAP"], "CF1": test["CF1"], "OF1": test["OF1"], "val mAP": val}
    values |= {f"AP {label}": value for label, value in test["AP"].items()}
    what = {"part": run.part, "model": run.model, "setting": run.setting, "seed": run.seed}
    what |= {"photos": run.result["dataset"]["sizes"]["train"]}
    return what | {name: "" if value is None else round(value, 2) for name, value in values.items()}


def box_rows(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    for run in runs:
        file = run.path / "boxes.json"
        if run.part == "main" and file.exists():
            for label, counts in json.loads(file.read_text()).items():
                yield {"model": run.model, "seed": run.seed, "label": label, **counts}


def unseen_rows(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    for run in runs:
        file = run.path / "unseen.json"
        if run.part != "unseen" or not file.exists():
            continue
        content = json.loads(file.read_text())
        for method, AP in content["AP"].items():
            names = ("seen", "unseen", "harmonic")
            means = dict(zip(names, seen_and_unseen(AP, UNSEEN[run.seed]), strict=True))
            values = means | {f"AP {label}": value for label, value in AP.items() if value is not None}
            values = {name: round(value, 2) for name, value in values.items()}
            yield {"method": method, "seed": run.seed, "labels": ";".join(UNSEEN[run.seed]), **values}


def context_rows(runs: Sequence[Run], shared: Path) -> Iterator[dict[str, Any]]:
    """Mean AP with the other labels of a photo added to the scores of a model.

    The logit of label c becomes logit(p_c) + w (logit P(c | others) - logit P(c)), with a logistic regression on the
    other labels of the training photos. ``own``: w = 0; ``predicted``: the model's p in place of the other labels;
    ``true``: the labels of the test photos. With w = 1 this is Bayes' rule, if a label's appearance does not depend on
    the other labels.
    """
    from sklearn.linear_model import LogisticRegression

    chosen = [run for run in runs if run.part == "main" and run.model in WITH_CONTEXT]
    files = [run.path / SCORES for run in chosen]
    images = read_scored_images(files, files[0])
    assert images.labels is not None
    with (shared / "data/voc2012-animals/labels.csv").open(newline="") as file:
        train = [of["labels"].split(";") for of in csv.DictReader(file) if of["split"] == "train"]
    y = np.array([[label in of for label in images.labels] for of in train])
    true = images.targets.double().numpy()
    columns = [images.labels.index(label) for label in TWELVE]
    context = {c: LogisticRegression(C=1.0).fit(np.delete(y, c, axis=1), y[:, c]) for c in columns}
    for run, scores in zip(chosen, images.scores, strict=True):
        p = scores.double().numpy().clip(1e-6, 1 - 1e-6)
        for source, others in (("own", None), ("predicted", p), ("true", true)):
            for weight in (0.0,) if others is None else (0.5, 1.0):
                logits = np.log(p) - np.log1p(-p)
                for c, model in context.items():
                    if others is not None:
                        bias = np.log(y[:, c].mean() / (1 - y[:, c].mean()))
                        logits[:, c] += weight * (model.decision_function(np.delete(others, c, axis=1)) - bias)
                probabilities = torch.from_numpy(logits[:, columns]).sigmoid()
                AP = 100 * average_precision(probabilities, images.targets[:, columns]).numpy()
                animal = np.array([label in ANIMALS for label in TWELVE])
                means = {  # without labels that no photo has, with a limit
                    "animals": float(np.nanmean(AP[animal])),
                    "others": float(np.nanmean(AP[~animal])),
                    "mAP12": float(np.nanmean(AP)),
                }
                values = {name: round(value, 2) for name, value in means.items()}
                yield {"model": run.model, "seed": run.seed, "other labels": source, "weight": weight, **values}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        columns = dict.fromkeys(name for of in rows for name in of)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def of_part(runs: Iterable[Run], part: str) -> dict[str, dict[int, float]]:
    """Test mAP by model and seed."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        if run.part == part:
            found.setdefault(run.model, {})[run.seed] = run.mean()
    return found


def by_size(runs: Sequence[Run], model: str) -> dict[int, list[float]]:
    """Test mAP of each seed by the number of training photos; those of the main part last."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if run.model == model and run.part in ("curve", "main"):
            size = int(run.setting[2:]) if run.setting else 1800
            found.setdefault(size, []).append(run.mean())
    return dict(sorted(found.items()))


def by_setting(runs: Sequence[Run], part: str, default: int) -> dict[int, list[float]]:
    """Test mAP of the seeds of the part by m or k; the default is from the main part."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if run.part == part:
            found.setdefault(int(run.setting[2:]), []).append(run.mean())
        elif (run.part, run.model) == ("main", "GM-MLIC"):
            found.setdefault(default, []).append(run.mean())
    return dict(sorted(found.items()))


def resampled(runs: Sequence[Run], part: str, labels: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Test mAP (RESAMPLES,) of each model over the same resamples of the test photos, averaged over seeds."""
    chosen = [run for run in runs if run.part == part]
    files = [run.path / SCORES for run in chosen]
    images = read_scored_images(files, files[0])
    assert images.labels is not None
    columns = [c for c, label in enumerate(images.labels) if labels is None or label in labels]
    scores, targets = [of[:, columns] for of in images.scores], images.targets[:, columns].to(torch.int8)
    values = bootstrap_map(scores, targets, [get_convention("mlgcn")], RESAMPLES)[:, 0]
    models = dict.fromkeys(run.model for run in chosen)
    return {m: values[[i for i, run in enumerate(chosen) if run.model == m]].mean(axis=0) for m in models}


# Tables


def print_values(runs: Sequence[Run]) -> None:
    """Test mAP and F1 of each model, mean and standard deviation over seeds."""
    rows = [row(run) for run in runs]
    columns = [name for name in ("mAP12", "mAP", "CF1", "OF1", "val mAP") if rows and name in rows[0]]
    print(f"| model | seeds | {' | '.join(columns)} |\n| --- | ---: |{' ---: |' * len(columns)}")
    for model in ORDER:
        some = [of for of in rows if of["model"] == model]
        if some:
            cells = [mean_and_std([of[name] for of in some]) for name in columns]
            print(f"| {model} | {len(some)} | {' | '.join(cells)} |")


def print_differences(
    values: dict[str, dict[int, float]],
    drawn: dict[str, np.ndarray],
    models: Sequence[str],
    others: Sequence[str],
) -> None:
    """Differences of mAP to other models; see :func:`difference`."""
    models, others = ([name for name in names if name in values] for names in (models, others))
    print(f"| model | {' | '.join(f'minus {other}' for other in others)} |\n| --- |{' ---: |' * len(others)}")
    for model in models:
        cells = ["" if model == other else difference(values, drawn, model, other) for other in others]
        print(f"| {model} | {' | '.join(cells)} |")


def difference(values: dict[str, dict[int, float]], drawn: dict[str, np.ndarray], model: str, other: str) -> str:
    """Over seeds, and in parentheses p of the t-test over seeds and the 95 % interval over resampled photos."""
    d = differences(values[model], values[other])
    low, high = interval(drawn[model] - drawn[other])
    p = ""
    if len(d) > 1 and max(d) - min(d) > 1e-9:
        value = ttest_1samp(d, 0).pvalue
        p = f"p = {value:.3f}; " if value >= 0.001 else "p < 0.001; "
    return f"{mean_and_std(d, '+')} ({p}{low:+.2f} to {high:+.2f})"


def print_worth(values: dict[str, dict[int, float]], drawn: dict[str, np.ndarray]) -> None:
    """What GM-MLIC loses without each part."""
    print("| part | GM-MLIC minus the model without it |\n| --- | ---: |")
    for model, part in REMOVED.items():
        if "GM-MLIC" in values and model in values:
            print(f"| {part} | {difference(values, drawn, 'GM-MLIC', model)} |")


def differences(values: dict[int, float], other: dict[int, float]) -> list[float]:
    """Differences with the same seed; a model with one run is compared with every seed of the other."""
    both = min(len(values), len(other)) > 1
    seeds = sorted(set(values) & set(other) if both else max(values, other, key=len))
    of = [[v[seed] if len(v) > 1 else next(iter(v.values())) for seed in seeds] for v in (values, other)]
    return [a - b for a, b in zip(*of, strict=True)]


def print_labels(runs: Sequence[Run], shared: Path) -> None:
    """AP of each label, mean over seeds, and the numbers of photos with it."""
    models = [m for m in (*CURVE, "paper, product") if any(run.model == m for run in runs)]
    with (shared / "data/voc2012-animals/labels.csv").open(newline="") as file:
        count = Counter((of["split"], label) for of in csv.DictReader(file) for label in of["labels"].split(";"))
    print(f"| label | train | test | {' | '.join(models)} |\n| --- | ---: | ---: |{' ---: |' * len(models)}")
    for label in sorted(TWELVE, key=lambda name: -count["train", name]):
        of = [[run.result["test"]["AP"][label] for run in runs if run.model == model] for model in models]
        cells = [f"{statistics.mean(v):.1f}" if None not in v else "-" for v in of]
        print(f"| {label} | {count['train', label]} | {count['test', label]} | {' | '.join(cells)} |")


def print_context(rows: Sequence[dict[str, Any]]) -> None:
    """Mean AP with other labels of a photo, mean and standard deviation over seeds."""
    print("| model | other labels | weight | animals | others | all twelve |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for of in sorted(rows, key=lambda of: WITH_CONTEXT.index(of["model"])):
        found.setdefault((of["model"], of["other labels"], of["weight"]), []).append(of)
    for (model, source, weight), some in found.items():
        cells = [mean_and_std([of[name] for of in some]) for name in ("animals", "others", "mAP12")]
        print(f"| {model} | {source} | {weight:g} | {' | '.join(cells)} |")


def print_grid(values: dict[str, dict[int, list[float]]], columns: Sequence[int], name: str) -> None:
    print(f"| {name} | {' | '.join(map(str, columns))} |\n| --- |{' ---: |' * len(columns)}")
    for model, of in values.items():
        print(f"| {model} | {' | '.join(mean_and_std(of[c]) if c in of else '-' for c in columns)} |")


def print_boxes(rows: Sequence[dict[str, Any]]) -> None:
    """Shares of argmax boxes on an object, beside the detector's boxes for the same photos and labels."""
    print("| model | right labels | IoU >= 0.5 | center | detector: IoU >= 0.5 | center |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for model in EXPLAINED:
        some = sorted((of for of in rows if of["model"] == model), key=lambda of: of["seed"])
        runs = [list(run) for _, run in itertools.groupby(some, key=lambda of: of["seed"])]
        if runs:
            right = [sum(of["right"] for of in run) for run in runs]
            names = ("iou", "center", "detector_iou", "detector_center")
            shares = [
                [100 * sum(of[name] for of in run) / max(1, n) for run, n in zip(runs, right, strict=True)]
                for name in names
            ]
            print(f"| {model} | {statistics.mean(right):.0f} | {' | '.join(map(mean_and_std, shares))} |")


def print_unseen(rows: Sequence[dict[str, Any]]) -> None:
    print("| method | seen | unseen | harmonic mean |\n| --- | ---: | ---: | ---: |")
    for method in dict.fromkeys(of["method"] for of in rows):
        some = [of for of in rows if of["method"] == method]
        cells = [mean_and_std([of[name] for of in some]) for name in ("seen", "unseen", "harmonic")]
        print(f"| {method} | {' | '.join(cells)} |")


def mean_and_std(values: Sequence[float], sign: str = "") -> str:
    mean, no_break = f"{statistics.mean(values):{sign}.2f}", "\u00a0"
    return f"{mean}{no_break}±{no_break}{statistics.stdev(values):.2f}" if len(values) > 1 else mean
