"""Dataset interface and built-in datasets."""

from __future__ import annotations

from gm_mlic.datasets.base import BoxAnnotations, MultiLabelDataset, label_ratio
from gm_mlic.datasets.coco import COCO2014
from gm_mlic.datasets.custom import CustomDataset
from gm_mlic.datasets.nuswide import NUSWIDE
from gm_mlic.datasets.scenes import Scenes
from gm_mlic.datasets.voc import VOC2007, VOC2012

__all__ = [
    "COCO2014",
    "NUSWIDE",
    "VOC2007",
    "VOC2012",
    "BoxAnnotations",
    "CustomDataset",
    "MultiLabelDataset",
    "Scenes",
    "label_ratio",
]
