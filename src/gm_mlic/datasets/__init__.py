"""Dataset interface and built-in datasets."""

from __future__ import annotations

from typing import Any

from gm_mlic.datasets.base import BoxAnnotations, MultiLabelDataset, label_ratio
from gm_mlic.datasets.coco import COCO2014
from gm_mlic.datasets.custom import CustomDataset
from gm_mlic.datasets.nuswide import NUSWIDE
from gm_mlic.datasets.scenes import SceneObject, Scenes
from gm_mlic.datasets.voc import VOC2007, VOC2012

__all__ = [
    "COCO2014",
    "NUSWIDE",
    "VOC2007",
    "VOC2012",
    "BoxAnnotations",
    "CustomDataset",
    "MultiLabelDataset",
    "SceneObject",
    "Scenes",
    "known_datasets",
    "label_ratio",
]


def known_datasets() -> dict[str, Any]:
    """Dataset classes of this module by name. Programs can add a class as a module attribute."""
    return {cls.name: cls for cls in globals().values() if _is_dataset(cls)}


def _is_dataset(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, MultiLabelDataset) and value is not MultiLabelDataset
