"""The numbers themselves, as pure functions of scores (N, C) and targets (N, C).

Targets are in {0, 1}, of bool, integers or floats, with an optional mask ``difficult`` (N, C) bool; or, with
``target_format="voc"``, in {1, 0, -1}. See :func:`~gm_mlic.targets.normalize_targets`.

All are fractions in [0, 1], float64, on the scores' device; no input is changed. The counting is done by numpy on the
CPU, a few labels (AP) or a few thousand images (precision, recall) at a time, on ``torch.get_num_threads()`` threads:
no table of the scores' size is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gm_mlic.errors import ArgumentError, DataError
from gm_mlic.metrics.conventions import APRule, Convention, DifficultRule
from gm_mlic.targets import TargetFormat, normalize_targets

Array = np.ndarray[Any, Any]
T = TypeVar("T")

#: Labels ranked at a time by one thread: their scores are copied into contiguous rows.
_LABELS = 8
#: Images judged at a time by one thread.
_IMAGES = 4096
#: Scores from which a second thread is worth its start.
_MANY = 1 << 18


def checked_targets(
    scores: Tensor,
    targets: Tensor,
    difficult: Tensor | None,
    target_format: TargetFormat,
    allow_all_present: bool,
    num_labels: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``present`` and ``difficult`` (:func:`~gm_mlic.targets.normalize_targets`) of tables that fit each other."""
    check_scores(scores, targets, num_labels)
    return normalize_targets(targets, difficult, target_format, allow_all_present=allow_all_present)


def check_scores(scores: Tensor, targets: Tensor, num_labels: int | None = None) -> None:
    """Raise :class:`~gm_mlic.errors.DataError` unless scores can be evaluated with targets; their values aside.

    Args:
        scores: (N, C) floating, finite, in [0, 1].
        targets: (N, C).
        num_labels: C, if it is known from elsewhere.
    """
    if scores.ndim != 2 or (num_labels is not None and scores.shape[1] != num_labels):
        expected = f"(images, {'labels' if num_labels is None else num_labels})"
        raise DataError(f"scores have shape {tuple(scores.shape)}, expected {expected}.")
    if targets.shape != scores.shape:
        raise DataError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} differ in shape.")
    if not scores.is_floating_point():
        raise DataError(f"scores are {scores.dtype}: give floating-point probabilities in [0, 1].")
    if scores.numel() == 0:
        return
    low, high = torch.aminmax(scores)
    if torch.isnan(low) or torch.isnan(high):
        row, column = torch.isnan(scores).nonzero()[0].tolist()
        raise DataError(
            f"scores hold NaN (first at row {row}, label {column}): the model diverged or the file is damaged."
        )
    if low < 0 or high > 1:
        raise DataError(f"scores lie in [{low:.4g}, {high:.4g}], not in [0, 1]: apply a sigmoid to logits.")


def average_precision(
    scores: Tensor,
    targets: Tensor,
    ap: APRule = "rank",
    difficult_ap: DifficultRule = "ignore",
    *,
    difficult: Tensor | None = None,
    target_format: TargetFormat = "binary",
    allow_all_present: bool = False,
) -> Tensor:
    r"""Average precision of each label.

    With the counted images sorted by falling score, let :math:`P(r)` be the share of positives among the first r.
    ``rank``: :math:`AP = \frac{1}{n} \sum_{i=1}^{n} P(r_i)` over the n positives at ranks :math:`r_i`. The other rules
    are told in :class:`~gm_mlic.metrics.conventions.Convention`. The recalls of ``voc11`` are compared in integers, so
    that 3 positives of 10 do reach recall 0.3. Equal scores rank in row order (stable) but for ``sklearn``.

    Args:
        scores: (N, C).
        targets: (N, C) in {0, 1}, or in {1, 0, -1} with ``target_format="voc"``.
        ap: which rule.
        difficult_ap: what a difficult pair of image and label is: left out, a negative or a positive.
        difficult, target_format, allow_all_present: see :func:`~gm_mlic.targets.normalize_targets`.

    Returns:
        (C,) float64 in [0, 1]; NaN for a label without a positive.
    """
    present, difficult = checked_targets(scores, targets, difficult, target_format, allow_all_present)
    return _average_precision(scores, present, difficult, ap, difficult_ap)


def _average_precision(
    scores: Tensor, present: Tensor, difficult: Tensor | None, ap: APRule, difficult_ap: DifficultRule
) -> Tensor:
    """:func:`average_precision` of tables that were checked."""

    def label_ap(scores: Array, present: Array, difficult: Array | None) -> float:
        order, at = ranking(scores, *positives_and_counted(present, difficult, difficult_ap))
        ends = tie_ends(scores[order], at) if ap == "sklearn" else None
        return area(at, ends, ap)

    values = for_each_label(label_ap, scores, present, difficult)
    return torch.tensor(values, dtype=torch.float64, device=scores.device)


def for_each_label(
    function: Callable[[Array, Array, Array | None], T], scores: Tensor, present: Tensor, difficult: Tensor | None
) -> list[T]:
    """``function(scores (N,), present (N,), difficult (N,) or None)`` of every label, in threads."""
    tables = [None if table is None else _array(table) for table in (scores, present, difficult)]

    def label_block(first: int) -> list[T]:
        labels = range(first, min(first + _LABELS, C))
        columns = [
            [None] * len(labels) if table is None else np.ascontiguousarray(table[:, first : first + _LABELS].T)
            for table in tables
        ]
        return [function(*row) for row in zip(*columns, strict=True)]

    C = scores.shape[1]
    return [value for part in in_threads(label_block, range(0, C, _LABELS), scores.numel()) for value in part]


def ranking(scores: Array, positive: Array, counted: Array | None) -> tuple[Array, Array]:
    """The counted images of one label by falling score, equal scores in row order, and the places of its positives.

    Args:
        scores: (N,) float32 or float64 in [0, 1].
        positive: (N,) bool.
        counted: (N,) bool; None for all.

    Returns:
        ``order`` (M,) rows, best first, and ``at`` (n,), rising: ``order[at]`` are the positives.
    """
    rows = None if counted is None or counted.all() else np.flatnonzero(counted)
    order = _falling(scores if rows is None else scores[rows])
    if rows is not None:
        order = rows[order]
    return order, np.flatnonzero(positive[order])


def _falling(scores: Array) -> Array:
    """Stable argsort, highest first."""
    if scores.dtype != np.float32 or len(scores) >= 1 << 32:
        return np.argsort(-scores, kind="stable")
    # The bits of floats in [0, 1] (without the sign of -0.0) rise with their value. With the row below them, the keys
    # are unique, and sorting integers in place is twice as fast as a stable argsort.
    falling = (0x3F800000 - (scores.view(np.int32) & 0x7FFFFFFF)).astype(np.int64)
    keys = (falling << 32) | np.arange(len(scores))
    keys.sort()
    keys &= 0xFFFFFFFF
    return keys


def tie_ends(ranked: Array, at: Array) -> Array:
    """How many images score at least as high as each positive: (n,), for falling scores ``ranked`` (M,)."""
    return np.searchsorted(-ranked, -ranked[at], side="right")


def area(at: Array, ends: Array | None, ap: APRule) -> float:
    """AP of one label from the places (from 0) of its positives; ``ends`` are the :func:`tie_ends` (``sklearn``)."""
    n = len(at)
    if n == 0:
        return float("nan")
    precision = np.arange(1, n + 1) / (at + 1) if ends is None else np.searchsorted(at, ends) / ends
    if ap in ("envelope", "voc11"):  # between two positives precision falls, so the best is at a positive
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    if ap == "voc11":
        precision = precision[eleven_points(n)]
    return float(precision.mean())


def eleven_points(n: int) -> Array:
    """(11,) which of n positives (from 0) first reaches recall 0, 0.1, ..., 1."""
    return np.maximum((np.arange(11) * n + 9) // 10, 1) - 1


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision, recall and F1 as means over labels (C...) and over all decisions (O...), 0-d float64 in [0, 1]."""

    CP: Tensor
    CR: Tensor
    CF1: Tensor
    OP: Tensor
    OR: Tensor
    OF1: Tensor


def predicted(scores: Tensor, convention: Convention, top: int | None = None) -> Tensor:
    """Which labels count as predicted: (N, C) bool.

    Args:
        scores: (N, C).
        convention: its ``threshold``, ``compare`` and, with ``top``, its ``topk`` and ``topk_ties``.
        top: allow only the labels among the ``top`` highest scores of each image.

    Raises:
        ArgumentError: if the convention has thresholds for another number of labels.
    """
    array = _array(scores)
    (chosen,) = _predicted(array, _thresholds(convention, array), convention, (top,))
    return torch.from_numpy(chosen).to(scores.device)


def _predicted(scores: Array, thresholds: Array, convention: Convention, tops: Sequence[int | None]) -> Iterable[Array]:
    """:func:`predicted` for each of ``tops``."""
    passed = scores >= thresholds if convention.compare == "ge" else scores > thresholds
    for top in tops:
        if top is None or scores.size == 0:
            yield passed
            continue
        among = _among_highest(scores, top, convention.topk_ties == "kept")
        yield among if convention.topk == "no_threshold" else among & passed


def _among_highest(scores: Array, top: int, keep_ties: bool) -> Array:
    C = scores.shape[1]
    if top >= C:
        return np.ones_like(scores, dtype=bool)
    last = np.partition(scores, C - top, axis=1)[:, C - top, None]
    among: Array = scores >= last
    if not keep_ties:
        crowded = np.flatnonzero(np.count_nonzero(among, axis=1) > top)
        crowded_scores, last = scores[crowded], last[crowded]
        above, tied = crowded_scores > last, crowded_scores == last
        free = top - np.count_nonzero(above, axis=1)[:, None]
        among[crowded] = above | (tied & (tied.cumsum(axis=1) <= free))
    return among


def precision_recall(
    scores: Tensor,
    targets: Tensor,
    convention: Convention,
    top: int | None = None,
    *,
    difficult: Tensor | None = None,
    target_format: TargetFormat = "binary",
    allow_all_present: bool = False,
) -> PrecisionRecall:
    r"""CP, CR, CF1, OP, OR and OF1.

    With :math:`N^c_c` the correct, :math:`N^p_c` all predicted and :math:`N^g_c` all true occurrences of label c:
    :math:`CP = \frac{1}{C} \sum_c N^c_c / N^p_c`, :math:`CR = \frac{1}{C} \sum_c N^c_c / N^g_c`,
    :math:`OP = \sum_c N^c_c / \sum_c N^p_c`, :math:`OR = \sum_c N^c_c / \sum_c N^g_c`, and F1 is
    :math:`2PR / (P + R)`. A label that is never predicted has precision 0. Labels without a positive are left out of
    the means over labels (all NaN if no label has one) but their predictions count in OP. 0/0 is 0 in the O-numbers.

    Args:
        scores: (N, C).
        targets: (N, C) in {0, 1}, or in {1, 0, -1} with ``target_format="voc"``.
        convention: its options for F1.
        top: allow only the labels among the ``top`` highest scores of each image.
        difficult, target_format, allow_all_present: see :func:`~gm_mlic.targets.normalize_targets`.

    Raises:
        ArgumentError: if the convention has thresholds for another number of labels.
    """
    present, difficult = checked_targets(scores, targets, difficult, target_format, allow_all_present)
    (numbers,) = _precision_recalls(scores, present, difficult, convention, (top,))
    return numbers


def _precision_recalls(
    scores: Tensor, present: Tensor, difficult: Tensor | None, convention: Convention, tops: Sequence[int | None]
) -> list[PrecisionRecall]:
    """:func:`precision_recall` for each of ``tops``, of tables that were checked."""
    s, p = _array(scores), _array(present)
    d = None if difficult is None else _array(difficult)
    thresholds = _thresholds(convention, s)

    def image_block(first: int) -> list[Array]:
        rows = slice(first, first + _IMAGES)
        positive, counted = positives_and_counted(p[rows], None if d is None else d[rows], convention.difficult_f1)
        counts = [positive.sum(axis=0)]
        for chosen in _predicted(s[rows], thresholds, convention, tops):
            picked = chosen if counted is None else chosen & counted
            counts += [picked.sum(axis=0), (chosen & positive).sum(axis=0)]
        return counts

    blocks = in_threads(image_block, range(0, len(s), _IMAGES), s.size)
    empty = np.zeros((1 + 2 * len(tops), s.shape[1]), dtype=np.int64)
    true, *rest = torch.from_numpy(sum((np.stack(block) for block in blocks), start=empty)).to(
        scores.device, torch.float64
    )
    return [_numbers(correct, picked, true, convention) for picked, correct in zip(*[iter(rest)] * 2, strict=True)]


def _numbers(correct: Tensor, picked: Tensor, true: Tensor, convention: Convention) -> PrecisionRecall:
    known = true > 0
    precision, recall = correct[known] / picked[known].clamp(min=1), correct[known] / true[known]
    CP, CR = precision.mean(), recall.mean()
    CF1 = _f1(CP, CR) if convention.f1 == "of_means" else _f1(precision, recall).mean()
    OP, OR = correct.sum() / picked.sum().clamp(min=1), correct.sum() / true.sum().clamp(min=1)
    return PrecisionRecall(CP=CP, CR=CR, CF1=CF1, OP=OP, OR=OR, OF1=_f1(OP, OR))


def _f1(precision: Tensor, recall: Tensor) -> Tensor:
    both = precision + recall
    return torch.where(both == 0, 0.0, 2 * precision * recall / both)


def positives_and_counted(present: Array, difficult: Array | None, rule: DifficultRule) -> tuple[Array, Array | None]:
    """Which pairs are positives, and which count at all (None: all; all positives do), as masks of the same shape."""
    if difficult is None:
        return present, None
    return present | difficult if rule == "positive" else present, ~difficult if rule == "ignore" else None


def _thresholds(convention: Convention, scores: Array) -> Array:
    """The threshold (), or those of the labels (C,), in the precision of the scores."""
    thresholds = np.asarray(convention.threshold, dtype=scores.dtype)
    if thresholds.ndim and len(thresholds) != scores.shape[1]:
        raise ArgumentError("threshold", f"has {len(thresholds)} values for {scores.shape[1]} labels.")
    return thresholds


def _array(tensor: Tensor) -> Array:
    """A tensor as numpy sees it; half precision, which numpy lacks or is slow at, as float32."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    array: Array = (tensor.detach().float() if half else tensor.detach()).cpu().numpy()
    return array


def in_threads(function: Callable[[int], T], firsts: Iterable[int], size: int) -> list[T]:
    """``function`` of each, in order. Sorting and comparing run without Python's lock, so threads help."""
    if size < _MANY or torch.get_num_threads() == 1:
        return [function(first) for first in firsts]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, firsts))
