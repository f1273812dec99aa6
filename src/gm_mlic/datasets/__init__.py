"""Datasets: what each offers to the rest of the package, and the ones that are shipped."""

from gm_mlic.datasets.base import ABSENT, DIFFICULT, PRESENT, BoxAnnotations, MultiLabelDataset, label_ratio
from gm_mlic.datasets.coco import COCO2014
from gm_mlic.datasets.own import OwnImages
from gm_mlic.datasets.scenes import SceneObject, Scenes

__all__ = [
    "ABSENT",
    "COCO2014",
    "DIFFICULT",
    "PRESENT",
    "BoxAnnotations",
    "MultiLabelDataset",
    "OwnImages",
    "SceneObject",
    "Scenes",
    "label_ratio",
]
