"""Bootstrap over images: confidence intervals of mAP and paired tests between models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gm_mlic.errors import DataError, check_positive
from gm_mlic.metrics.conventions import APRule, Convention, get_convention
from gm_mlic.metrics.functional import area, checked_targets, for_each_label, in_threads, ranking, tie_ends
from gm_mlic.targets import DifficultRule, TargetFormat, positives_and_counted

Array = np.ndarray[Any, Any]
#: Results of :func:`_ranked` for one label, by rule of difficult labels.
_Ranked = dict[DifficultRule, tuple[Array, Array, Array]]

#: Resamples per batch; each takes N bytes.
_BATCH = 64


def interval(resampled: Array, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval: bounds of the central ``level`` of the resampled values, ignoring NaN."""
    known = resampled[np.isfinite(resampled)]
    if not known.size:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def p_value(resampled_difference: Array) -> float:
    r"""Two-sided p-value of "no difference" from B resampled differences :math:`d_b`.

    :math:`p = \min(1, 2 (1 + \min(|\{d_b \le 0\}|, |\{d_b \ge 0\}|)) / (B + 1))`. It is at least 2 / (B + 1), and below
    0.05 approximately when the 95 % percentile interval excludes 0.
    """
    d = resampled_difference[np.isfinite(resampled_difference)]
    tail = min(int((d <= 0).sum()), int((d >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (len(d) + 1))


def bootstrap_map(
    scores: Sequence[Tensor],
    targets: Tensor,
    conventions: Sequence[Convention | str],
    resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    *,
    difficult: Tensor | None = None,
    target_format: TargetFormat = "binary",
    allow_all_present: bool = False,
) -> Array:
    """Compute mAP over resampled images, exactly as :class:`MultiLabelMetrics` for each resample.

    A resample draws N images with replacement; copies of an image have adjacent ranks. All models and conventions use
    the same resamples, so that differences are paired. Labels are sorted once; each resample costs N C additions.

    Args:
        scores: (N, C) of each model.
        targets: (N, C) in {0, 1}, or in {1, 0, -1} with ``target_format="voc"``.
        conventions: names or options of M conventions; only ``ap`` and ``difficult_ap`` are used.
        resamples: B.
        seed: seed of the draws; a smaller B gives the first resamples of a larger one.
        progress: callback with the number of resamples since the last call.
        difficult, target_format, allow_all_present: see :func:`~gm_mlic.targets.normalize_targets`.

    Returns:
        (models, M, B) float64 in percent; NaN if no label has a positive.

    Raises:
        DataError: if scores and targets cannot be evaluated together.
        ArgumentError: if ``resamples`` is below 1, or a convention is unknown.
    """
    check_positive(resamples=resamples)
    chosen = [get_convention(convention) for convention in conventions]
    checked = [checked_targets(table, targets, difficult, target_format, allow_all_present) for table in scores]
    _, present, difficult = checked[0]
    N = len(present)
    if not N:
        raise DataError("There are no scores to evaluate: pass at least one image.")
    # Without difficult labels, the rules for them are equivalent.
    any_difficult = difficult is not None and bool(difficult.any())
    wanted = [(rule.ap, rule.difficult_ap if any_difficult else "ignore") for rule in chosen]
    rules: list[tuple[APRule, DifficultRule]] = sorted(set(wanted))

    def rank_label(scores: Array, present: Array, difficult: Array | None) -> _Ranked:
        return {rule: _ranked(scores, present, difficult, rule) for _, rule in rules}

    models = [for_each_label(rank_label, table, present, difficult) for table, _, _ in checked]
    draw = np.random.default_rng(seed)
    result = np.empty((len(scores), len(conventions), resamples))
    for first in range(0, resamples, _BATCH):
        count = min(_BATCH, resamples - first)
        # uint8 suffices: an image is drawn once on average.
        copies = np.stack([np.bincount(draw.integers(0, N, N), minlength=N).astype(np.uint8) for _ in range(count)])
        for labels, of_model in zip(models, result, strict=True):
            mAP = _resampled(labels, rules, copies)
            of_model[:, first : first + count] = mAP[[rules.index(rule) for rule in wanted]]
        if progress is not None:
            progress(count)
    return 100 * result


def _resampled(labels: Sequence[_Ranked], rules: Sequence[tuple[APRule, DifficultRule]], copies: Array) -> Array:
    """Compute mAP (M, B) in [0, 1] for M rules, with ``copies`` (B, N) uint8 of each image."""

    def label_ap(c: int) -> Array:
        values = np.empty((len(rules), len(copies)))
        for b, drawn in enumerate(copies):
            places = {rule: _places(drawn, *ranked) for rule, ranked in labels[c].items()}
            for m, (ap, rule) in enumerate(rules):
                at, ends = places[rule]
                values[m, b] = area(at, ends if ap == "sklearn" else None, ap)
        return values

    AP = np.stack(in_threads(label_ap, range(len(labels)), copies.size))
    known = np.isfinite(AP)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, AP, 0).sum(axis=0) / known.sum(axis=0)
    return mean


def _ranked(scores: Array, present: Array, difficult: Array | None, rule: DifficultRule) -> tuple[Array, Array, Array]:
    """Rows (M,) of a label by descending score up to the last positive, positions (n,) of positives, and tie ends."""
    order, at = ranking(scores, *positives_and_counted(present, difficult, rule))
    ends = tie_ends(scores[order], at)
    return order[: ends[-1] if len(at) else 0].astype(np.int32), at, ends


def _places(drawn: Array, order: Array, at: Array, ends: Array) -> tuple[Array, Array]:
    """Arguments of :func:`area` for a resample with ``drawn`` (N,) copies of each image."""
    seen = drawn[order].cumsum(dtype=np.int64)
    n = drawn[order[at]]
    offset = np.repeat(seen[at] - n.cumsum(dtype=np.int64), n)  # images before each copy that are not positives
    return offset + np.arange(len(offset)), np.repeat(seen[ends - 1], n)
