"""GM-MLIC: graph matching based multi-label image classification, built on PyTorch Geometric.

The names below are the public interface; each is imported when it is first used.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from gm_mlic._lazy import lazy_attributes
from gm_mlic._version import __version__

if TYPE_CHECKING:
    from gm_mlic.datasets import MultiLabelDataset, Scenes
    from gm_mlic.detection import InstanceExtractor, Instances, build_extractor
    from gm_mlic.embeddings import embed_labels
    from gm_mlic.errors import GMMLICError
    from gm_mlic.graphs import AssignmentBatch, AssignmentGraph, to_hetero_data
    from gm_mlic.instances import InstanceStore, extract
    from gm_mlic.losses import WeightedBCE
    from gm_mlic.metrics import MultiLabelMetrics
    from gm_mlic.nn import GMMLIC
    from gm_mlic.registry import list_models, register_dataset, register_detector, register_embedding, register_model
    from gm_mlic.zoo import Predictor, create_model, pretrained_models

# PyG uses TorchScript when it is imported; users cannot change that.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script", category=FutureWarning)

__all__ = [
    "GMMLIC",
    "AssignmentBatch",
    "AssignmentGraph",
    "GMMLICError",
    "InstanceExtractor",
    "InstanceStore",
    "Instances",
    "MultiLabelDataset",
    "MultiLabelMetrics",
    "Predictor",
    "Scenes",
    "WeightedBCE",
    "__version__",
    "build_extractor",
    "create_model",
    "embed_labels",
    "extract",
    "list_models",
    "pretrained_models",
    "register_dataset",
    "register_detector",
    "register_embedding",
    "register_model",
    "to_hetero_data",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "datasets": ("MultiLabelDataset", "Scenes"),
        "detection": ("InstanceExtractor", "Instances", "build_extractor"),
        "embeddings": ("embed_labels",),
        "errors": ("GMMLICError",),
        "graphs": ("AssignmentBatch", "AssignmentGraph", "to_hetero_data"),
        "instances": ("InstanceStore", "extract"),
        "losses": ("WeightedBCE",),
        "metrics": ("MultiLabelMetrics",),
        "nn": ("GMMLIC",),
        "registry": ("list_models", "register_dataset", "register_detector", "register_embedding", "register_model"),
        "zoo": ("Predictor", "create_model", "pretrained_models"),
    },
    "__version__",
)
