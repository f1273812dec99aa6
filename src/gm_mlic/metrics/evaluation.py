"""Everything there is to say about score tables: every convention, intervals, a paired test, fitted thresholds."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gm_mlic.errors import DataError
from gm_mlic.metrics.bootstrap import bootstrap_map, interval, p_value
from gm_mlic.metrics.conventions import CONVENTIONS, Convention
from gm_mlic.metrics.multilabel import MultiLabelMetrics
from gm_mlic.metrics.score_files import ScoredImages, read_scored_images
from gm_mlic.metrics.thresholds import fit_thresholds
from gm_mlic.targets import TargetFormat

log = logging.getLogger(__name__)

_LOG_S = 10.0


def evaluate_scores(
    images: ScoredImages,
    *,
    val: ScoredImages | None = None,
    conventions: Mapping[str, Convention] = CONVENTIONS,
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate the first table of scores under every convention; compare it with the second, if there is one.

    Args:
        images: scores of one model, or of two, and targets.
        val: the first model's scores of validation images: thresholds are fitted on them.
        conventions: by name.
        bootstrap: resamples of the images for 95 % intervals of mAP; 0 for none.
        seed: of the resamples.

    Returns:
        All JSON, in per cent: ``images``, ``labels``, ``target_format``, ``excluded_labels`` (without a positive),
        ``metrics`` by convention; with ``bootstrap`` its settings and ``intervals`` of mAP by convention; with ``val``
        ``calibrated`` (metrics) and ``thresholds``; with two models ``against`` (metrics) and ``difference`` of their
        mAP with interval and p.

    Raises:
        DataError: if the validation images have other labels.
    """
    labels = images.labels or tuple(str(c) for c in range(images.targets.shape[1]))
    _check_same_labels(images, val)
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
    """:func:`evaluate_scores` of files, see :func:`~gm_mlic.metrics.score_files.read_scored_images`.

    Args:
        scores, targets: the files.
        against: another model's scores of the same images.
        val: scores and targets of validation images, to fit thresholds on.
        target_format, allow_all_present: of the targets, see
            :func:`~gm_mlic.metrics.score_files.read_scored_images`.
        bootstrap, seed: see :func:`evaluate_scores`.
        out: a folder; the result is written to ``STEM.json`` there, named after the file of scores.

    Raises:
        GMMLICError: for files that cannot be evaluated.
    """
    read = partial(read_scored_images, target_format=target_format, allow_all_present=allow_all_present)
    images = read([scores] if against is None else [scores, against], targets)
    fitted_on = None if val is None else read([val[0]], val[1])
    files = {"scores": scores, "targets": targets, "against": against}
    result: dict[str, Any] = {f"{name}_file": str(path) for name, path in files.items() if path is not None}
    result |= evaluate_scores(images, val=fitted_on, bootstrap=bootstrap, seed=seed)
    if out is not None:
        path = Path(out) / f"{Path(scores).stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(result, indent=2) + "\n")
        part.replace(path)
    return result


def metrics_of(
    scores: Tensor, targets: Tensor, rules: Convention, labels: Sequence[str], difficult: Tensor | None = None
) -> dict[str, Any]:
    """The metrics as JSON: per cent, ``AP`` by label, None where there is no value. Targets are in {0, 1}."""
    metrics = MultiLabelMetrics(len(labels), labels=labels, **asdict(rules))
    metrics.update(scores, targets, difficult)
    return by_name(metrics.compute(), labels)


def by_name(values: Mapping[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """Computed metrics as JSON; it knows no NaN, so what has no value (AP of a label without positives) is None."""
    named: dict[str, Any] = {name: _number(value) for name, value in values.items() if name != "AP"}
    named["AP"] = {label: _number(ap) for label, ap in zip(labels, values["AP"], strict=True)}
    return named


def calibrated(
    scores: Tensor,
    targets: Tensor,
    thresholds: Tensor,
    rules: Convention,
    labels: Sequence[str],
    difficult: Tensor | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Metrics with fitted thresholds, and those by label."""
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
    """``bootstrap``, ``intervals`` and, for two models, ``difference``, as :func:`evaluate_scores` returns them."""
    rules = list(conventions.values())
    with _progress("bootstrap", resamples) as advance:
        drawn = bootstrap_map(scores, targets, rules, resamples, seed, advance, difficult=difficult)
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


def _check_same_labels(images: ScoredImages, val: ScoredImages | None) -> None:
    if val is None:
        return
    if val.targets.shape[1] != images.targets.shape[1]:
        raise DataError(
            f"val_scores have {val.targets.shape[1]} labels, scores {images.targets.shape[1]}: they must be the same."
        )
    if images.labels is not None and val.labels is not None and images.labels != val.labels:
        c = next(c for c, label in enumerate(images.labels) if label != val.labels[c])
        raise DataError(
            f"The labels of val_scores and scores differ: label {c} is {val.labels[c]!r} and {images.labels[c]!r}."
        )


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, which goes when it is full; else a log line every 10 s."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda count: bar.advance(task, count)
        return
    began = logged = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, logged
        done += count
        now = time.monotonic()
        if now - logged > _LOG_S:
            log.info("%s: %d of %d, %.0f s left", what, done, total, (total - done) * (now - began) / done)
            logged = now

    yield advance
