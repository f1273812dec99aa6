"""Instance extractor based on torchvision's Faster R-CNN: detections with a feature per box."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torchvision.models.detection import (
    FasterRCNN,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    fasterrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.image_list import ImageList

from gm_mlic.detection.checkpoints import UNUSED, load_into, read_checkpoint, save_checkpoint
from gm_mlic.detection.fingerprint import Fingerprint
from gm_mlic.detection.grid import GridExtractor
from gm_mlic.detection.protocol import Instances
from gm_mlic.detection.tiny import scenes_tiny
from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.registry import register_detector
from gm_mlic.schema import Positive, Probability

#: Values of ``trainable``; see :class:`FasterRCNNExtractor`.
TRAINABLE = ("none", "box_head", "all")


#: Builder and default input size of each detector.
_BUILDERS: dict[str, tuple[Callable[..., FasterRCNN], int]] = {
    "fasterrcnn_resnet50_fpn": (fasterrcnn_resnet50_fpn, 448),
    "fasterrcnn_resnet50_fpn_v2": (fasterrcnn_resnet50_fpn_v2, 448),
    "fasterrcnn_mobilenet_v3_large_fpn": (fasterrcnn_mobilenet_v3_large_fpn, 448),
    "scenes_tiny": (scenes_tiny, 160),
}
#: Architectures of :func:`faster_rcnn`.
ARCHITECTURES = tuple(_BUILDERS)


class FasterRCNNExtractor(nn.Module):
    r"""Instance extractor (:class:`~gm_mlic.detection.protocol.InstanceExtractor`) from a torchvision Faster R-CNN.

    Instances are computed in three steps:

    1. Detection: proposals, class scores and boxes, score threshold, non-maximum suppression within each class. One
       region can be detected as several classes.
    2. Selection of the m highest scores over all classes. (The detector's own limit is removed.)
    3. Feature extraction (eq. 1): the box head is applied again to RoIs pooled at the *final* boxes :math:`B_i`,
       :math:`f_i = \mathrm{head}(\mathrm{RoIAlign}(\mathrm{maps}, B_i))`, so that feature and box describe the same
       region. (Class scores are computed from the proposal's RoI.)

    The detector always runs in evaluation mode, even after ``train()``. Only images of equal size after resizing and
    padding share a forward pass, so an image's instances do not depend on its batch (up to rounding in convolutions).

    Args:
        detector: the model; it is set to evaluation mode, and its limit on detections is removed.
        labels: class names without the background.
        name: short name, valid as a folder name.
        class_index: the detector's class index of each label; default 1, 2, ... Detections of other classes are
            dropped.
        trainable: parts that receive gradients: ``none``; ``box_head``, the layers from the pooled RoI to the feature;
            ``all``, the backbone too. The selection of boxes is not differentiable: layers of proposals and class
            scores stay frozen.

    Shape:
        features have D = ``feature_dim`` entries: 1024 for torchvision's detectors, 256 for ``scenes_tiny``.
    """

    def __init__(
        self,
        detector: FasterRCNN,
        labels: Sequence[str],
        name: str,
        class_index: Sequence[int] | None = None,
        trainable: str = "none",
    ) -> None:
        super().__init__()
        if trainable not in TRAINABLE:
            raise ArgumentError("trainable", f"is {trainable!r}: choose one of {', '.join(TRAINABLE)}.")
        self.name = name
        self.labels = tuple(labels)
        self.trainable = trainable
        self.detector = detector
        self.detector.roi_heads.detections_per_img = sys.maxsize
        scores = detector.roi_heads.box_predictor.cls_score
        self.feature_dim = int(scores.in_features)
        if class_index is None:
            class_index = range(1, scores.out_features)
        if len(class_index) != len(self.labels):
            raise ConfigError(f"The detector {name} has {len(class_index)} classes, but {len(self.labels)} labels.")
        label_of_class = torch.full((scores.out_features,), -1)
        label_of_class[list(class_index)] = torch.arange(len(self.labels))
        self.register_buffer("_label_of_class", label_of_class, persistent=False)
        self._label_of_class: Tensor
        self._fingerprint = Fingerprint()
        for parameter in self.parameters():
            parameter.requires_grad_(trainable == "all")
        for frozen in (detector.rpn, detector.roi_heads):
            frozen.requires_grad_(False)
        detector.roi_heads.box_head.requires_grad_(trainable != "none")
        self.train(False)

    def train(self, mode: bool = True) -> FasterRCNNExtractor:
        """Keep evaluation mode; ``mode`` is ignored."""
        super().train(False)
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of name, labels, input size, thresholds, and every tensor's name, type, shape and bytes."""
        heads, rpn, transform = self.detector.roi_heads, self.detector.rpn, self.detector.transform
        settings = [
            *(self.name, self.labels, self._label_of_class.tolist()),
            *(transform.min_size, transform.max_size, transform.image_mean, transform.image_std),
            *(rpn._pre_nms_top_n, rpn._post_nms_top_n, rpn.nms_thresh, rpn.score_thresh),
            *(heads.score_thresh, heads.nms_thresh),
        ]
        return self._fingerprint(settings, self.detector)

    def forward(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        """Detect instances, see :meth:`gm_mlic.detection.protocol.InstanceExtractor.__call__`.

        Boxes, scores and labels have no gradients; features do, depending on ``trainable``.

        Raises:
            ConfigError: if ``m`` is less than 1.
        """
        if m < 1:
            raise ArgumentError("m", f"must be 1 or more, got {m}.")
        device = self._label_of_class.device
        groups: dict[torch.Size, list[tuple[int, ImageList]]] = {}
        for i, image in enumerate(images):
            with torch.no_grad():
                ready = self._prepare(image.to(device))
            groups.setdefault(ready.tensors.shape, []).append((i, ready))
        detected: dict[int, Instances] = {}
        for group in groups.values():
            batch = ImageList(
                torch.cat([ready.tensors for _, ready in group]), [ready.image_sizes[0] for _, ready in group]
            )
            detected.update(zip((i for i, _ in group), self._detect(batch, m), strict=True))
        return [detected[i] for i in range(len(images))]

    def _prepare(self, image: Tensor) -> ImageList:
        """Normalize, resize (if needed) and pad, as the detector does."""
        transform, (height, width) = self.detector.transform, image.shape[-2:]
        scale = min(transform.min_size[-1] / min(height, width), transform.max_size / max(height, width))
        if min(height, width) * scale < 1:  # a narrow strip: its shorter side would vanish
            least = math.ceil(1 / scale) + 1
            image = nn.functional.interpolate(image[None], (max(height, least), max(width, least)))[0]
        if scale != 1:
            return transform([image])[0]
        return ImageList(
            transform.batch_images([transform.normalize(image)], transform.size_divisible), [(height, width)]
        )

    def _detect(self, batch: ImageList, m: int) -> list[Instances]:
        """Instances of images with the same padded size."""
        grad, heads, sizes = torch.is_grad_enabled(), self.detector.roi_heads, batch.image_sizes
        with torch.set_grad_enabled(grad and self.trainable == "all"):
            maps = self.detector.backbone(batch.tensors)
            maps = {"0": maps} if isinstance(maps, Tensor) else maps
        with torch.no_grad():
            proposals, _ = self.detector.rpn(batch, maps)
            predicted = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, proposals, sizes)))
            detections = heads.postprocess_detections(*predicted, proposals, sizes)
            chosen = [
                self._choose(boxes, scores, classes, size, m)
                for boxes, scores, classes, size in zip(*detections, sizes, strict=True)
            ]
        with torch.set_grad_enabled(grad and self.trainable != "none"):
            boxes = [boxes for boxes, _, _ in chosen]
            features = heads.box_head(heads.box_roi_pool(maps, boxes, sizes)).float()
        return [
            Instances((boxes / boxes.new_tensor([width, height] * 2)).clamp(0, 1), scores, labels, of_image)
            for (boxes, scores, labels), (height, width), of_image in zip(
                chosen, sizes, features.split([len(b) for b in boxes]), strict=True
            )
        ]

    def _choose(
        self, boxes: Tensor, scores: Tensor, classes: Tensor, size: tuple[int, int], m: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Top m detections of one image, or the whole image; boxes in pixels of the resized image."""
        labels = self._label_of_class[classes]
        known = labels >= 0
        boxes, scores, labels = boxes[known], scores[known], labels[known]
        if len(boxes) == 0:
            height, width = size
            return boxes.new_tensor([[0, 0, width, height]]), scores.new_zeros(1), labels.new_full((1,), -1)
        best = torch.sort(scores, descending=True, stable=True).indices[:m]
        return boxes[best], scores[best], labels[best]


def check_architecture(name: str) -> None:
    """Raise :class:`~gm_mlic.errors.ConfigError` unless ``name`` is one of :data:`ARCHITECTURES`."""
    if name not in _BUILDERS:
        raise ArgumentError("name", f"is {name!r}: choose one of {', '.join(ARCHITECTURES)}.")


def build_detector(
    name: str,
    num_classes: int,
    min_size: int | None = None,
    max_size: int | None = None,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    seed: int = 0,
) -> FasterRCNN:
    """Build a detector with random weights. Nothing is downloaded; the global random state is unchanged.

    Args:
        name: one of :data:`ARCHITECTURES`.
        num_classes: number of classes, including the background.
        min_size: shorter image side after resizing, in pixels; default 448, for scenes_tiny 160.
        max_size: limit of the longer side; default 5/3 of ``min_size``.
        score_threshold: minimum score of detections (exclusive).
        nms_threshold: IoU threshold of non-maximum suppression.
        seed: seed of the random weights.

    Raises:
        ConfigError: if the architecture is unknown or an argument is out of range.
    """
    check_architecture(name)
    build, default_size = _BUILDERS[name]
    min_size = default_size if min_size is None else min_size
    max_size = round(min_size * 5 / 3) if max_size is None else max_size
    if not 32 <= min_size <= max_size:
        raise ArgumentError("min_size", f"is {min_size} and `max_size` {max_size}: set 32 <= min_size <= max_size.")
    for key, value in (("score_threshold", score_threshold), ("nms_threshold", nms_threshold)):
        if not 0 <= value <= 1:
            raise ArgumentError(key, f"is {value}: expected a number in [0, 1].")
    # By default, torchvision's builders download backbone weights.
    settings = {} if build is scenes_tiny else {"weights": None, "weights_backbone": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(
            num_classes=num_classes,
            min_size=min_size,
            max_size=max_size,
            box_score_thresh=score_threshold,
            box_nms_thresh=nms_threshold,
            **settings,
        )


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
    trainable: Literal["none", "box_head", "all"] = "none",
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
        min_size: shorter side of resized images in pixels; null: as in training (random weights: 448, scenes_tiny 160).
        max_size: limit of the longer side in pixels; null: as in training (random weights: 5/3 of min_size).
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
    if labels is not None:
        checkpoint.check_labels(labels)
    detector = build_detector(
        arch,
        len(checkpoint.categories),
        min_size=min_size or checkpoint.min_size,
        max_size=max_size or checkpoint.max_size,
        score_threshold=score_threshold,
        nms_threshold=nms_threshold,
        seed=seed,
    )
    if checkpoint.tensors is not None:
        load_into(detector, checkpoint, arch)
    if grid_size is not None:
        return GridExtractor.of_detector(detector, grid_size, f"{arch}-grid{grid_size}", trainable).to(device)
    used = [(i, label) for i, label in enumerate(checkpoint.categories) if i > 0 and label != UNUSED]
    extractor = FasterRCNNExtractor(
        detector, [label for _, label in used], name=arch, class_index=[i for i, _ in used], trainable=trainable
    )
    return extractor.to(device)


for _arch, _summary in {
    "fasterrcnn_resnet50_fpn": "Faster R-CNN with ResNet-50-FPN: the paper's detector",
    "fasterrcnn_resnet50_fpn_v2": "Faster R-CNN with ResNet-50-FPN, second version: more accurate, slower",
    "fasterrcnn_mobilenet_v3_large_fpn": "Faster R-CNN with MobileNetV3-Large-FPN: several times faster on a CPU",
    "scenes_tiny": "Small Faster R-CNN for scenes, with built-in weights",
}.items():
    register_detector(_arch, _summary)(partial(faster_rcnn, _arch))


def save_detector(extractor: FasterRCNNExtractor, path: Path, name: str) -> None:
    """Save an extractor's weights, labels and input size as a ``weights`` file for :func:`faster_rcnn`.

    Thresholds are not saved.
    """
    label_of_class = extractor._label_of_class.tolist()
    transform = extractor.detector.transform
    record = {
        "arch": name,
        "labels": [extractor.labels[i] if i >= 0 else UNUSED for i in label_of_class[1:]],
        "min_size": transform.min_size[-1],
        "max_size": transform.max_size,
    }
    save_checkpoint(path, extractor.detector.state_dict(), record)
