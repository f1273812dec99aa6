"""Tiny Faster R-CNN for the `scenes` dataset, with a small receptive field."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.misc import Conv2dNormActivation

FEATURE_DIM = 256
_CHANNELS = 48
_convolution = partial(Conv2dNormActivation, kernel_size=3)


class TinyBackbone(nn.Module):
    """Convolutional backbone (3 x 3, batch normalization, ReLU) with two maps of ``out_channels`` channels.

    The box head reads map ``fine`` (stride 4, receptive field 27 x 27 pixels); map ``coarse`` (stride 8, 51 x 51) is
    only used for region proposals. A feature therefore depends on at most 13 pixels (plus up to 4 of interpolation)
    around its box, not on distant objects; twins in `scenes` can only be distinguished by the graphs.

    Shape:
        (B, 3, H, W) -> ``fine`` (B, 48, H/4, W/4), ``coarse`` (B, 48, H/8, W/8).
    """

    out_channels = _CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            _convolution(3, 16, stride=2),
            _convolution(16, 32),
            _convolution(32, _CHANNELS, stride=2),
            _convolution(_CHANNELS, _CHANNELS),
            _convolution(_CHANNELS, _CHANNELS),
        )
        self.coarse = nn.Sequential(_convolution(_CHANNELS, _CHANNELS, stride=2), _convolution(_CHANNELS, _CHANNELS))

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Compute both maps."""
        fine = self.fine(images)
        return OrderedDict(fine=fine, coarse=self.coarse(fine))


def scenes_tiny(num_classes: int, min_size: int, max_size: int, **settings: Any) -> FasterRCNN:
    """Build the detector with random weights: two-level region proposals, box head 2352 -> 256 -> 256.

    Args:
        num_classes: number of classes, including the background.
        min_size: shorter image side after resizing, in pixels; objects should then measure 8 to 45 pixels.
        max_size: limit of the longer side.
        settings: further arguments of :class:`torchvision.models.detection.FasterRCNN`.
    """
    box_roi_pool = MultiScaleRoIAlign(featmap_names=["fine"], output_size=7, sampling_ratio=2)
    return FasterRCNN(
        TinyBackbone(),
        min_size=min_size,
        max_size=max_size,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        size_divisible=8,
        rpn_anchor_generator=AnchorGenerator(sizes=((12,), (26,)), aspect_ratios=((0.5, 1.0, 1.6),) * 2),
        rpn_pre_nms_top_n_train=200,
        rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=80,
        rpn_post_nms_top_n_test=40,
        rpn_batch_size_per_image=64,
        box_batch_size_per_image=32,
        box_roi_pool=box_roi_pool,
        box_head=TwoMLPHead(_CHANNELS * 7 * 7, FEATURE_DIM),
        box_predictor=FastRCNNPredictor(FEATURE_DIM, num_classes),
        **settings,
    )
