"""Interface of instance extractors: from images to :class:`Instances`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gm_mlic.errors import ConfigError, StoreError
from gm_mlic.registry import DETECTORS

#: Tolerance of scores and boxes.
ROUNDING = 1e-3


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
        return self.at(slice(m))

    def at(self, index: slice | Tensor) -> Instances:
        """Instances at some indices."""
        return Instances(**{name: value[index] for name, value in vars(self).items()})

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


def detect(
    extractor: InstanceExtractor, images: Sequence[Tensor], m: int, names: Sequence[object] | None = None
) -> list[Instances]:
    """Call an extractor and check what it returns.

    Args:
        extractor: the extractor.
        images, m: see :meth:`InstanceExtractor.__call__`.
        names: names of the images for messages; None: their numbers.

    Raises:
        StoreError: if the result violates the protocol.
    """
    found = extractor(images, m)
    if not isinstance(found, Sequence):
        kind = type(found).__name__
        raise StoreError(f"The detector {extractor.name} returned a {kind}, expected a list of Instances.")
    if len(found) != len(images):
        raise StoreError(f"The detector {extractor.name} returned {len(found)} results for {len(images)} images.")
    for name, instances in zip(names or [f"image {i} of a batch" for i in range(len(images))], found, strict=True):
        check_detected(extractor, instances, m, name)
    return list(found)


def check_detected(extractor: InstanceExtractor, found: Any, m: int, name: object) -> None:
    """Raise :class:`~gm_mlic.errors.StoreError` if the result for the image ``name`` violates the protocol."""
    if (problem := _instances_problem(found, m, extractor.feature_dim, len(extractor.labels))) is not None:
        raise StoreError(f"The detector {extractor.name} returned, for {name}, {problem}.")


def _instances_problem(found: Any, m: int, feature_dim: int, num_classes: int) -> str | None:
    if not isinstance(found, Instances):
        return f"an object of type {type(found).__name__}, expected Instances"
    for name, value in vars(found).items():
        if not isinstance(value, Tensor):
            return f"{name} of type {type(value).__name__}, expected a tensor"
    M = len(found)
    if not 1 <= M <= m:
        return f"{M} instances, expected 1 to {m} by the InstanceExtractor protocol"
    shapes = {"features": (M, feature_dim), "boxes": (M, 4), "scores": (M,), "detected_labels": (M,)}
    for name, shape in shapes.items():
        value = getattr(found, name)
        if tuple(value.shape) != shape:
            return f"{name} of shape {tuple(value.shape)}, expected {shape}"
        if name != "detected_labels" and (not value.is_floating_point() or value.dtype == torch.float64):
            return f"{name} of type {value.dtype}, expected torch.float32"
        # Features with a gradient are those of a trained detector; the loss shows whether it has diverged.
        if name != "detected_labels" and not value.requires_grad and not torch.isfinite(value).all():
            return f"{name} that are NaN or infinite: check its weights"
    if (found.scores.diff() > 0).any():
        return "instances that are not sorted by descending score"
    if found.scores[0] > 1 + ROUNDING or found.scores[-1] < -ROUNDING:
        return "scores outside of 0 to 1"
    if not -1 <= int(found.detected_labels.min()) <= int(found.detected_labels.max()) < num_classes:
        return f"detected labels that are neither -1 nor an index of its {num_classes} classes"
    low, high = found.boxes[:, :2], found.boxes[:, 2:]
    if low.min() < -ROUNDING or high.max() > 1 + ROUNDING:
        return "boxes outside of 0 to 1: divide them by the width and height of the image, and clip them"
    if (low > high).any():
        return "boxes that are not (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2"
    return None


def checked_fingerprint(extractor: InstanceExtractor) -> str:
    """The fingerprint of an extractor, which may be slow to compute.

    Raises:
        ConfigError: if it is not a string, or empty.
    """
    fingerprint: Any = extractor.fingerprint
    if not isinstance(fingerprint, str) or not fingerprint:
        raise ConfigError(
            f"The detector {extractor.name} has the fingerprint {fingerprint!r}, expected a string, such as a hash: "
            "correct its class."
        )
    return fingerprint


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
    extractor: InstanceExtractor = DETECTORS.build(name, **settings)
    problem = _extractor_problem(extractor)
    if problem is not None:
        raise ConfigError(f"The detector {name}, {type(extractor).__name__}, {problem}: correct its class.")
    return extractor


def _extractor_problem(extractor: Any) -> str | None:
    """What an object lacks to be an extractor, except the value of its fingerprint, which may be slow to compute."""
    for attribute in ("name", "labels", "feature_dim"):
        if not hasattr(extractor, attribute):
            return f"has no attribute {attribute}"
    if not hasattr(type(extractor), "fingerprint") and "fingerprint" not in vars(extractor):
        return "has no attribute fingerprint"
    if not callable(extractor):
        return "has no method __call__(images, m)"
    if not isinstance(extractor.name, str) or not re.fullmatch(r"\w[\w.-]*", extractor.name):
        return f"has the name {extractor.name!r}, expected a string that can be the name of a folder"
    if isinstance(extractor.labels, str) or not all(isinstance(label, str) for label in extractor.labels):
        return "has an attribute labels that is no tuple of strings"
    if not isinstance(extractor.feature_dim, int) or extractor.feature_dim < 1:
        return f"has the feature_dim {extractor.feature_dim!r}, expected an integer of at least 1"
    return None
