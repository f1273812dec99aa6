"""Base class of extractors from torchvision's detectors, and their builder."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models import get_model_builder
from torchvision.models.detection.image_list import ImageList

from gm_mlic.detection.labels import BACKGROUND
from gm_mlic.detection.network import NetworkExtractor, stretch
from gm_mlic.detection.protocol import Instances
from gm_mlic.detection.tiny import scenes_tiny
from gm_mlic.errors import ArgumentError, ConfigError

#: Default of ``min_size``, in pixels.
MIN_SIZE = 448
#: Detectors with a fixed input size.
FIXED_SIZE = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")

Detector = TypeVar("Detector", bound=nn.Module)

#: Boxes (N, 4) in pixels of the resized image, scores (N,), and classes or labels (N,).
Found = tuple[Tensor, Tensor, Tensor]


class TorchvisionExtractor(NetworkExtractor):
    """Base class of instance extractors from torchvision's detectors.

    Args:
        detector: the model; it is set to evaluation mode.
        labels: names of the detector's classes, from class 1. Detections of a class named ``N/A`` are dropped.
        name: short name, valid as a folder name.
        num_classes: number of the detector's classes, including the background.

    Raises:
        ConfigError: if the numbers of labels and classes differ.
    """

    def __init__(self, detector: nn.Module, labels: Sequence[str], name: str, num_classes: int) -> None:
        if len(labels) != num_classes - 1:
            raise ConfigError(f"The detector {name} has {num_classes - 1} classes, but {len(labels)} labels.")
        super().__init__(name, [BACKGROUND, *labels])
        self.detector: Any = detector.eval()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of name, labels, input size, thresholds, and every tensor's name, type, shape and bytes."""
        transform = self.detector.transform
        settings = [
            *(self.name, self.labels, self._label_of_class.tolist()),
            *(transform.min_size, transform.max_size, transform.image_mean, transform.image_std),
            *self._settings(),
        ]
        return self._hash(settings, self.detector)

    @abstractmethod
    def _settings(self) -> list[Any]:
        """Thresholds for the fingerprint."""

    @abstractmethod
    def _detections(self, batch: ImageList, maps: dict[str, Tensor]) -> list[Found]:
        """All detections of each image, with their classes."""

    @abstractmethod
    def _features(self, batch: ImageList, maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Features of the boxes of all images."""

    def _prepare(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Normalize, resize (if needed) and pad, as the detector does; the size is that without padding."""
        transform, (height, width) = self.detector.transform, image.shape[-2:]
        if transform.fixed_size is None:
            scale = min(transform.min_size[-1] / min(height, width), transform.max_size / max(height, width))
            if scale == 1:
                return transform.batch_images([transform.normalize(image)], transform.size_divisible), (height, width)
            if min(height, width) * scale < 1:  # a narrow strip: its shorter side would vanish
                image = stretch(image, math.ceil(1 / scale) + 1)
        ready = transform([image])[0]
        return ready.tensors, ready.image_sizes[0]

    def _maps(self, pixels: Tensor) -> dict[str, Tensor]:
        maps: Tensor | dict[str, Tensor] = self.detector.backbone(pixels)
        return {"0": maps} if isinstance(maps, Tensor) else maps

    def _detect(self, pixels: Tensor, sizes: Sequence[tuple[int, int]], m: int) -> list[Instances]:
        batch, grad = ImageList(pixels, list(sizes)), torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and self.trainable == "all"):
            maps = self._maps(pixels)
        with torch.no_grad():
            detections = self._detections(batch, maps)
            chosen = [self._choose(*found, size, m) for found, size in zip(detections, sizes, strict=True)]
        with torch.set_grad_enabled(grad and self.trainable != "none"):
            features = self._features(batch, maps, [boxes for boxes, _, _ in chosen]).float()
        of_images = torch.split(features, [len(boxes) for boxes, _, _ in chosen])
        return [
            Instances((boxes / boxes.new_tensor([width, height] * 2)).clamp(0, 1), scores, labels, of_image)
            for (boxes, scores, labels), (height, width), of_image in zip(chosen, sizes, of_images, strict=True)
        ]

    def _choose(self, boxes: Tensor, scores: Tensor, classes: Tensor, size: tuple[int, int], m: int) -> Found:
        """Top m detections of one image with their labels, or the whole image."""
        labels = self._label_of_class[classes]
        known = labels >= 0
        boxes, scores, labels = boxes[known], scores[known], labels[known]
        if len(boxes) == 0:
            height, width = size
            return boxes.new_tensor([[0, 0, width, height]]), scores.new_zeros(1), labels.new_full((1,), -1)
        best = torch.sort(scores, descending=True, stable=True).indices[:m]
        return boxes[best], scores[best], labels[best]


def padded_sizes(batch: ImageList) -> list[tuple[int, int]]:
    """Image sizes for :class:`torchvision.ops.MultiScaleRoIAlign`, which infers the strides of the maps from them.

    It keeps the strides of its first call. Those inferred from the size without padding would be wrong for a narrow
    strip.
    """
    height, width = batch.tensors.shape[-2:]
    return [(height, width)] * len(batch.image_sizes)


def build_detector(
    arch: str,
    num_classes: int,
    min_size: int | None = None,
    max_size: int | None = None,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    seed: int = 0,
) -> Any:
    """Build a detector with random weights. Nothing is downloaded; the global random state is unchanged.

    Args:
        arch: ``scenes_tiny``, or the name of a Faster R-CNN or one-stage detector of torchvision.
        num_classes: number of classes, including the background.
        min_size: shorter image side after resizing, in pixels; default 448, for scenes_tiny 160. Without effect on
            :data:`FIXED_SIZE`, as ``max_size``.
        max_size: limit of the longer side; default 5/3 of ``min_size``.
        score_threshold: minimum score of detections (exclusive).
        nms_threshold: IoU threshold of non-maximum suppression.
        seed: seed of the random weights.

    Raises:
        ConfigError: if ``min_size`` is above ``max_size``.
    """
    is_tiny = arch == "scenes_tiny"
    min_size = min_size or (160 if is_tiny else MIN_SIZE)
    max_size = max_size or round(min_size * 5 / 3)
    if min_size > max_size:
        raise ArgumentError("min_size", f"is {min_size}, above `max_size` {max_size}: lower it.")
    settings: dict[str, Any] = {} if arch in FIXED_SIZE else {"min_size": min_size, "max_size": max_size}
    if not is_tiny:  # by default, torchvision's builders download backbone weights
        settings |= {"weights": None, "weights_backbone": None}
    prefix = "box_" if is_tiny or arch.startswith("fasterrcnn") else ""
    settings |= {f"{prefix}score_thresh": score_threshold, f"{prefix}nms_thresh": nms_threshold}
    build = scenes_tiny if is_tiny else get_model_builder(arch)
    return build_random(build, seed, num_classes=num_classes, **settings)


def build_random(build: Callable[..., Detector], seed: int, **settings: Any) -> Detector:
    """Call a builder with random weights; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(**settings)
