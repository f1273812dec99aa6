"""Multi-label metrics with the conventions of the literature.

Names are imported on first use, since torchmetrics (needed by :class:`MultiLabelMetrics`) imports torchvision and
matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gm_mlic._lazy import lazy_attributes

if TYPE_CHECKING:
    from gm_mlic.metrics.bootstrap import bootstrap_map, interval, p_value
    from gm_mlic.metrics.conventions import CONVENTIONS, Convention, get_convention
    from gm_mlic.metrics.evaluation import evaluate_files, evaluate_scores
    from gm_mlic.metrics.functional import PrecisionRecall, average_precision, precision_recall, predicted
    from gm_mlic.metrics.multilabel import MultiLabelMetrics
    from gm_mlic.metrics.score_files import ScoredImages, read_scored_images, write_scored_images
    from gm_mlic.metrics.thresholds import fit_thresholds

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

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "bootstrap": ("bootstrap_map", "interval", "p_value"),
        "conventions": ("CONVENTIONS", "Convention", "get_convention"),
        "evaluation": ("evaluate_files", "evaluate_scores"),
        "functional": ("PrecisionRecall", "average_precision", "precision_recall", "predicted"),
        "multilabel": ("MultiLabelMetrics",),
        "score_files": ("ScoredImages", "read_scored_images", "write_scored_images"),
        "thresholds": ("fit_thresholds",),
    },
)
