"""Per-label thresholds fitted on validation images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gm_mlic.errors import DataError
from gm_mlic.metrics.conventions import Convention, get_convention
from gm_mlic.metrics.functional import checked_targets, for_each_label, ranking, tie_ends
from gm_mlic.targets import TargetFormat, positives_and_counted

Array = np.ndarray[Any, Any]


def fit_thresholds(
    scores: Tensor,
    targets: Tensor,
    convention: Convention | str = "mlgcn",
    *,
    difficult: Tensor | None = None,
    target_format: TargetFormat = "binary",
    allow_all_present: bool = False,
) -> Tensor:
    r"""Fit the thresholds that maximize each label's F1.

    :math:`F1 = 2 N^c / (N^p + N^g)` is evaluated after every group of tied scores. The threshold is halfway between the
    best group's score and the next lower one (0 after the last); ties are resolved to the highest. Labels without
    positives keep the convention's threshold. Pass the result as ``threshold``.

    Fit on validation images only. Thresholds of labels with few positives are noisy: check them on other images.

    Args:
        scores: (N, C) in [0, 1].
        targets: (N, C) in {0, 1}, or in {1, 0, -1} with ``target_format="voc"``.
        convention: name or options; ``difficult_f1``, ``compare`` and ``threshold`` are used (default: ``mlgcn``).
        difficult, target_format, allow_all_present: see :func:`~gm_mlic.targets.normalize_targets`.

    Returns:
        (C,) float64 in [0, 1], exact in the precision of the scores.

    Raises:
        ArgumentError: if the convention is unknown.
        DataError: if scores and targets cannot be evaluated together, or are empty.
    """
    rules = get_convention(convention)
    scores, present, difficult = checked_targets(scores, targets, difficult, target_format, allow_all_present)
    if not len(scores):
        raise DataError("There are no scores to fit thresholds on: pass at least one image.")

    def fit_label(scores: Array, present: Array, difficult: Array | None) -> float:
        positive, counted = positives_and_counted(present, difficult, rules.difficult_f1)
        order, at = ranking(scores, positive, counted)
        ranked = scores[order]
        if rules.compare == "gt":
            at = at[ranked[at] > 0]  # a score of 0 passes no threshold
        if not len(at):
            return float("nan")
        ends = tie_ends(ranked, at)
        f1 = np.searchsorted(at, ends) / (ends + positive.sum())
        best = int(np.argmax(f1))
        high = ranked[at[best]]
        low = ranked[ends[best]] if ends[best] < len(ranked) else np.zeros_like(high)
        middle = low + (high - low) * high.dtype.type(0.5)  # numpy 1 converts float32 / 2 to float64
        if rules.compare == "ge":
            return float(high if middle == low else middle)
        return float(low if middle == high else middle)

    fitted = torch.tensor(for_each_label(fit_label, scores, present, difficult), dtype=torch.float64)
    return torch.where(fitted.isnan(), torch.tensor(rules.threshold, dtype=torch.float64), fitted).to(scores.device)
