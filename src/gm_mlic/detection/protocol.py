"""Interface of instance extractors: from images to :class:`Instances`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gm_mlic.registry import DETECTORS


@dataclass(frozen=True)
class Instances:
    """M >= 1 instances of one image, sorted by descending confidence.

    Shapes and units:
        boxes: (M, 4) float32, (x1, y1, x2, y2) divided by image width and height: B of eq. 1.
        scores: (M,) float32 confidences in [0, 1].
        detected_labels: (M,) int64 index into the extractor's ``labels``; -1 for none.
        features: (M, D) float32: f of eq. 1.
    """

    boxes: Tensor
    scores: Tensor
    detected_labels: Tensor
    features: Tensor

    def __len__(self) -> int:
        return int(self.boxes.shape[0])

    def top(self, m: int) -> Instances:
        """Top ``m`` instances by confidence (fewer if the image has fewer)."""
        return Instances(self.boxes[:m], self.scores[:m], self.detected_labels[:m], self.features[:m])

    @classmethod
    def whole_image(cls, feature: Tensor) -> Instances:
        """The only instance of an image without detections: score 0, label -1, and the feature (D,) of the image."""
        box = feature.new_tensor([[0, 0, 1, 1]], dtype=torch.float32)
        return cls(box, box.new_zeros(1), torch.full_like(box[:, 0], -1, dtype=torch.int64), feature[None])


@runtime_checkable
class InstanceExtractor(Protocol):
    """Interface of callables that turn a batch of images into instances.

    An image's instances may depend only on the image and on what :attr:`fingerprint` covers, not on the batch or on
    randomness. Instances for a smaller ``m`` are the first of those for a larger one. The instance store relies on
    this: it is built in batches, resumed, and sliced. Boxes, scores and labels have no gradient; features have one only
    if the extractor is trainable.

    Attributes:
        name: short name, valid as a folder name.
        labels: class names of the detector, indexed by ``Instances.detected_labels``.
        feature_dim: D, the length of a feature vector.
        fingerprint: SHA-256 (hex) of the weights and all settings that affect the output.
    """

    name: str
    labels: tuple[str, ...]
    feature_dim: int

    @property
    def fingerprint(self) -> str: ...

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        """Detect instances.

        Args:
            images: RGB images, each (3, H, W) float32 in [0, 1], of any size.
            m: maximum number of instances per image, by confidence over all classes.

        Returns:
            1 to ``m`` instances per image. An image without detections gets one: the whole image, with score 0,
            detected label -1, and the feature pooled over all of it.
        """
        ...


@runtime_checkable
class LookupExtractor(Protocol):
    """Interface of extractors that read the instances of an image by its id, instead of computing them from pixels.

    They have the attributes of :class:`InstanceExtractor` too. Calling one on images raises
    :class:`~gm_mlic.errors.ConfigError`. Augmented views, several views of a photo and on-line detection need pixels,
    and are errors.

    Attributes:
        needs_sizes: whether :meth:`look_up` needs the size of the images.
    """

    needs_sizes: bool

    def check_ids(self, ids: Sequence[str]) -> None:
        """Raise :class:`~gm_mlic.errors.DataError` if images have no instances and none may be left out."""
        ...

    def look_up(self, ids: Sequence[str], sizes: Sequence[tuple[int, int] | None], m: int) -> list[Instances | str]:
        """Instances of images, with the properties of :meth:`InstanceExtractor.__call__`.

        Args:
            ids: ids in the dataset, or paths of photos.
            sizes: width and height of each image in pixels; None is possible unless :attr:`needs_sizes`.
            m: maximum number of instances per image.

        Returns:
            For each image its instances, or the reason why it is left out.
        """
        ...

    def log_corrections(self) -> None:
        """Log in one line what was corrected since the last call, if anything."""
        ...


def build_extractor(name: str, device: str | torch.device = "cpu", **settings: Any) -> InstanceExtractor:
    """Build a registered detector.

    Args:
        name: a registered name, e.g. ``fasterrcnn_resnet50_fpn`` or that of a plugin (:mod:`gm_mlic.registry`).
        device: device of the detector.
        **settings: arguments of the registered class or function.

    Raises:
        ConfigError: if the name or an argument is unknown or invalid.
        WeightsError: if weights are missing or do not fit.
    """
    if "device" in DETECTORS.arguments(name):
        settings["device"] = device
    return DETECTORS.build(name, **settings)  # type: ignore[no-any-return]
