"""Common parts of extractors: batches of equal size, selection of instances, and torchvision's image preparation."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from gm_mlic.detection.fingerprint import Fingerprint
from gm_mlic.detection.labels import BACKGROUND, label_of_class
from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import ArgumentError, ConfigError, check_positive

#: Default of ``min_size``, in pixels.
MIN_SIZE = 448

Ready = TypeVar("Ready")
Detector = TypeVar("Detector", bound=nn.Module)


def detect_by_size(
    images: Sequence[Tensor],
    prepare: Callable[[Tensor], Ready],
    size: Callable[[Ready], Hashable],
    detect: Callable[[list[Ready]], list[Instances]],
) -> list[Instances]:
    """Detect the images of equal size together, so that an image's instances do not depend on its batch.

    Args:
        images: images of any size.
        prepare: preprocessing of an image.
        size: size of a preprocessed image, including its padding.
        detect: instances of preprocessed images of the same size.
    """
    groups: dict[Hashable, list[tuple[int, Ready]]] = {}
    for i, image in enumerate(images):
        ready = prepare(image)
        groups.setdefault(size(ready), []).append((i, ready))
    detected: dict[int, Instances] = {}
    for group in groups.values():
        detected.update(zip((i for i, _ in group), detect([ready for _, ready in group]), strict=True))
    return [detected[i] for i in range(len(images))]


def stretch(image: Tensor, least: int) -> Tensor:
    """Image (3, H, W) with sides of at least ``least`` pixels, for narrow strips."""
    height, width = image.shape[-2:]
    return nn.functional.interpolate(image[None], (max(height, least), max(width, least)))[0]


class TorchvisionExtractor(nn.Module):
    """Base class of instance extractors from torchvision's detectors.

    The detector always runs in evaluation mode, even after ``train()``. Only images of equal size after resizing and
    padding share a forward pass, so an image's instances do not depend on its batch (up to rounding in convolutions).

    Args:
        detector: the model; it is set to evaluation mode.
        labels: names of the detector's classes, from class 1. Detections of a class named ``N/A`` are dropped.
        name: short name, valid as a folder name.
        num_classes: number of the detector's classes, including the background.

    Raises:
        ConfigError: if the numbers of labels and classes differ.
    """

    feature_dim: int

    def __init__(self, detector: nn.Module, labels: Sequence[str], name: str, num_classes: int) -> None:
        super().__init__()
        self.name = name
        self.detector: Any = detector
        if len(labels) != num_classes - 1:
            raise ConfigError(f"The detector {name} has {num_classes - 1} classes, but {len(labels)} labels.")
        self.labels, table = label_of_class([BACKGROUND, *labels])
        self.register_buffer("_label_of_class", table, persistent=False)
        self._label_of_class: Tensor
        self._fingerprint = Fingerprint()
        self.train(False)

    def train(self, mode: bool = True) -> TorchvisionExtractor:
        """Keep evaluation mode; ``mode`` is ignored."""
        super().train(False)
        return self

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of name, labels, input size, thresholds, and every tensor's name, type, shape and bytes."""
        transform = self.detector.transform
        settings = [
            *(self.name, self.labels, self._label_of_class.tolist()),
            *(transform.min_size, transform.max_size, transform.image_mean, transform.image_std),
            *self._settings(),
        ]
        return self._fingerprint(settings, self.detector)

    def forward(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        """Detect instances, see :meth:`gm_mlic.detection.protocol.InstanceExtractor.__call__`.

        Boxes, scores and labels have no gradients.

        Raises:
            ConfigError: if ``m`` is less than 1.
        """
        check_positive(m=m)
        device = self._label_of_class.device

        def prepare(image: Tensor) -> ImageList:
            with torch.no_grad():
                return self._prepare(image.to(device))

        def detect(ready: list[ImageList]) -> list[Instances]:
            tensors, sizes = torch.cat([r.tensors for r in ready]), [r.image_sizes[0] for r in ready]
            return self._detect(ImageList(tensors, sizes), m)

        return detect_by_size(images, prepare, lambda ready: ready.tensors.shape, detect)

    @abstractmethod
    def _settings(self) -> list[Any]:
        """Thresholds for the fingerprint."""

    @abstractmethod
    def _detect(self, batch: ImageList, m: int) -> list[Instances]:
        """Instances of images with the same padded size."""

    def _prepare(self, image: Tensor) -> ImageList:
        """Normalize, resize (if needed) and pad, as the detector does."""
        transform, (height, width) = self.detector.transform, image.shape[-2:]
        if transform.fixed_size is not None:
            return transform([image])[0]
        scale = min(transform.min_size[-1] / min(height, width), transform.max_size / max(height, width))
        if min(height, width) * scale < 1:  # a narrow strip: its shorter side would vanish
            image = stretch(image, math.ceil(1 / scale) + 1)
        if scale != 1:
            return transform([image])[0]
        return ImageList(
            transform.batch_images([transform.normalize(image)], transform.size_divisible), [(height, width)]
        )

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

    @staticmethod
    def _instances(
        chosen: Sequence[tuple[Tensor, Tensor, Tensor]], features: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Instances from the results of :meth:`_choose` for each image, and the features of all boxes."""
        of_images = torch.split(features, [len(boxes) for boxes, _, _ in chosen])
        return [
            Instances((boxes / boxes.new_tensor([width, height] * 2)).clamp(0, 1), scores, labels, of_image)
            for (boxes, scores, labels), (height, width), of_image in zip(chosen, sizes, of_images, strict=True)
        ]


def padded_sizes(batch: ImageList) -> list[tuple[int, int]]:
    """Image sizes for :class:`torchvision.ops.MultiScaleRoIAlign`, which infers the strides of the maps from them.

    It keeps the strides of its first call. Those inferred from the size without padding would be wrong for a narrow
    strip.
    """
    height, width = batch.tensors.shape[-2:]
    return [(height, width)] * len(batch.image_sizes)


def check_thresholds(**thresholds: float) -> None:
    """Raise :class:`~gm_mlic.errors.ArgumentError` for the first threshold outside [0, 1]."""
    for argument, value in thresholds.items():
        if not 0 <= value <= 1:
            raise ArgumentError(argument, f"is {value}: expected a number in [0, 1].")


def image_sizes(min_size: int | None, max_size: int | None, default: int = MIN_SIZE) -> dict[str, int]:
    """Arguments ``min_size`` and ``max_size`` of torchvision's builders.

    Raises:
        ConfigError: unless 32 <= min_size <= max_size.
    """
    min_size = default if min_size is None else min_size
    max_size = round(min_size * 5 / 3) if max_size is None else max_size
    if not 32 <= min_size <= max_size:
        raise ArgumentError("min_size", f"is {min_size} and `max_size` {max_size}: set 32 <= min_size <= max_size.")
    return {"min_size": min_size, "max_size": max_size}


def build_random(build: Callable[..., Detector], seed: int, **settings: Any) -> Detector:
    """Call a builder of torchvision with random weights; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(**settings)


#: Value of ``detections_per_img`` without a limit.
NO_LIMIT = sys.maxsize
