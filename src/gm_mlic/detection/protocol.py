"""The contract between detectors and the rest of the package: images in, :class:`Instances` out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Instances:
    """The M instances of one image, highest confidence first (M >= 1).

    Shapes and units:
        boxes: (M, 4) float32, (x1, y1, x2, y2) divided by image width and height: B of eq. 1.
        scores: (M,) float32 confidences in [0, 1].
        detected_labels: (M,) int64 index into the extractor's ``labels``; -1 where there is none.
        features: (M, D) float32: f of eq. 1.
    """

    boxes: Tensor
    scores: Tensor
    detected_labels: Tensor
    features: Tensor

    def __len__(self) -> int:
        return int(self.boxes.shape[0])

    def top(self, m: int) -> Instances:
        """The ``m`` most confident instances (fewer if the image has fewer)."""
        return Instances(self.boxes[:m], self.scores[:m], self.detected_labels[:m], self.features[:m])


@runtime_checkable
class InstanceExtractor(Protocol):
    """Anything that turns a batch of images into instances.

    An image's instances may depend on nothing but the image and what :attr:`fingerprint` covers: not on the other
    images of the batch, nor on chance, nor on ``m``: those for a smaller ``m`` are the first of those for a larger one.
    The instance store relies on it: it is built in batches, resumed, and sliced. Boxes, scores and labels carry no
    gradient. Features carry none either, unless the extractor is one that can be trained and was told to.

    Attributes:
        name: short name, fit for a folder name.
        labels: names of the detector's own classes, which ``Instances.detected_labels`` index.
        feature_dim: D, the length of an instance's feature vector.
        fingerprint: SHA-256 (hex) over weights and every setting that changes the output.
    """

    name: str
    labels: tuple[str, ...]
    feature_dim: int

    @property
    def fingerprint(self) -> str: ...

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        """Detect.

        Args:
            images: RGB images, each (3, H, W) float32 in [0, 1], of any sizes.
            m: how many instances to keep for each image, by confidence over all classes.

        Returns:
            For each image its 1 to ``m`` instances. An image without any detection gets one: the whole image, with
            score 0, detected label -1, and the feature pooled over all of it.
        """
        ...
