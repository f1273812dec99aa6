"""Functional metrics of scores (N, C) and targets (N, C).

Targets are in {0, 1} (bool, integers or floats), with an optional mask ``difficult`` (N, C) bool; or, with
``target_format="voc"``, in {1, 0, -1}. See :func:`~gm_mlic.targets.normalize_targets`. Tensors, arrays and nested lists
are accepted.

Results are fractions in [0, 1], float64, on the device of the scores; inputs are not modified. Counting uses numpy on
the CPU, in blocks of a few labels (AP) or a few thousand images (precision, recall), on ``torch.get_num_threads()``
threads, without temporary arrays of the scores' size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from gm_mlic.errors import ArgumentError, DataError, check_positive
from gm_mlic.metrics.conventions import APRule, Convention, get_convention
from gm_mlic.targets import DifficultRule, TargetFormat, as_table, normalize_targets, positives_and_counted

Array = np.ndarray[Any, Any]
T = TypeVar("T")

#: Labels per block of one thread; their scores are copied into contiguous rows.
_LABELS = 8
#: Images per block of one thread.
_IMAGES = 4096
#: Minimum number of scores for multithreading.
_MIN_THREADED = 1 << 18


def checked_targets(
    scores: Tensor,
    targets: Tensor,
    difficult: Tensor | None,
    target_format: TargetFormat = "binary",
    allow_all_present: bool = False,
    num_labels: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check scores and targets.

    Returns:
        The scores, and ``present`` and ``difficult`` of :func:`~gm_mlic.targets.normalize_targets`, as tensors.
    """
    scores = as_table("scores", scores)
    targets = as_table("targets", targets, scores.device)
    difficult = None if difficult is None else as_table("difficult", difficult, scores.device)
    check_scores(scores, targets, num_labels)
    present, difficult = normalize_targets(targets, difficult, target_format, allow_all_present=allow_all_present)
    return scores, present, difficult


def check_scores(scores: Tensor, targets: Tensor, num_labels: int | None = None) -> None:
    """Check scores, and that targets have the same shape; values of targets are not checked.

    Args:
        scores: (N, C) floating-point, finite, in [0, 1].
        targets: (N, C).
        num_labels: expected C, if known.

    Raises:
        DataError: if the check fails.
    """
    if scores.ndim != 2 or (num_labels is not None and scores.shape[1] != num_labels):
        expected = f"(images, {'labels' if num_labels is None else num_labels})"
        raise DataError(f"scores have shape {tuple(scores.shape)}, expected {expected}.")
    if targets.shape != scores.shape:
        raise DataError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} differ in shape.")
    if not scores.is_floating_point():
        raise DataError(f"scores are {scores.dtype}: expected floating-point probabilities in [0, 1].")
    if scores.numel() == 0:
        return
    low, high = torch.aminmax(scores)
    if torch.isnan(low) or torch.isnan(high):
        row, column = torch.isnan(scores).nonzero()[0].tolist()
        raise DataError(
            f"scores contain NaN (first at row {row}, label {column}): the model diverged or the file is damaged."
        )
    if low < 0 or high > 1:
        raise DataError(f"scores are in [{low:.4g}, {high:.4g}], expected [0, 1]: apply a sigmoid to logits.")


def all_metrics(scores: Tensor, present: Tensor, difficult: Tensor | None, convention: Convention) -> dict[str, Tensor]:
    """Metrics of :meth:`MultiLabelMetrics.compute`, in percent, of validated inputs."""
    AP = _average_precision(scores, present, difficult, convention.ap, convention.difficult_ap)
    result = {"mAP": AP.nanmean()}
    both = _precision_recalls(scores, present, difficult, convention, (None, 3))
    for prefix, numbers in zip(("", "top3/"), both, strict=True):
        result |= {prefix + name: value for name, value in vars(numbers).items()}
    return {name: 100 * value for name, value in {**result, "AP": AP}.items()}


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
    r"""Average precision per label.

    With the counted images sorted by descending score, let :math:`P(r)` be the fraction of positives among the first r.
    ``rank``: :math:`AP = \frac{1}{n} \sum_{i=1}^{n} P(r_i)` over the n positives at ranks :math:`r_i`. For the other
    rules, see :class:`~gm_mlic.metrics.conventions.Convention`. Recalls of ``voc11`` are compared as integers, so that
    3 of 10 positives reach recall 0.3. Ties are ranked in row order, except for ``sklearn``.

    Args:
        scores: (N, C).
        targets: (N, C) in {0, 1}, or in {1, 0, -1} with ``target_format="voc"``.
        ap: AP rule.
        difficult_ap: treatment of difficult image-label pairs: ``positive``, ``negative`` or ``ignore``.
        difficult, target_format, allow_all_present: see :func:`~gm_mlic.targets.normalize_targets`.

    Returns:
        (C,) float64 in [0, 1]; NaN for labels without positives.

    Raises:
        ArgumentError: if a rule is unknown.
        DataError: if scores and targets cannot be evaluated together.
    """
    Convention(ap=ap, difficult_ap=difficult_ap)  # checks both
    scores, present, difficult = checked_targets(scores, targets, difficult, target_format, allow_all_present)
    return _average_precision(scores, present, difficult, ap, difficult_ap)


def _average_precision(
    scores: Tensor, present: Tensor, difficult: Tensor | None, ap: APRule, difficult_ap: DifficultRule
) -> Tensor:
    """:func:`average_precision` of validated inputs."""

    def label_ap(scores: Array, present: Array, difficult: Array | None) -> float:
        order, at = ranking(scores, *positives_and_counted(present, difficult, difficult_ap))
        ends = tie_ends(scores[order], at) if ap == "sklearn" else None
        return area(at, ends, ap)

    values = for_each_label(label_ap, scores, present, difficult)
    return torch.tensor(values, dtype=torch.float64, device=scores.device)


def for_each_label(
    function: Callable[[Array, Array, Array | None], T], scores: Tensor, present: Tensor, difficult: Tensor | None
) -> list[T]:
    """Apply ``function(scores (N,), present (N,), difficult (N,) or None)`` to every label, in threads."""
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
    """Sort the counted images of one label by descending score (stable), and locate its positives.

    Arguments are (N,); ``counted`` is None for all images. Returns ``order`` (M,) rows, and ``at`` (n,) ascending
    positions: ``order[at]`` are the positives.
    """
    rows = None if counted is None or counted.all() else np.flatnonzero(counted)
    order = _descending(scores if rows is None else scores[rows])
    if rows is not None:
        order = rows[order]
    return order, np.flatnonzero(positive[order])


def _descending(scores: Array) -> Array:
    """Stable descending argsort."""
    if scores.dtype != np.float32 or len(scores) >= 1 << 32:
        return np.argsort(-scores, kind="stable")
    # The bits of floats in [0, 1] (without the sign of -0.0) are ordered as their values. With the row number as lower
    # bits, keys are unique, and sorting integers in place is twice as fast as a stable argsort.
    inverted = (0x3F800000 - (scores.view(np.int32) & 0x7FFFFFFF)).astype(np.int64)
    keys = (inverted << 32) | np.arange(len(scores))
    keys.sort()
    keys &= 0xFFFFFFFF
    return keys


def tie_ends(ranked: Array, at: Array) -> Array:
    """(n,) number of images that score at least as high as each positive, for descending scores ``ranked`` (M,)."""
    return np.searchsorted(-ranked, -ranked[at], side="right")


def area(at: Array, ends: Array | None, ap: APRule) -> float:
    """AP of one label from the positions (from 0) of its positives; ``ends`` are the :func:`tie_ends` (``sklearn``)."""
    n = len(at)
    if n == 0:
        return float("nan")
    precision = np.arange(1, n + 1) / (at + 1) if ends is None else np.searchsorted(at, ends) / ends
    if ap in ("envelope", "voc11"):  # precision is maximal at positives
        precision = np.maximum.accumulate(precision[::-1])[::-1]
    if ap == "voc11":
        # The first of the n positives that reaches recall 0, 0.1, ..., 1.
        precision = precision[np.maximum((np.arange(11) * n + 9) // 10, 1) - 1]
    return float(precision.mean())


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision, recall and F1 per class (C...) and overall (O...), 0-d float64 in [0, 1]."""

    CP: Tensor
    CR: Tensor
    CF1: Tensor
    OP: Tensor
    OR: Tensor
    OF1: Tensor


def predicted(scores: Tensor, convention: Convention | str, top: int | None = None) -> Tensor:
    """Predicted labels as a mask (N, C) bool.

    Args:
        scores: (N, C).
        convention: name or options; ``threshold``, ``compare`` and, with ``top``, ``topk`` and ``topk_ties`` are used.
        top: restrict predictions to the ``top`` highest scores of each image.

    Raises:
        ArgumentError: if the convention is unknown or has thresholds for another number of labels, or ``top`` is below
            1.
    """
    scores, convention = as_table("scores", scores), get_convention(convention)
    if top is not None:
        check_positive(top=top)
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
        among = _among_highest(scores, top, convention.topk_ties == "all")
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
    convention: Convention | str,
    top: int | None = None,
    *,
    difficult: Tensor | None = None,
    target_format: TargetFormat = "binary",
    allow_all_present: bool = False,
) -> PrecisionRecall:
    r"""Per-class and overall precision, recall and F1 (CP, CR, CF1, OP, OR, OF1).

    With :math:`N^c_c` correct, :math:`N^p_c` predicted and :math:`N^g_c` true occurrences of label c:
    :math:`CP = \frac{1}{C} \sum_c N^c_c / N^p_c`, :math:`CR = \frac{1}{C} \sum_c N^c_c / N^g_c`,
    :math:`OP = \sum_c N^c_c / \sum_c N^p_c`, :math:`OR = \sum_c N^c_c / \sum_c N^g_c`, and
    :math:`F1 = 2PR / (P + R)`. Labels that are never predicted have precision 0. Labels without positives are excluded
    from means over labels (NaN if no label has any), but their predictions count in OP. Overall metrics are 0 for 0/0.

    Args:
        scores: (N, C).
        targets: (N, C) in {0, 1}, or in {1, 0, -1} with ``target_format="voc"``.
        convention: name or options; those of precision, recall and F1 are used.
        top: restrict predictions to the ``top`` highest scores of each image.
        difficult, target_format, allow_all_present: see :func:`~gm_mlic.targets.normalize_targets`.

    Raises:
        ArgumentError: if the convention is unknown or has thresholds for another number of labels, or ``top`` is below
            1.
        DataError: if scores and targets cannot be evaluated together.
    """
    convention = get_convention(convention)
    if top is not None:
        check_positive(top=top)
    scores, present, difficult = checked_targets(scores, targets, difficult, target_format, allow_all_present)
    (numbers,) = _precision_recalls(scores, present, difficult, convention, (top,))
    return numbers


def _precision_recalls(
    scores: Tensor, present: Tensor, difficult: Tensor | None, convention: Convention, tops: Sequence[int | None]
) -> list[PrecisionRecall]:
    """:func:`precision_recall` for each of ``tops``, with validated inputs."""
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
    CF1 = _f1(CP, CR) if convention.f1 == "f1_of_means" else _f1(precision, recall).mean()
    OP, OR = correct.sum() / picked.sum().clamp(min=1), correct.sum() / true.sum().clamp(min=1)
    return PrecisionRecall(CP=CP, CR=CR, CF1=CF1, OP=OP, OR=OR, OF1=_f1(OP, OR))


def _f1(precision: Tensor, recall: Tensor) -> Tensor:
    both = precision + recall
    return torch.where(both == 0, 0.0, 2 * precision * recall / both)


def _thresholds(convention: Convention, scores: Array) -> Array:
    """Threshold () or thresholds (C,), in the precision of the scores."""
    thresholds = np.asarray(convention.threshold, dtype=scores.dtype)
    if thresholds.ndim and len(thresholds) != scores.shape[1]:
        raise ArgumentError("threshold", f"has {len(thresholds)} values for {scores.shape[1]} labels.")
    return thresholds


def _array(tensor: Tensor) -> Array:
    """Numpy view of a tensor; half precision becomes float32."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return (tensor.float() if half else tensor).numpy(force=True)


def in_threads(function: Callable[[int], T], firsts: Iterable[int], size: int) -> list[T]:
    """Ordered ``map`` in threads; numpy releases the GIL while sorting and comparing."""
    if size < _MIN_THREADED or torch.get_num_threads() == 1:
        return [function(first) for first in firsts]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(function, firsts))
