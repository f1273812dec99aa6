"""The numbers themselves, as pure functions of scores (N, C) and targets (N, C) in {1, 0, -1}.

All are fractions in [0, 1], float64, on the scores' device; no input is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gm_mlic.errors import DataError
from gm_mlic.metrics.conventions import APRule, Convention, DifficultRule

#: Scores sorted at a time. Bounds the memory of the ranks, which need several times that of the scores.
_CHUNK = 1 << 19


def check_scores(scores: Tensor, targets: Tensor, num_labels: int | None = None) -> None:
    """Raise :class:`~gm_mlic.errors.DataError` unless scores and targets can be evaluated together.

    Args:
        scores: (N, C) floating, finite, in [0, 1].
        targets: (N, C) with values 1, 0 and -1.
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
    wrong = (targets != 1) & (targets != 0) & (targets != -1)
    if wrong.any():
        value = targets[wrong][0].item()
        raise DataError(f"targets hold {value}: use 1 (present), 0 (difficult) and -1 (absent).")


def average_precision(
    scores: Tensor, targets: Tensor, ap: APRule = "rank", difficult: DifficultRule = "ignore"
) -> Tensor:
    r"""Average precision of each label.

    With the counted images sorted by falling score, let :math:`P(r)` be the share of positives among the first r.
    ``rank``: :math:`AP = \frac{1}{n} \sum_{i=1}^{n} P(r_i)` over the n positives at ranks :math:`r_i`. The other rules
    are told in :class:`~gm_mlic.metrics.conventions.Convention`. The recalls of ``voc11`` are compared in integers, so
    that 3 positives of 10 do reach recall 0.3. Equal scores rank in row order (stable) but for ``sklearn``.

    Args:
        scores: (N, C).
        targets: (N, C) in {1, 0, -1}.
        ap: which rule.
        difficult: what a target of 0 is: left out, a negative or a positive.

    Returns:
        (C,) float64 in [0, 1]; NaN for a label without a positive.
    """
    check_scores(scores, targets)
    N, C = scores.shape
    result = torch.full((C,), torch.nan, dtype=torch.float64, device=scores.device)
    if N == 0:
        return result
    step = max(1, _CHUNK // N)
    for first in range(0, C, step):
        columns = slice(first, first + step)
        positive, counted = _roles(targets[:, columns].T.contiguous(), difficult)
        result[columns] = _average_precision(scores[:, columns].T.contiguous(), positive, counted, ap)
    return result


def _average_precision(scores: Tensor, positive: Tensor, counted: Tensor, ap: APRule) -> Tensor:
    """AP of each row of (c, N) scores."""
    N = scores.shape[1]
    ranked, order = scores.sort(dim=1, descending=True, stable=True)
    positive, counted = positive.gather(1, order), counted.gather(1, order)
    hits = positive.cumsum(1, dtype=torch.int32)
    n = hits[:, -1].to(torch.int64)
    precision = hits.to(torch.float64) / counted.cumsum(1, dtype=torch.int32).clamp(min=1)
    if ap == "sklearn":  # every rank takes the precision at the end of its group of equal scores
        ends = torch.full_like(order, N - 1)
        ends[:, :-1] = torch.where(ranked[:, 1:] != ranked[:, :-1], torch.arange(N - 1, device=scores.device), N - 1)
        precision = precision.gather(1, ends.flip(1).cummin(1).values.flip(1))
    elif ap in ("envelope", "voc11"):
        precision = precision.flip(1).cummax(1).values.flip(1)
    if ap == "voc11":  # recall t/10 is first reached at the positive number ceil(t n / 10)
        reached = ((torch.arange(11, device=scores.device) * n[:, None] + 9) // 10).clamp(min=1).to(torch.int32)
        at = torch.searchsorted(hits, reached).clamp(max=N - 1)
        value = precision.gather(1, at).mean(1)
    else:
        value = (precision * positive).sum(1) / n
    return torch.where(n > 0, value, torch.nan)


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
    """
    passed = scores >= convention.threshold if convention.compare == "ge" else scores > convention.threshold
    if top is None or scores.numel() == 0:
        return passed
    last = scores.topk(min(top, scores.shape[1]), dim=1).values[:, -1:]
    among = scores >= last
    if convention.topk_ties == "stable":  # `topk` itself breaks ties in no stated order
        above = scores > last
        free = top - above.sum(1, keepdim=True)
        tied = among & ~above
        among = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= free))
    return among if convention.topk == "no_threshold" else among & passed


def precision_recall(
    scores: Tensor, targets: Tensor, convention: Convention, top: int | None = None
) -> PrecisionRecall:
    r"""CP, CR, CF1, OP, OR and OF1.

    With :math:`N^c_c` the correct, :math:`N^p_c` all predicted and :math:`N^g_c` all true occurrences of label c:
    :math:`CP = \frac{1}{C} \sum_c N^c_c / N^p_c`, :math:`CR = \frac{1}{C} \sum_c N^c_c / N^g_c`,
    :math:`OP = \sum_c N^c_c / \sum_c N^p_c`, :math:`OR = \sum_c N^c_c / \sum_c N^g_c`, and F1 is
    :math:`2PR / (P + R)`. A label that is never predicted has precision 0. Labels without a positive are left out of
    the means over labels (all NaN if no label has one) but their predictions count in OP. 0/0 is 0 in the O-numbers.
    """
    check_scores(scores, targets)
    positive, counted = _roles(targets, convention.difficult_f1)
    chosen = predicted(scores, convention, top) & counted
    correct = (chosen & positive).sum(0).to(torch.float64)
    picked, true = chosen.sum(0).to(torch.float64), positive.sum(0).to(torch.float64)
    known = true > 0
    precision, recall = correct[known] / picked[known].clamp(min=1), correct[known] / true[known]
    CP, CR = precision.mean(), recall.mean()
    CF1 = _f1(CP, CR) if convention.f1 == "of_means" else _f1(precision, recall).mean()
    OP, OR = correct.sum() / picked.sum().clamp(min=1), correct.sum() / true.sum().clamp(min=1)
    return PrecisionRecall(CP=CP, CR=CR, CF1=CF1, OP=OP, OR=OR, OF1=_f1(OP, OR))


def _f1(precision: Tensor, recall: Tensor) -> Tensor:
    both = precision + recall
    return torch.where(both == 0, 0.0, 2 * precision * recall / both)


def _roles(targets: Tensor, difficult: DifficultRule) -> tuple[Tensor, Tensor]:
    """Which targets are positives, and which count at all, as two masks of the targets' shape."""
    positive = targets >= 0 if difficult == "positive" else targets == 1
    counted = targets != 0 if difficult == "ignore" else torch.ones_like(positive)
    return positive, counted
