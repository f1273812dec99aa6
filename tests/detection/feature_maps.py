"""A small backbone, in a module of its own so that it can be pickled."""

from __future__ import annotations

import torch
from torch import nn


class FeatureMaps(nn.Module):
    """Three feature maps with strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
        self.layer1 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(16, 20, 3, 2, 1), nn.ReLU())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        fine = self.layer1(self.stem(images))
        middle = self.layer2(fine)
        return {"0": fine, "1": middle, "2": self.layer3(middle)}
