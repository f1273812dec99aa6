"""Instance extractor with grid cells of a backbone's feature map instead of boxes, for whole-image models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torchvision.models import resnet101
from torchvision.models.detection import FasterRCNN

from gm_mlic.detection.checkpoints import load_into, read_resnet101
from gm_mlic.detection.network import NetworkExtractor
from gm_mlic.detection.protocol import Instances
from gm_mlic.detection.tiny import TinyBackbone
from gm_mlic.detection.torchvision_detector import MIN_SIZE, build_random
from gm_mlic.errors import ArgumentError
from gm_mlic.registry import register_detector
from gm_mlic.schema import Positive

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GridExtractor(NetworkExtractor):
    r"""Instance extractor (:class:`~gm_mlic.detection.protocol.InstanceExtractor`) with G x G cells of a feature map.

    Images are normalized and resized to a square, without keeping the aspect ratio. The last feature map is averaged
    within each cell, and cell (r, c) becomes instance :math:`rG + c` with box :math:`[c, r, c + 1, r + 1] / G`, score
    1 and the mean feature. Instances have no detected label.

    Args:
        body: module from images (B, 3, S, S) to a map (B, D, H, W), or to a dict of maps, of which the last is used.
        grid_size: G, number of cells along each side, at most H and W.
        size: S, image size in pixels after resizing.
        name: short name, valid as a folder name.
        image_mean, image_std: normalization per color channel.
        trainable: parts that receive gradients: ``none``, or ``all`` of the body.

    Shape:
        features have D = ``feature_dim`` entries: 2048 for the ResNets, 960 for MobileNetV3-Large, 48 for
        ``scenes_tiny``.

    Raises:
        ConfigError: if an argument is invalid, or ``m`` in a call is less than the number of cells.
    """

    def __init__(
        self,
        body: nn.Module,
        grid_size: int,
        size: int,
        name: str,
        image_mean: Sequence[float] = _MEAN,
        image_std: Sequence[float] = _STD,
        trainable: str = "none",
    ) -> None:
        super().__init__(name, ())
        if trainable not in ("none", "all"):
            raise ArgumentError("trainable", f"is {trainable!r}: with `grid_size`, choose one of none, all.")
        self.grid_size, self.size, self.trainable = grid_size, size, trainable
        self.body = body.eval().requires_grad_(trainable == "all")
        # The meta device computes only shapes.
        shapes = {key: tensor.to("meta") for key, tensor in body.state_dict().items()}
        example = torch.empty(1, 3, size, size, device="meta")
        _, self.feature_dim, *sides = _last(torch.func.functional_call(body, shapes, (example,))).shape
        if not 1 <= grid_size <= min(sides):
            raise ArgumentError(
                "grid_size",
                f"is {grid_size}: the feature map of an image of {size} pixels has {sides[0]} x {sides[1]} cells; "
                "lower it, or raise the image size.",
            )
        self._mean: Tensor
        self._std: Tensor
        self._boxes: Tensor
        for key, colors in (("_mean", image_mean), ("_std", image_std)):
            self.register_buffer(key, torch.tensor(colors)[:, None, None], persistent=False)
        row, column = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
        corner = torch.stack([column, row], dim=-1).view(-1, 2)
        self.register_buffer("_boxes", torch.cat([corner, corner + 1], dim=1) / grid_size, persistent=False)

    @classmethod
    def of_detector(cls, detector: FasterRCNN, grid_size: int, name: str, trainable: str = "none") -> GridExtractor:
        """Create a grid from a detector's backbone, with its weights, normalization and ``min_size``.

        Backbones with a feature pyramid use the last map below the pyramid (of the ResNet or MobileNet);
        ``scenes_tiny`` uses map ``fine``, which its box head reads.
        """
        backbone, transform = detector.backbone, detector.transform
        body = backbone.fine if isinstance(backbone, TinyBackbone) else backbone.body
        colors = transform.image_mean, transform.image_std
        return cls(body, grid_size, transform.min_size[-1], name, *colors, trainable=trainable)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of name, G, input size, normalization, and every tensor's name, type, shape and bytes."""
        settings = [self.name, self.grid_size, self.size, self._mean.flatten().tolist(), self._std.flatten().tolist()]
        return self._hash(settings, self.body)

    def _detect(self, pixels: Tensor, rests: Sequence[None], m: int) -> list[Instances]:
        """All cells of each image in row-major order."""
        M = self.grid_size**2
        if m < M:
            raise ArgumentError(
                "m", f"is {m}, but a grid of {self.grid_size} x {self.grid_size} has {M} cells: set it to {M}."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable == "all"):
            cells = nn.functional.adaptive_avg_pool2d(_last(self.body(pixels)), self.grid_size)
            features = cells.flatten(2).transpose(1, 2).float()
        scores, labels = self._boxes.new_ones(M), torch.full((M,), -1, device=self._boxes.device)
        return [Instances(self._boxes, scores, labels, of_image) for of_image in features]

    def _prepare(self, image: Tensor) -> tuple[Tensor, None]:
        pixels = ((image - self._mean) / self._std)[None]
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = nn.functional.interpolate(pixels, (self.size, self.size), mode="bilinear")
        return pixels, None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, grid_size={self.grid_size}, size={self.size})"


def _last(maps: Tensor | dict[str, Tensor]) -> Tensor:
    return maps if isinstance(maps, Tensor) else list(maps.values())[-1]


@register_detector("resnet101", "ResNet-101 as in published baselines: grid cells of its feature map")
def resnet101_grid(
    *,
    weights: str | Path | None = None,
    min_size: Annotated[int, Ge(32)] | None = None,
    grid_size: Positive = 14,
    trainable: Literal["none", "all"] = "none",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> GridExtractor:
    """Build a grid from ResNet-101, without its pooling and last layer.

    Args:
        weights: ``imagenet`` (torchvision's ImageNet weights, downloaded once, 170 MB) or a file
            (:func:`~gm_mlic.detection.checkpoints.read_resnet101`); null: random weights.
        min_size: images are scaled to min_size x min_size pixels; null: 448.
        grid_size: G, to use the G x G cells of the feature map as instances.
        trainable: trained layers: ``none`` (frozen) or ``all`` (needs instances.online=true).
        seed: seed of random weights; the global random state is unchanged.
        device: device of the backbone.

    Raises:
        ConfigError: if an argument is invalid.
        WeightsError: if the weights are missing, cannot be read, or belong to another architecture.
    """
    checkpoint = read_resnet101(weights)
    whole = build_random(resnet101, seed, weights=None)
    layers = [(key, layer) for key, layer in whole.named_children() if key not in ("avgpool", "fc")]
    body = nn.Sequential(OrderedDict(layers))
    load_into(body, checkpoint, "resnet101")
    name = f"resnet101-grid{grid_size}"
    return GridExtractor(body, grid_size, min_size or MIN_SIZE, name, trainable=trainable).to(device)
