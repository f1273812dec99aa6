"""Multi-label metrics under the conventions of the literature."""

from __future__ import annotations

from gm_mlic.metrics.bootstrap import bootstrap_map, interval, p_value
from gm_mlic.metrics.conventions import PRESETS, Convention, convention
from gm_mlic.metrics.evaluation import evaluate_files, evaluate_scores
from gm_mlic.metrics.functional import PrecisionRecall, average_precision, precision_recall, predicted
from gm_mlic.metrics.multilabel import MultiLabelMetrics
from gm_mlic.metrics.score_files import ScoredImages, read_scored_images, write_scored_images
from gm_mlic.metrics.thresholds import fit_thresholds

__all__ = [
    "PRESETS",
    "Convention",
    "MultiLabelMetrics",
    "PrecisionRecall",
    "ScoredImages",
    "average_precision",
    "bootstrap_map",
    "convention",
    "evaluate_files",
    "evaluate_scores",
    "fit_thresholds",
    "interval",
    "p_value",
    "precision_recall",
    "predicted",
    "read_scored_images",
    "write_scored_images",
]
