"""Command ``gm-mlic demo``: three models on synthetic scenes, compared in a table and a picture."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console

from gm_mlic.config import finish
from gm_mlic.datasets import Scenes
from gm_mlic.datasets.images import read_image
from gm_mlic.embeddings import labels_of
from gm_mlic.instances import InstanceStore
from gm_mlic.reporting.annotated_images import LabelBox, label_box, picture_grid
from gm_mlic.reporting.tables import comparison, markdown_table, text_table
from gm_mlic.runs import EXAMPLES
from gm_mlic.training import build
from gm_mlic.training.run import split_data, train

log = logging.getLogger(__name__)

#: Rows of the table: name, and settings of the model.
_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mil_max": ("max-pooled, no graphs", {"name": "mil_max"}),
    "concat": ("GM-MLIC, concat", {"fusion": "concat"}),
    "product": ("GM-MLIC, product", {"fusion": "product"}),
}
_PICTURED = "product"


def demo(config: DictConfig) -> list[tuple[str, dict[str, Any]]]:
    """Train three models on one instance store; compare them with the upper bound and the detector.

    Returns names and test metrics, the rows of the table.
    """
    begin = time.monotonic()
    run_dir = Path(config.run_dir)
    results = {}
    for row, (name, _) in _ROWS.items():
        log.info("training: %s", name)
        results[row] = train(_row_config(config, row))

    test = split_data(config, build.build_dataset(config, "test"), build.build_detector(config))
    assert isinstance(test.dataset, Scenes)
    assert test.store is not None
    readable = test.store.rows
    targets = test.store.targets[readable]
    rows = [
        ("upper bound", test.dataset.limit_scores[readable]),
        ("detector's own labels", detector_scores(test.store)[readable]),
    ]
    table = [(name, _measure(config, scores, targets)) for name, scores in rows]
    table += [(_ROWS[row][0], result["test"]) for row, result in results.items()]

    picture = run_dir / "scenes.png"
    _draw(_row_config(config, _PICTURED), test.dataset.labels, picture)
    (run_dir / "results.md").write_text(markdown_table(*comparison(table)))
    (run_dir / "results.json").write_text(json.dumps(dict(table), indent=2) + "\n")
    title = f"{len(readable)} test scenes, metrics in % (convention {config.metrics.convention})"
    Console().print(text_table(title, *comparison(table)))
    minutes = (time.monotonic() - begin) / 60
    print(f"run folder: {run_dir}\npicture:    {picture}\ntime:       {minutes:.1f} min")
    return table


def detector_scores(store: InstanceStore) -> np.ndarray:
    """Scores (N, C): the highest confidence among instances detected as label c, matched by name; 0 without any."""
    column_of = np.array([*labels_of(store.manifest.detector_labels, store.manifest.labels), -1])
    scores = np.zeros((len(store.counts), len(store.manifest.labels)), dtype=np.float32)
    labels = column_of[store.detected_labels[:, 0]]  # (N, m); -1 for no class, and for classes that are not labels
    image, slot = np.nonzero(labels >= 0)
    np.maximum.at(scores, (image, labels[image, slot]), store.scores[image, 0, slot])
    return scores


def _row_config(config: DictConfig, row: str) -> DictConfig:
    """Config of one row, with its model and run folder."""
    row_config, model = copy.deepcopy(config), _ROWS[row][1]
    row_config.model = model if "name" in model else {**config.model, **model}
    row_config.run_dir = str(Path(config.run_dir) / row)
    return finish(row_config)


def _measure(config: DictConfig, scores: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    metrics = build.build_metrics(config, [str(c) for c in range(targets.shape[1])])
    metrics.update(torch.from_numpy(np.asarray(scores, dtype=np.float32)), torch.from_numpy(targets))
    return {name: float(value) for name, value in metrics.compute().items() if name != "AP"}


def example_labels(example: Mapping[str, Any], thresholds: Mapping[str, float]) -> list[LabelBox]:
    """Predicted or present labels of an entry of ``examples.json``, highest score first.

    Unlike there, a label is predicted only if its score reaches its threshold.
    """
    found = []
    for label in map(label_box, example["top"]):
        predicted, present = label.score >= thresholds[label.name], label.name in example["targets"]
        if predicted or present:
            found.append(replace(label, kind="missed" if not predicted else "right" if present else "wrong"))
    return found


def _draw(config: DictConfig, labels: Sequence[str], path: Path) -> None:
    """Draw the example photos of a run."""
    folder = Path(config.run_dir) / EXAMPLES
    threshold = build.build_metrics(config, labels).convention.threshold
    thresholds = dict(zip(labels, np.broadcast_to(threshold, len(labels)).tolist(), strict=True))
    examples = json.loads((folder / "examples.json").read_text())
    panels = [(read_image(folder / example["file"]), example_labels(example, thresholds)) for example in examples]
    picture_grid(path, panels, f"{_ROWS[_PICTURED][0]}: {len(panels)} test scenes with labels and argmax boxes")
