"""Multi-label metrics under the conventions of the literature."""

from __future__ import annotations

from gm_mlic.metrics.conventions import PRESETS, Convention, convention
from gm_mlic.metrics.functional import PrecisionRecall, average_precision, precision_recall, predicted
from gm_mlic.metrics.multilabel import MultiLabelMetrics

__all__ = [
    "PRESETS",
    "Convention",
    "MultiLabelMetrics",
    "PrecisionRecall",
    "average_precision",
    "convention",
    "precision_recall",
    "predicted",
]
