"""Evaluation of scores: all conventions, bootstrap intervals, paired test, fitted thresholds."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gm_mlic.errors import DataError
from gm_mlic.io import Progress, write_file
from gm_mlic.metrics.bootstrap import bootstrap_map, interval, p_value
from gm_mlic.metrics.conventions import CONVENTIONS, Convention
from gm_mlic.metrics.functional import all_metrics, checked_targets
from gm_mlic.metrics.score_files import ScoredImages, check_label_lists, read_scored_images
from gm_mlic.metrics.thresholds import fit_thresholds
from gm_mlic.targets import TargetFormat

log = logging.getLogger(__name__)


def evaluate_scores(
    images: ScoredImages,
    *,
    val: ScoredImages | None = None,
    conventions: Mapping[str, Convention] = CONVENTIONS,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate the first scores under every convention, and compare them with the second, if given.

    Args:
        images: targets and the scores of one or two models.
        val: validation scores of the first model, to fit thresholds.
        conventions: conventions by name.
        bootstrap: number of resamples for 95 % intervals of mAP; 0 for none.
        seed: seed of the resamples.

    Returns:
        JSON-compatible dictionary, in percent: ``images``, ``labels``, ``target_format``, ``excluded_labels`` (without
        positives), ``metrics`` by convention; with ``bootstrap``, its settings and ``intervals`` of mAP by convention;
        with ``val``, ``calibrated`` (metrics) and ``thresholds``; with two models, ``against`` (metrics) and
        ``difference`` (interval and p of the difference in mAP).

    Raises:
        DataError: if there are no images, or the labels of ``val`` differ.
    """
    labels = images.labels or tuple(str(c) for c in range(images.targets.shape[1]))
    if not len(images.targets):
        raise DataError("There are no scores to evaluate: pass at least one image.")
    if val is not None:
        if val.targets.shape[1] != images.targets.shape[1]:
            raise DataError(f"val_scores have {val.targets.shape[1]} labels, scores {len(labels)}: they must be equal.")
        check_label_lists([("scores", images.labels), ("val_scores", val.labels)])
    result: dict[str, Any] = {
        "images": len(images.targets),
        "labels": len(labels),
        "target_format": images.target_format,
    }

    def measured(model: int, conventions: Mapping[str, Convention]) -> dict[str, Any]:
        scores, targets, difficult = images.scores[model], images.targets, images.difficult
        return {name: metrics_of(scores, targets, rules, labels, difficult) for name, rules in conventions.items()}

    result["metrics"] = measured(0, conventions)
    AP = next(iter(result["metrics"].values()))["AP"]
    result["excluded_labels"] = [label for label, value in AP.items() if value is None]
    if val is not None:
        fitted: dict[str, list[float]] = {
            name: fit_thresholds(val.scores[0], val.targets, rules, difficult=val.difficult).tolist()
            for name, rules in conventions.items()
        }
        result["calibrated"] = measured(
            0, {name: replace(rules, threshold=tuple(fitted[name])) for name, rules in conventions.items()}
        )
        result["thresholds"] = {name: dict(zip(labels, values, strict=True)) for name, values in fitted.items()}
        result["val_images"] = len(val.targets)
    if len(images.scores) > 1:
        result["against"] = measured(1, conventions)
    if bootstrap:
        result |= _bootstrapped(images, conventions, bootstrap, seed)
    return result


def evaluate_files(
    scores: str | Path,
    targets: str | Path,
    *,
    against: str | Path | None = None,
    val: tuple[str | Path, str | Path] | None = None,
    target_format: TargetFormat = "binary",
    allow_all_present: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate files as :func:`evaluate_scores`; see :func:`~gm_mlic.metrics.score_files.read_scored_images`.

    Args:
        scores, targets: the files.
        against: scores of another model for the same images.
        val: scores and targets of validation images, to fit thresholds.
        target_format, allow_all_present: see :func:`~gm_mlic.metrics.score_files.read_scored_images`.
        bootstrap, seed: see :func:`evaluate_scores`.
        out: folder in which the result is written as ``STEM.json``, named after the score file.

    Raises:
        GMMLICError: if the files cannot be evaluated.
    """
    read = partial(read_scored_images, target_format=target_format, allow_all_present=allow_all_present)
    images = read([scores] if against is None else [scores, against], targets)
    val_images = None if val is None else read([val[0]], val[1])
    files = {"scores": scores, "targets": targets, "against": against}
    result: dict[str, Any] = {f"{name}_file": str(path) for name, path in files.items() if path is not None}
    result |= evaluate_scores(images, val=val_images, bootstrap=bootstrap, seed=seed)
    if out is not None:
        path = Path(out) / f"{Path(scores).stem}.json"
        write_file(path, json.dumps(result, indent=2) + "\n")
    return result


def metrics_of(
    scores: Tensor, targets: Tensor, rules: Convention, labels: Sequence[str], difficult: Tensor | None = None
) -> dict[str, Any]:
    """Metrics as JSON in percent, with ``AP`` by label; None for undefined values. Targets are in {0, 1}."""
    return by_name(all_metrics(*checked_targets(scores, targets, difficult, num_labels=len(labels)), rules), labels)


def by_name(values: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Computed metrics as JSON, with ``AP`` by label; NaN (AP of labels without positives) becomes None."""
    named: dict[str, Any] = {name: _number(value) for name, value in values.items() if name != "AP"}
    AP = values["AP"].reshape(len(labels))  # torchmetrics returns a single value as a scalar
    named["AP"] = {label: _number(ap) for label, ap in zip(labels, AP, strict=True)}
    return named


def _bootstrapped(
    images: ScoredImages, conventions: Mapping[str, Convention], resamples: int, seed: int
) -> dict[str, Any]:
    """Entries ``bootstrap``, ``intervals`` and, for two models, ``difference`` of :func:`evaluate_scores`."""
    with Progress("bootstrap", "resamples", resamples, log=log) as progress:
        drawn = bootstrap_map(
            images.scores, images.targets, list(conventions.values()), resamples, seed, progress.advance,
            difficult=images.difficult,
        )  # fmt: skip

    def ends(resampled: np.ndarray) -> list[float | None]:
        return [_number(end) for end in interval(resampled)]

    result: dict[str, Any] = {"bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95}}
    result["intervals"] = {name: ends(values) for name, values in zip(conventions, drawn[0], strict=True)}
    if len(drawn) > 1:
        result["difference"] = {
            name: {"interval": ends(values), "p": p_value(values)}
            for name, values in zip(conventions, drawn[0] - drawn[1], strict=True)
        }
    return result


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
