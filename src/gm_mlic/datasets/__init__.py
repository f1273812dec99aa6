"""Datasets: what each offers to the rest of the package, and the ones that are shipped."""

from gm_mlic.datasets.base import BoxAnnotations, MultiLabelDataset, label_ratio
from gm_mlic.datasets.coco import COCO2014
from gm_mlic.datasets.nuswide import NUSWIDE
from gm_mlic.datasets.own import OwnImages
from gm_mlic.datasets.scenes import SceneObject, Scenes
from gm_mlic.datasets.voc import VOC2007, VOC2012

__all__ = [
    "COCO2014",
    "NUSWIDE",
    "VOC2007",
    "VOC2012",
    "BoxAnnotations",
    "MultiLabelDataset",
    "OwnImages",
    "SceneObject",
    "Scenes",
    "label_ratio",
]
