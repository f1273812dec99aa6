"""Accuracy on labels outside the training set; see README.md.

    python experiments/open_labels/run.py LABELS GLOVE [--jobs N]      # everything; finished runs are not repeated

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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, RandomSampler

from gm_mlic import Scenes, build_extractor, create_model, embed_labels, extract
from gm_mlic.graphs import RELATIONS, AssignmentBatchDataset, AssignmentGraph
from gm_mlic.losses import WeightedBCE
from gm_mlic.metrics import average_precision

HERE = Path(__file__).parent
FEATURE, M, NEIGHBORS = 64, 12, 10
NOISE, MISS, FALSE = 0.5, 0.2, 2.0
SIZES = {"train": 3000, "test": 4000}
EPOCHS, BATCH, RATE = 4, 32, 3e-3
#: Every fifth label is left out of training; the seed selects the offset.
HELD_OUT = 5
#: Share of a class's prototype that depends on its word vector; None: scenes.
SHARES = (0.25, 0.5, 1.0)
MODELS = ("gm_mlic", "gm_mlic w/o Gl", "regression")
SEEDS = (0, 1, 2)
COLUMNS = ("data", "share", "model", "seed", "seen", "unseen", "harmonic", "random", "seconds")


def coco(files: tuple[str, str], share: float, seed: int) -> tuple[dict[str, SimpleNamespace], Tensor]:
    r"""COCO's label sets with simulated instances, and the label vectors.

    The prototype of class c is :math:`\sqrt{s} P w_c + \sqrt{1 - s} z_c`, s the share, P a random projection, w_c the
    centered word vector and z_c random, all of norm 1.
    """
    labels, glove = (np.load(file) for file in files)
    assert labels["labels"].tolist() == glove["labels"].tolist()
    C = len(labels["labels"])
    rng = np.random.default_rng([seed, 2])
    words = glove["vectors"] - glove["vectors"].mean(axis=0)
    from_words = words @ rng.normal(size=(words.shape[1], FEATURE))
    random = rng.normal(size=(C, FEATURE))
    from_words, random = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (from_words, random))
    prototypes = np.sqrt(share) * from_words + np.sqrt(1 - share) * random
    prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
    bits = {"train": rng.permutation(labels["train"])[: SIZES["train"]]}
    bits["test"] = rng.permutation(labels["val"])[: SIZES["test"]]
    stores = {
        split: simulate(np.unpackbits(rows, axis=1, count=C).astype(bool), prototypes, rng)
        for split, rows in bits.items()
    }
    return stores, torch.from_numpy(glove["vectors"]).float()


def simulate(present: np.ndarray, prototypes: np.ndarray, rng: np.random.Generator) -> SimpleNamespace:
    """An instance store in memory: input of :class:`AssignmentBatchDataset`."""
    N, C = present.shape
    frequency = present.mean(axis=0) / present.mean(axis=0).sum()
    features = np.zeros((N, 1, M, FEATURE), dtype=np.float32)
    boxes = np.zeros((N, 1, M, 4), dtype=np.float32)
    counts = np.zeros((N, 1), dtype=np.int64)
    for image in range(N):
        labels = np.flatnonzero(present[image])
        detected = labels[rng.random(len(labels)) >= MISS]
        wrong = rng.choice(C, size=rng.poisson(FALSE), p=frequency)
        classes = np.concatenate([detected, wrong[~present[image, wrong]]])
        if len(classes) == 0:  # an image has at least one instance
            classes = rng.choice(C, size=1, p=frequency)
        classes = rng.permutation(classes)[:M]
        count = counts[image, 0] = len(classes)
        features[image, 0, :count] = prototypes[classes] + rng.normal(size=(count, FEATURE)) * NOISE / np.sqrt(FEATURE)
        corner = rng.uniform(0, 0.7, size=(count, 2))
        boxes[image, 0, :count] = np.concatenate([corner, corner + rng.uniform(0.1, 0.3, size=(count, 2))], axis=1)
    return view(features * np.sqrt(FEATURE), boxes, counts, present.astype(np.int8))


def view(features: np.ndarray, boxes: np.ndarray, counts: np.ndarray, targets: np.ndarray) -> SimpleNamespace:
    shape = features.shape[:3]
    return SimpleNamespace(
        features=features, boxes=boxes, counts=counts, targets=targets, difficult=None,
        rows=np.arange(len(features)),
        scores=np.ones(shape, dtype=np.float32), detected_labels=np.zeros(shape, dtype=np.int64),
    )  # fmt: skip


def scenes(seed: int) -> tuple[dict[str, SimpleNamespace], Tensor]:
    """Instances of scenes from the tiny detector, and hashed label vectors, which are random."""
    detector = build_extractor("scenes_tiny", weights="scenes")
    stores = {}
    for split, size in {"train": 3000, "test": 1000}.items():
        data = Scenes(split, size=size, seed=seed)
        store = extract(data, detector, Path("runs/open_labels") / f"{split}-{seed}", m=10)
        assert store is not None
        arrays = (np.asarray(getattr(store, name)) for name in ("features", "boxes", "counts", "targets"))
        stores[split] = view(*arrays)
    return stores, embed_labels(Scenes("train", size=1).labels).vectors


def train(data: str, share: float | None, model: str, seed: int, files: tuple[str, str]) -> dict[str, Any]:
    """Train on the seen labels, and test seen and unseen labels in one graph."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    begin = time.perf_counter()
    stores, vectors = scenes(seed) if share is None else coco(files, share, seed)
    C = len(vectors)
    unseen = torch.arange(C) % HELD_OUT == seed % HELD_OUT
    targets = torch.from_numpy(np.asarray(stores["test"].targets))
    if model == "regression":
        scores = regression(stores, vectors, ~unseen)
    else:
        scores = graph_scores(stores, vectors, ~unseen, model)
    ap = average_precision(scores, targets)
    seen_mAP, unseen_mAP = 100 * ap[~unseen].nanmean().item(), 100 * ap[unseen].nanmean().item()
    return {
        "data": data, "share": "" if share is None else share, "model": model, "seed": seed,
        "seen": round(seen_mAP, 2), "unseen": round(unseen_mAP, 2),
        "harmonic": round(2 * seen_mAP * unseen_mAP / (seen_mAP + unseen_mAP), 2),
        "random": round(100 * (targets[:, unseen] == 1).double().mean().item(), 2),
        "seconds": round(time.perf_counter() - begin),
    }  # fmt: skip


def graph_scores(stores: dict[str, SimpleNamespace], vectors: Tensor, seen: Tensor, model: str) -> Tensor:
    """Scores of all labels by GM-MLIC, trained on the seen labels."""
    edge_types = [name for name in RELATIONS if name != "semantic" or model == "gm_mlic"]
    network = create_model(
        "gm_mlic", instance_dim=stores["train"].features.shape[-1], label_dim=vectors.shape[1], k=2, widths=(64, 64),
        edge_types=edge_types,
    )  # fmt: skip
    known = SimpleNamespace(**{**vars(stores["train"]), "targets": stores["train"].targets[:, seen.numpy()]})
    m = stores["train"].features.shape[2]
    graphs = [
        AssignmentGraph(w, m=m, num_label_neighbors=NEIGHBORS, edge_types=edge_types) for w in (vectors[seen], vectors)
    ]
    data = AssignmentBatchDataset(known, graphs[0])
    loss_of = WeightedBCE(torch.from_numpy((known.targets == 1).mean(axis=0)))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * -(-len(data) // BATCH), pct_start=0.1)
    order = RandomSampler(data)
    for _ in range(EPOCHS):
        for batch in DataLoader(data, BATCH, sampler=order, collate_fn=AssignmentBatchDataset.collate):
            optimizer.zero_grad()
            loss_of(network(batch).logits, batch.y).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    everything = AssignmentBatchDataset(stores["test"], graphs[1])
    with torch.no_grad():
        loader = DataLoader(everything, BATCH, collate_fn=AssignmentBatchDataset.collate)
        return torch.cat([network(batch).logits.sigmoid() for batch in loader])


def regression(stores: dict[str, SimpleNamespace], vectors: Tensor, seen: Tensor) -> Tensor:
    """Scores by ridge regression from an instance to the mean label vector of its image: the maximum cosine."""
    words = normalize(vectors - vectors.mean(dim=0), dim=1)
    present = torch.from_numpy(stores["train"].targets == 1).float() * seen
    wanted = present @ words / present.sum(dim=1, keepdim=True).clamp(min=1)
    x, mask = instances(stores["train"])
    X = x[mask].double()
    Y = wanted[:, None].expand(-1, x.shape[1], -1)[mask].double()
    weight = torch.linalg.solve(X.T @ X + 10 * torch.eye(X.shape[1]), X.T @ Y)
    x, mask = instances(stores["test"])
    cosine = normalize(x.double() @ weight, dim=-1) @ words.double().T
    return (1 + cosine.masked_fill(~mask[..., None], -1).amax(dim=1).clamp(-1, 1).float()) / 2


def instances(store: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Features (N, M, D), and the mask of instances (N, M)."""
    x = torch.from_numpy(np.asarray(store.features[:, 0], dtype=np.float32))
    mask = torch.arange(x.shape[1]) < torch.from_numpy(np.asarray(store.counts[:, :1]))
    return x, mask


def main(files: tuple[str, str], jobs: int) -> None:
    path = HERE / "results.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(r["data"], r["share"], r["model"], r["seed"]) for r in rows}
    wanted = [
        ("scenes" if share is None else "coco", share, model, seed)
        for seed, share, model in itertools.product(SEEDS, (*SHARES, None), MODELS)
    ]
    todo = [w for w in wanted if (w[0], "" if w[1] is None else str(w[1]), w[2], str(w[3])) not in done]
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, *what, files) for what in todo]
        for number, future in enumerate(as_completed(futures), 1):
            rows.append(future.result())
            with path.open("w", newline="") as out:
                writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(sorted(rows, key=lambda row: [str(row[c]) for c in COLUMNS[:4]]))
            print(f"{number}/{len(todo)}", rows[-1], flush=True)
    print_table(list(csv.DictReader(path.open())))


def print_table(rows: list[dict[str, str]]) -> None:
    """Print the table of README.md."""
    print("| data | share | model | seen mAP | unseen mAP | harmonic mean | random |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for (data, share, model), group in itertools.groupby(rows, key=lambda r: (r["data"], r["share"], r["model"])):
        some = list(group)
        cells = [mean_and_std([float(r[column]) for r in some]) for column in ("seen", "unseen", "harmonic", "random")]
        print(f"| {data} | {share or '-'} | {model} | {' | '.join(cells)} |")


def mean_and_std(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels")
    parser.add_argument("glove")
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    main((given.labels, given.glove), given.jobs)
