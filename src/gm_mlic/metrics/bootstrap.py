"""Bootstrap over images: confidence intervals of mAP and paired tests between models."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from gm_mlic.errors import ArgumentError, DataError
from gm_mlic.metrics.conventions import APRule, Convention, get_convention
from gm_mlic.metrics.functional import (
    check_scores,
    eleven_points,
    for_each_label,
    in_threads,
    ranking,
    tie_ends,
)
from gm_mlic.targets import DifficultRule, TargetFormat, as_table, normalize_targets, positives_and_counted

Array = np.ndarray[Any, Any]

#: Resamples per batch; their weights take N bytes each.
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
    if resamples < 1:
        raise ArgumentError("resamples", f"must be 1 or more, got {resamples}.")
    chosen = [get_convention(convention) for convention in conventions]
    scores, targets = [as_table("scores", table) for table in scores], as_table("targets", targets)
    difficult = None if difficult is None else as_table("difficult", difficult, targets.device)
    if not len(targets):
        raise DataError("There are no scores to evaluate: pass at least one image.")
    for table in scores:
        check_scores(table, targets)
    present, difficult = normalize_targets(targets, difficult, target_format, allow_all_present=allow_all_present)
    # Without difficult labels, the rules for them are equivalent.
    any_difficult = difficult is not None and bool(difficult.any())
    wanted = [(rule.ap, rule.difficult_ap if any_difficult else "ignore") for rule in chosen]
    rules: list[tuple[APRule, DifficultRule]] = sorted(set(wanted))
    ranked = [
        (model, rule, _ranked_labels(table, present, difficult, rule, {ap for ap, d in rules if d == rule}))
        for model, table in enumerate(scores)
        for rule in sorted({rule for _, rule in rules})
    ]
    draw = np.random.default_rng(seed)
    N, C = targets.shape
    result = np.empty((len(scores), len(conventions), resamples))
    for first in range(0, resamples, _BATCH):
        count = min(_BATCH, resamples - first)
        # uint8 suffices: an image is drawn once on average.
        drawn = [np.bincount(draw.integers(0, N, N), minlength=N).astype(np.uint8) for _ in range(count)]
        weights = np.ascontiguousarray(np.stack(drawn).T)
        AP: dict[tuple[int, APRule, DifficultRule], Array] = {
            (model, ap, rule): np.full((C, count), math.nan) for model in range(len(scores)) for ap, rule in rules
        }
        for model, rule, labels in ranked:
            resampled = in_threads(lambda c, w=weights, r=labels: r[c].resampled(w), range(C), weights.size)  # type: ignore[misc]
            for c, values in enumerate(resampled):
                for ap, value in values.items():
                    AP[model, ap, rule][c] = value
        for model in range(len(scores)):
            for m, (ap, d) in enumerate(wanted):
                result[model, m, first : first + count] = _mean(AP[model, ap, d])
        if progress is not None:
            progress(count)
    return 100 * result


def _mean(AP: Array) -> Array:
    """Mean over labels without NaN: (C, B) to (B,)."""
    known = ~np.isnan(AP)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, AP, 0).sum(axis=0) / known.sum(axis=0)
    return mean


@dataclass(frozen=True)
class _RankedLabel:
    """Counted images of one label, sorted by descending score.

    Attributes:
        order: (M,) rows.
        at: (n,) positions of the positives in ``order``.
        ends: (n,) number of images that score at least as high as each positive; None if no rule needs it.
        rules: AP rules to compute.
    """

    order: Array
    at: Array
    ends: Array | None
    rules: frozenset[APRule]

    def resampled(self, weights: Array) -> dict[APRule, Array]:
        """AP (B,) by rule, with ``weights`` (N, B) uint8 copies of each image."""
        if not len(self.at):
            return {}
        drawn = weights[self.order[self.at]].astype(np.float64)  # (n, B): copies of each positive
        hits = drawn.cumsum(axis=0)
        n = hits[-1]
        # Images drawn up to and including each positive; for ties, up to the end of its group.
        seen, seen_tied = self._seen(weights, self.at + 1, self.at + 1 if self.ends is None else self.ends)
        AP: dict[APRule, Array] = {}
        with np.errstate(invalid="ignore", divide="ignore"):
            if "rank" in self.rules:
                # The j-th copy has precision (before + j) / (seen before + j) = 1 - negatives / (seen before + j); the
                # sum over all copies is drawn - negatives * (1/(seen before + 1) + ... + 1/seen).
                harmonic = _harmonic(weights.shape[0])
                last, before = harmonic[seen.astype(np.int64)], harmonic[(seen - drawn).astype(np.int64)]
                AP["rank"] = (drawn - (seen - hits) * (last - before)).sum(axis=0) / n
            if "sklearn" in self.rules:
                assert self.ends is not None
                tied = hits[np.searchsorted(self.at, self.ends) - 1]
                AP["sklearn"] = (drawn * np.nan_to_num(tied / seen_tied)).sum(axis=0) / n
            if self.rules & {"envelope", "voc11"}:
                # Precision is highest at the last copy, and falls until the next positive.
                precision = np.nan_to_num(hits / seen)
                envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
                if "envelope" in self.rules:
                    AP["envelope"] = (drawn * envelope).sum(axis=0) / n
                if "voc11" in self.rules:
                    AP["voc11"] = _eleven(envelope, hits)
        return {ap: np.where(n > 0, values, math.nan) for ap, values in AP.items()}

    def _seen(self, weights: Array, *counts: Array) -> list[Array]:
        """(n, B) copies drawn among the first images, for each array (n,) of ``counts``."""
        stops = np.unique(np.concatenate(counts))
        gathered = weights[self.order[: stops[-1]]]
        sums = np.add.reduceat(gathered, np.concatenate([[0], stops[:-1]]), axis=0, dtype=np.int32)
        seen = sums.cumsum(axis=0, dtype=np.float64)
        return [seen[np.searchsorted(stops, count)] for count in counts]


def _ranked_labels(
    scores: Tensor, present: Tensor, difficult: Tensor | None, rule: DifficultRule, rules: set[APRule]
) -> list[_RankedLabel]:
    def rank_label(scores: Array, present: Array, difficult: Array | None) -> _RankedLabel:
        order, at = ranking(scores, *positives_and_counted(present, difficult, rule))
        ends = tie_ends(scores[order], at) if "sklearn" in rules else None
        # Images after the last positive (and its ties) are not used.
        used = 0 if not len(at) else int(at[-1] + 1 if ends is None else ends[-1])
        return _RankedLabel(order[:used].astype(np.int32), at, ends, frozenset(rules))

    return for_each_label(rank_label, scores, present, difficult)


def _eleven(envelope: Array, hits: Array) -> Array:
    """11-point AP (B,) from the precision envelope and the hits at each positive, both (n, B)."""
    values = np.empty(envelope.shape[1])
    for b, n in enumerate(hits[-1].astype(np.int64)):
        reached = np.searchsorted(hits[:, b], eleven_points(int(n)) + 1)
        values[b] = envelope[np.minimum(reached, len(hits) - 1), b].mean()
    return values


_HARMONIC: dict[int, Array] = {}


def _harmonic(N: int) -> Array:
    """(N + 1,) harmonic numbers 0, 1, 1 + 1/2, ..."""
    if N not in _HARMONIC:
        _HARMONIC.clear()
        _HARMONIC[N] = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, N + 1))])
    return _HARMONIC[N]
