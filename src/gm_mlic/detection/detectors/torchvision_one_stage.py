"""Instance extractors from torchvision's one-stage detectors: RetinaNet, FCOS, SSD and SSDlite."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import MultiScaleRoIAlign, remove_small_boxes, roi_align

from gm_mlic.detection.checkpoints import load_into, read_checkpoint
from gm_mlic.detection.torchvision_detector import FIXED_SIZE, Found, TorchvisionExtractor, build_detector, padded_sizes
from gm_mlic.errors import ArgumentError
from gm_mlic.registry import register_detector
from gm_mlic.schema import Probability, checked

#: Summary of each detector, and torchvision's defaults of its thresholds.
_DETECTORS = {
    "retinanet_resnet50_fpn": ("RetinaNet with ResNet-50-FPN: one stage", 0.05, 0.5),
    "retinanet_resnet50_fpn_v2": ("RetinaNet with ResNet-50-FPN, second version: more accurate", 0.05, 0.5),
    "fcos_resnet50_fpn": ("FCOS with ResNet-50-FPN: one stage, without anchors", 0.2, 0.6),
    "ssd300_vgg16": ("SSD with VGG-16, 300 x 300 pixels", 0.01, 0.45),
    "ssdlite320_mobilenet_v3_large": ("SSDlite with MobileNetV3-Large, 320 x 320 pixels: small and fast", 0.001, 0.55),
}
#: Number of RoIAlign cells along each side, and of samples in a cell, as in torchvision's Faster R-CNN.
_CELLS, _SAMPLES = 7, 2


class OneStageExtractor(TorchvisionExtractor):
    r"""Instance extractor (:class:`~gm_mlic.detection.InstanceExtractor`) from a one-stage detector of torchvision.

    Instances are the detector's own detections: score threshold, the ``topk_candidates`` best of each level (RetinaNet,
    FCOS) or class (SSD), and non-maximum suppression within each class. Its limit on detections is removed, so that m
    decides. Boxes without area are dropped, as in Faster R-CNN.

    One-stage detectors have no layer with a feature per box. The feature of box :math:`B_i` (eq. 1) is therefore
    pooled from the maps that the detector's head reads, :math:`f_i = \mathrm{mean}(\mathrm{RoIAlign}(\mathrm{map},
    B_i))` over 7 x 7 cells:

    - RetinaNet, FCOS: from one of the pyramid's maps P3 to P5, selected by the size of the box as in FPN (224 x 224
      pixels: P4). Cells of P6 and P7 are larger than most objects.
    - SSD: from its two finest maps, concatenated, since all its maps have different channels. Cells of the others
      cover large parts of the image.

    Args:
        detector: the model; it is set to evaluation mode and frozen, and its limit on detections is removed.
        labels: names of the detector's classes, from class 1. Detections of a class named ``N/A`` are dropped.
        name: short name, valid as a folder name.

    Shape:
        features have D = ``feature_dim`` entries: 256 for RetinaNet and FCOS, 1536 for ``ssd300_vgg16``, 1152 for
        ``ssdlite320_mobilenet_v3_large``.
    """

    def __init__(self, detector: RetinaNet | FCOS | SSD, labels: Sequence[str], name: str) -> None:
        head = detector.head.classification_head
        num_classes = head.num_columns if isinstance(detector, SSD) else head.num_classes
        super().__init__(detector, labels, name, num_classes)
        self.requires_grad_(False)
        self.detector.detections_per_img = sys.maxsize
        self._pool = None
        if isinstance(detector, SSD):
            width, height = detector.transform.fixed_size
            with torch.no_grad():
                maps = detector.backbone(torch.zeros(1, 3, height, width))
            self.feature_dim = sum(level.shape[1] for level in list(maps.values())[:2])
        else:
            self.feature_dim = int(detector.backbone.out_channels)
            self._pool = MultiScaleRoIAlign(["0", "1", "2"], _CELLS, _SAMPLES)

    def _settings(self) -> list[Any]:
        detector = self.detector
        return [detector.score_thresh, detector.nms_thresh, detector.topk_candidates, detector.transform.fixed_size]

    def _detections(self, batch: ImageList, maps: dict[str, Tensor]) -> list[Found]:
        detector, levels = self.detector, list(maps.values())
        outputs, anchors = detector.head(levels), detector.anchor_generator(batch, levels)
        if not isinstance(detector, SSD):  # SSD selects from all levels together
            cells = [level[0, 0].numel() for level in levels]
            counts = [count * (len(anchors[0]) // sum(cells)) for count in cells]
            outputs = {key: list(output.split(counts, dim=1)) for key, output in outputs.items()}
            anchors = [list(of_image.split(counts)) for of_image in anchors]
        chosen = []
        for found in detector.postprocess_detections(outputs, anchors, batch.image_sizes):
            solid = remove_small_boxes(found["boxes"], min_size=1e-2)
            chosen.append((found["boxes"][solid], found["scores"][solid], found["labels"][solid]))
        return chosen

    def _features(self, batch: ImageList, maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        if self._pool is not None:
            pooled = [self._pool(maps, boxes, padded_sizes(batch))]
        else:  # the stride of a map is a power of 2
            levels = list(maps.values())[:2]
            strides = [2 ** round(math.log2(batch.tensors.shape[-1] / level.shape[-1])) for level in levels]
            pooled = [roi_align(m, boxes, _CELLS, 1 / s, _SAMPLES) for m, s in zip(levels, strides, strict=True)]
        return torch.cat(pooled, dim=1).mean(dim=(2, 3))


@checked
def one_stage(
    arch: str,
    *,
    labels: Sequence[str] | None = None,
    weights: str | Path | None = None,
    min_size: Annotated[int, Ge(32)] | None = None,
    max_size: Annotated[int, Ge(32)] | None = None,
    score_threshold: Probability = 0.05,
    nms_threshold: Probability = 0.5,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> OneStageExtractor:
    """Build an instance extractor from a one-stage detector of torchvision.

    Args:
        arch: name of a one-stage detector of torchvision.
        weights: ``coco`` (torchvision's COCO weights, downloaded once, 15 to 150 MB) or a ``.pt`` / ``.pth`` file with
            a torchvision ``state_dict``; null: random weights.
        labels, min_size, max_size: see :func:`~gm_mlic.detection.faster_rcnn.faster_rcnn`.
        score_threshold, nms_threshold, seed, device: see :func:`~gm_mlic.detection.faster_rcnn.faster_rcnn`.

    Raises:
        ConfigError: if an argument is invalid.
        WeightsError: if the weights are missing, cannot be read, or belong to another architecture or other labels.
    """
    if arch in FIXED_SIZE and (min_size, max_size) != (None, None):
        raise ArgumentError("min_size", f"or `max_size` is set, but {arch} has a fixed input size: leave them out.")
    checkpoint = read_checkpoint(arch, weights, labels)
    sizes = min_size or checkpoint.min_size, max_size or checkpoint.max_size
    detector = build_detector(arch, len(checkpoint.categories), *sizes, score_threshold, nms_threshold, seed)
    load_into(detector, checkpoint, arch)
    return OneStageExtractor(detector, checkpoint.categories[1:], arch).to(device)


for _arch, (_summary, _score, _nms) in _DETECTORS.items():
    _build = partial(one_stage, _arch)
    if _arch in FIXED_SIZE:
        _build.no_settings = ("min_size", "max_size")  # type: ignore[attr-defined]
    register_detector(_arch, _summary, score_threshold=_score, nms_threshold=_nms)(_build)
