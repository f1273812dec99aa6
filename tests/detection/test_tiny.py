"""Receptive field of the tiny detector; a large one would reveal the twins in `scenes`."""

from __future__ import annotations

import torch

from gm_mlic.detection.tiny import FEATURE_DIM, TinyBackbone, scenes_tiny


def _receptive_field(map_name: str, stride: int) -> int:
    """Receptive field of one cell in pixels, from gradients."""
    torch.manual_seed(0)
    backbone = TinyBackbone().double().eval()
    image = torch.randn(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    cell = 80 // stride
    backbone(image)[map_name][0, :, cell, cell].sum().backward()
    columns = image.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    return int(columns.max() - columns.min()) + 1


def test_receptive_fields_match_the_docstring():
    assert _receptive_field("fine", 4) <= 27
    assert 27 < _receptive_field("coarse", 8) <= 51


def test_box_features_ignore_pixels_at_distance_20():
    torch.manual_seed(0)
    detector = scenes_tiny(3, 160, 160).eval()
    image = torch.rand(3, 160, 160)
    elsewhere = image.clone()
    elsewhere[:, :, 118:] = torch.rand(3, 160, 42)  # 20 pixels to the right of the box
    box = [torch.tensor([[64.0, 64, 98, 98]])]
    with torch.no_grad():
        features = [
            detector.roi_heads.box_head(
                detector.roi_heads.box_roi_pool(detector.backbone(one[None]), box, [(160, 160)])
            )
            for one in (image, elsewhere)
        ]
    assert features[0].shape == (1, FEATURE_DIM)
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=1e-6)
