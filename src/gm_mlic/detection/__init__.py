"""Instance extractors: from images to instances.

Names are imported on first use, so that :class:`Instances` does not need torchvision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gm_mlic._lazy import lazy_attributes

if TYPE_CHECKING:
    from gm_mlic.detection.faster_rcnn import ARCHITECTURES, FasterRCNNExtractor, save_detector
    from gm_mlic.detection.grid import GridExtractor
    from gm_mlic.detection.multi_view import MultiViewExtractor
    from gm_mlic.detection.protocol import InstanceExtractor, Instances, LookupExtractor, build_extractor
    from gm_mlic.detection.static_shape import FixedDetector

__all__ = [
    "ARCHITECTURES",
    "FasterRCNNExtractor",
    "FixedDetector",
    "GridExtractor",
    "InstanceExtractor",
    "Instances",
    "LookupExtractor",
    "MultiViewExtractor",
    "build_extractor",
    "save_detector",
]

__getattr__, __dir__ = lazy_attributes(
    __name__,
    {
        "faster_rcnn": ("ARCHITECTURES", "FasterRCNNExtractor", "save_detector"),
        "grid": ("GridExtractor",),
        "multi_view": ("MultiViewExtractor",),
        "protocol": ("InstanceExtractor", "Instances", "LookupExtractor", "build_extractor"),
        "static_shape": ("FixedDetector",),
    },
)
