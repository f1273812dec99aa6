"""Detection: images in, instances out."""

from gm_mlic.detection.faster_rcnn import ARCHITECTURES, FasterRCNNExtractor, build_extractor
from gm_mlic.detection.grid import GridExtractor
from gm_mlic.detection.protocol import InstanceExtractor, Instances

__all__ = [
    "ARCHITECTURES",
    "FasterRCNNExtractor",
    "GridExtractor",
    "InstanceExtractor",
    "Instances",
    "build_extractor",
]
