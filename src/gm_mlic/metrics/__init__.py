"""Multi-label metrics with the conventions of the literature.

:class:`MultiLabelMetrics` is imported on first use, since torchmetrics imports torchvision and matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gm_mlic._lazy import lazy_attributes
from gm_mlic.metrics.bootstrap import bootstrap_map, interval, p_value
from gm_mlic.metrics.conventions import CONVENTIONS, Convention, get_convention
from gm_mlic.metrics.evaluation import evaluate_files, evaluate_scores
from gm_mlic.metrics.functional import PrecisionRecall, average_precision, precision_recall, predicted
from gm_mlic.metrics.score_files import ScoredImages, read_scored_images, write_scored_images
from gm_mlic.metrics.thresholds import fit_thresholds

if TYPE_CHECKING:
    from gm_mlic.metrics.multilabel import MultiLabelMetrics

__all__ = [
    "CONVENTIONS",
    "Convention",
    "MultiLabelMetrics",
    "PrecisionRecall",
    "ScoredImages",
    "average_precision",
    "bootstrap_map",
    "evaluate_files",
    "evaluate_scores",
    "fit_thresholds",
    "get_convention",
    "interval",
    "p_value",
    "precision_recall",
    "predicted",
    "read_scored_images",
    "write_scored_images",
]

__getattr__, _ = lazy_attributes(__name__, {"multilabel": ("MultiLabelMetrics",)})


def __dir__() -> list[str]:
    return __all__
