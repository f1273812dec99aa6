"""Base class of extractors with a network: labels, batches of equal size, evaluation mode, fingerprint."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gm_mlic.detection.labels import label_of_class
from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import check_positive


class NetworkExtractor(nn.Module):
    """Base class of extractors with a network.

    It always runs in evaluation mode, even after ``train()``. Only images of equal size after resizing and padding
    share a forward pass, so an image's instances do not depend on its batch (up to rounding in convolutions).

    Args:
        name: short name, valid as a folder name.
        classes: name of each class of the network; those of unused classes are no labels.

    Attributes:
        trainable: parts that receive gradients; ``none`` if the network is frozen.
    """

    feature_dim: int
    trainable = "none"

    def __init__(self, name: str, classes: Sequence[str]) -> None:
        super().__init__()
        self.name = name
        self.labels, table = label_of_class(classes)
        self.register_buffer("_label_of_class", table, persistent=False)
        self._label_of_class: Tensor
        self._hashed: tuple[tuple[int, ...], str] | None = None
        self.train(False)

    def train(self, mode: bool = True) -> NetworkExtractor:
        """Keep evaluation mode; ``mode`` is ignored."""
        super().train(False)
        return self

    def forward(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        """Detect instances, see :meth:`gm_mlic.detection.protocol.InstanceExtractor.__call__`.

        Boxes, scores and labels have no gradients.

        Raises:
            ConfigError: if ``m`` is less than 1.
        """
        check_positive(m=m)
        groups: dict[torch.Size, list[tuple[int, Tensor, Any]]] = {}
        for i, image in enumerate(images):
            with torch.no_grad():
                pixels, rest = self._prepare(image.to(self._label_of_class.device))
            groups.setdefault(pixels.shape, []).append((i, pixels, rest))
        found: dict[int, Instances] = {}
        for rows, batch, rests in (zip(*group, strict=True) for group in groups.values()):
            found.update(zip(rows, self._detect(torch.cat(batch), rests, m), strict=True))
        return [found[i] for i in range(len(images))]

    @abstractmethod
    def _prepare(self, image: Tensor) -> tuple[Tensor, Any]:
        """Input (1, 3, H, W) of the network for an image, including its padding, and what else is needed of it."""

    @abstractmethod
    def _detect(self, pixels: Tensor, rests: Sequence[Any], m: int) -> list[Instances]:
        """Instances of prepared images of the same size, (B, 3, H, W)."""

    def _hash(self, settings: list[Any], network: nn.Module) -> str:
        """SHA-256 (hex) of settings and every tensor's name, type, shape and bytes, cached until a tensor changes.

        The settings are JSON-serializable and must not change between calls.
        """
        tensors = sorted(network.state_dict().items())
        versions = tuple(tensor._version for _, tensor in tensors)
        if self._hashed is None or self._hashed[0] != versions:
            digest = hashlib.sha256(json.dumps(settings).encode())
            for key, tensor in tensors:
                digest.update(json.dumps([key, str(tensor.dtype), tuple(tensor.shape)]).encode())
                digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
            self._hashed = versions, digest.hexdigest()
        return self._hashed[1]


def stretch(image: Tensor, least: int) -> Tensor:
    """Image (3, H, W) with sides of at least ``least`` pixels, for narrow strips."""
    height, width = image.shape[-2:]
    return nn.functional.interpolate(image[None], (max(height, least), max(width, least)))[0]
