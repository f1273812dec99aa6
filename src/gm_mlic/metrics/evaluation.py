"""Evaluation of scores: all conventions, bootstrap intervals, paired test, fitted thresholds."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gm_mlic.errors import DataError
from gm_mlic.io import Progress, write_file
from gm_mlic.metrics.bootstrap import bootstrap_map, interval, p_value
from gm_mlic.metrics.conventions import CONVENTIONS, Convention
from gm_mlic.metrics.multilabel import MultiLabelMetrics
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
        DataError: if the labels of ``val`` differ.
    """
    labels = images.labels or tuple(str(c) for c in range(images.targets.shape[1]))
    if val is not None:
        if val.targets.shape[1] != images.targets.shape[1]:
            raise DataError(f"val_scores have {val.targets.shape[1]} labels, scores {len(labels)}: they must be equal.")
        check_label_lists([("scores", images.labels), ("val_scores", val.labels)])
    result: dict[str, Any] = {
        "images": len(images.targets),
        "labels": len(labels),
        "target_format": images.target_format,
        "metrics": {},
    }
    for name, rules in conventions.items():
        result["metrics"][name] = metrics_of(images.scores[0], images.targets, rules, labels, images.difficult)
    AP = next(iter(result["metrics"].values()))["AP"]
    result["excluded_labels"] = [label for label, value in AP.items() if value is None]
    if val is not None:
        result |= _calibrated(images, val, conventions, labels)
    if len(images.scores) > 1:
        result["against"] = {
            name: metrics_of(images.scores[1], images.targets, rules, labels, images.difficult)
            for name, rules in conventions.items()
        }
    if bootstrap:
        result |= bootstrapped(images.scores, images.targets, conventions, bootstrap, seed, images.difficult)
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
    metrics = MultiLabelMetrics(len(labels), labels=labels, **asdict(rules))
    metrics.update(scores, targets, difficult)
    return by_name(metrics.compute(), labels)


def by_name(values: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Computed metrics as JSON, with ``AP`` by label; NaN (AP of labels without positives) becomes None."""
    named: dict[str, Any] = {name: _number(value) for name, value in values.items() if name != "AP"}
    AP = values["AP"].reshape(len(labels))  # torchmetrics returns a single value as a scalar
    named["AP"] = {label: _number(ap) for label, ap in zip(labels, AP, strict=True)}
    return named


def calibrated(
    scores: Tensor,
    targets: Tensor,
    thresholds: Tensor,
    rules: Convention,
    labels: Sequence[str],
    difficult: Tensor | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Metrics with fitted thresholds, and the thresholds by label."""
    fitted = asdict(rules) | {"threshold": thresholds}
    metrics = metrics_of(scores, targets, Convention(**fitted), labels, difficult)
    return metrics, dict(zip(labels, thresholds.tolist(), strict=True))


def bootstrapped(
    scores: Sequence[Tensor],
    targets: Tensor,
    conventions: Mapping[str, Convention],
    resamples: int,
    seed: int,
    difficult: Tensor | None = None,
) -> dict[str, Any]:
    """Entries ``bootstrap``, ``intervals`` and, for two models, ``difference`` of :func:`evaluate_scores`."""
    rules = list(conventions.values())
    with Progress("bootstrap", "resamples", resamples, log=log) as progress:
        drawn = bootstrap_map(scores, targets, rules, resamples, seed, progress.advance, difficult=difficult)
    result: dict[str, Any] = {"bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95}, "intervals": {}}
    if len(scores) > 1:
        result["difference"] = {}
    for m, name in enumerate(conventions):
        ends = interval(drawn[0, m])
        result["intervals"][name] = [_number(end) for end in ends]
        if len(scores) > 1:
            difference = drawn[0, m] - drawn[1, m]
            result["difference"][name] = {
                "interval": [_number(end) for end in interval(difference)],
                "p": p_value(difference),
            }
    return result


def _calibrated(
    images: ScoredImages, val: ScoredImages, conventions: Mapping[str, Convention], labels: Sequence[str]
) -> dict[str, Any]:
    result: dict[str, Any] = {"calibrated": {}, "thresholds": {}, "val_images": len(val.targets)}
    for name, rules in conventions.items():
        thresholds = fit_thresholds(val.scores[0], val.targets, rules, difficult=val.difficult)
        metrics, by_label = calibrated(images.scores[0], images.targets, thresholds, rules, labels, images.difficult)
        result["calibrated"][name], result["thresholds"][name] = metrics, by_label
    return result


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
