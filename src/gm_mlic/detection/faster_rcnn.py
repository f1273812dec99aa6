"""Instance extractor based on torchvision's Faster R-CNN: detections with a feature per box."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from gm_mlic.detection.checkpoints import load_into, read_checkpoint, save_checkpoint
from gm_mlic.detection.grid import GridExtractor
from gm_mlic.detection.labels import NO_CLASS
from gm_mlic.detection.torchvision_detector import Found, TorchvisionExtractor, build_detector, padded_sizes
from gm_mlic.registry import register_detector
from gm_mlic.schema import Positive, Probability, checked

#: Trained parts; see :class:`FasterRCNNExtractor`.
Trainable = Literal["none", "box_head", "all"]
#: Summary of each detector.
_SUMMARIES = {
    "fasterrcnn_resnet50_fpn": "Faster R-CNN with ResNet-50-FPN: the paper's detector",
    "fasterrcnn_resnet50_fpn_v2": "Faster R-CNN with ResNet-50-FPN, second version: more accurate, slower",
    "fasterrcnn_mobilenet_v3_large_fpn": "Faster R-CNN with MobileNetV3-Large-FPN: several times faster on a CPU",
    "scenes_tiny": "Small Faster R-CNN for scenes, with built-in weights",
}
#: Architectures of :func:`faster_rcnn`.
ARCHITECTURES = tuple(_SUMMARIES)


class FasterRCNNExtractor(TorchvisionExtractor):
    r"""Instance extractor (:class:`~gm_mlic.detection.protocol.InstanceExtractor`) from a torchvision Faster R-CNN.

    Instances are computed in three steps:

    1. Detection: proposals, class scores and boxes, score threshold, non-maximum suppression within each class. One
       region can be detected as several classes.
    2. Selection of the m highest scores over all classes. (The detector's own limit is removed.)
    3. Feature extraction (eq. 1): the box head is applied again to RoIs pooled at the *final* boxes :math:`B_i`,
       :math:`f_i = \mathrm{head}(\mathrm{RoIAlign}(\mathrm{maps}, B_i))`, so that feature and box describe the same
       region. (Class scores are computed from the proposal's RoI.)

    Features have gradients, depending on ``trainable``; boxes, scores and labels have none.

    Args:
        detector: the model; it is set to evaluation mode, and its limit on detections is removed.
        labels: names of the detector's classes, from class 1. Detections of a class named ``N/A`` are dropped.
        name: short name, valid as a folder name.
        trainable: parts that receive gradients: ``none``; ``box_head``, the layers from the pooled RoI to the feature;
            ``all``, the backbone too. The selection of boxes is not differentiable: layers of proposals and class
            scores stay frozen.

    Shape:
        features have D = ``feature_dim`` entries: 1024 for torchvision's detectors, 256 for ``scenes_tiny``.
    """

    @checked
    def __init__(self, detector: FasterRCNN, labels: Sequence[str], name: str, trainable: Trainable = "none") -> None:
        scores = detector.roi_heads.box_predictor.cls_score
        super().__init__(detector, labels, name, scores.out_features)
        self.trainable = trainable
        self.detector.roi_heads.detections_per_img = sys.maxsize
        self.feature_dim = int(scores.in_features)
        for parameter in self.parameters():
            parameter.requires_grad_(trainable == "all")
        for frozen in (detector.rpn, detector.roi_heads):
            frozen.requires_grad_(False)
        detector.roi_heads.box_head.requires_grad_(trainable != "none")

    def _settings(self) -> list[Any]:
        heads, rpn = self.detector.roi_heads, self.detector.rpn
        return [
            *(rpn._pre_nms_top_n, rpn._post_nms_top_n, rpn.nms_thresh, rpn.score_thresh),
            *(heads.score_thresh, heads.nms_thresh),
        ]

    def _detections(self, batch: ImageList, maps: dict[str, Tensor]) -> list[Found]:
        proposals, _ = self.detector.rpn(batch, maps)
        heads, features = self.detector.roi_heads, self._features(batch, maps, proposals)
        found = heads.postprocess_detections(*heads.box_predictor(features), proposals, batch.image_sizes)
        return list(zip(*found, strict=True))

    def _features(self, batch: ImageList, maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        heads = self.detector.roi_heads
        features: Tensor = heads.box_head(heads.box_roi_pool(maps, boxes, padded_sizes(batch)))
        return features


@checked
def faster_rcnn(
    arch: str,
    *,
    labels: Sequence[str] | None = None,
    weights: str | Path | None = None,
    min_size: Annotated[int, Ge(32)] | None = None,
    max_size: Annotated[int, Ge(32)] | None = None,
    score_threshold: Probability = 0.05,
    nms_threshold: Probability = 0.5,
    grid_size: Positive | None = None,
    trainable: Trainable = "none",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> FasterRCNNExtractor | GridExtractor:
    """Build an instance extractor from a torchvision Faster R-CNN.

    Args:
        arch: one of :data:`ARCHITECTURES`.
        labels: class names, for random weights (default: the 80 of COCO; for scenes_tiny those of its built-in weights)
            and ``.pt`` files. Other weights include their labels.
        weights: ``coco`` (torchvision's COCO weights, downloaded once, 75 to 170 MB), ``scenes`` (the built-in ones of
            scenes_tiny), or a file: ``.safetensors`` of ``gm-mlic train-detector``, or ``.pt`` / ``.pth`` with a
            torchvision ``state_dict``; null: random weights.
        min_size: shorter side of resized images in pixels; null: as in a file of train-detector, else 448 (scenes_tiny:
            160).
        max_size: limit of the longer side in pixels; null: as in a file of train-detector, else 5/3 of min_size.
        score_threshold: detections below this confidence are dropped before non-maximum suppression.
        nms_threshold: IoU above which non-maximum suppression drops the less confident of two boxes with the same
            label.
        grid_size: G, to use the G x G cells of the backbone's feature map instead of boxes; thresholds and ``max_size``
            then have no effect; null: boxes.
        trainable: trained layers: ``none`` (frozen), ``box_head`` or ``all`` (both need instances.online=true).
        seed: seed of random weights.
        device: device of the detector.

    Raises:
        ConfigError: if an argument is invalid.
        WeightsError: if the weights are missing, cannot be read, or belong to another architecture or other labels.
    """
    checkpoint = read_checkpoint(arch, weights, labels)
    sizes = min_size or checkpoint.min_size, max_size or checkpoint.max_size
    detector = build_detector(arch, len(checkpoint.categories), *sizes, score_threshold, nms_threshold, seed)
    load_into(detector, checkpoint, arch)
    if grid_size is not None:
        return GridExtractor.of_detector(detector, grid_size, f"{arch}-grid{grid_size}", trainable).to(device)
    return FasterRCNNExtractor(detector, checkpoint.categories[1:], arch, trainable).to(device)


for _arch, _summary in _SUMMARIES.items():
    register_detector(_arch, _summary)(partial(faster_rcnn, _arch))


def save_detector(extractor: FasterRCNNExtractor, path: Path, name: str) -> None:
    """Save an extractor's weights, labels and input size as a ``weights`` file for :func:`faster_rcnn`.

    Thresholds are not saved.
    """
    label_of_class = extractor._label_of_class.tolist()
    transform = extractor.detector.transform
    record = {
        "arch": name,
        "labels": [extractor.labels[i] if i >= 0 else NO_CLASS for i in label_of_class[1:]],
        "min_size": transform.min_size[-1],
        "max_size": transform.max_size,
    }
    save_checkpoint(path, extractor.detector.state_dict(), record)
