"""Detection: images in, instances out."""

from gm_mlic.detection.faster_rcnn import ARCHITECTURES, FasterRCNNExtractor, build_extractor, save_detector
from gm_mlic.detection.fixed import FixedDetector
from gm_mlic.detection.grid import GridExtractor
from gm_mlic.detection.protocol import InstanceExtractor, Instances

__all__ = [
    "ARCHITECTURES",
    "FasterRCNNExtractor",
    "FixedDetector",
    "GridExtractor",
    "InstanceExtractor",
    "Instances",
    "build_extractor",
    "save_detector",
]
