"""Plugin for whole-image models on real photos: plugins=[nanodet_grid] detector=nanodet_grid. See README.md.

nanodet.py is in SHARED/detector, which has to be on PYTHONPATH, and so has this folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from nanodet import MAPS, NanoDet
from torch import Tensor
from torchvision.ops import roi_align

from gm_mlic import Instances, register_detector
from gm_mlic.schema import Positive


class NanoDetGrid:
    """NanoDet-m's features, at the cells of a grid over the photo instead of at its boxes.

    The features of a cell are those that :class:`nanodet.NanoDet` has for a box: the means of the four maps in it.

    Args:
        grid_size: G; the cells are G x G.
    """

    labels: tuple[str, ...] = ()
    feature_dim = NanoDet.feature_dim

    def __init__(self, grid_size: int) -> None:
        self.net = NanoDet()
        self.name = f"nanodet-grid{grid_size}"
        self.fingerprint = hashlib.sha256(f"{self.net.fingerprint},{grid_size}".encode()).hexdigest()
        row, column = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
        corner = torch.stack([column, row], dim=-1).view(-1, 2)
        self.boxes = torch.cat([corner, corner + 1], dim=1) / grid_size

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        found = []
        for image in images:
            *_, maps, (h, w) = self.net._network(image)
            at = [self.boxes * torch.tensor([w, h, w, h])]
            parts = [roi_align(maps[name][None], at, 1, 1 / stride, 4, True) for name, stride in MAPS.items()]
            scores, labels = torch.ones(len(self.boxes)), torch.full((len(self.boxes),), -1)
            cells = Instances(self.boxes, scores, labels, torch.cat(parts, dim=1).flatten(1).float())
            found.append(cells.top(m))
        return found


@register_detector("nanodet_grid")
def nanodet_grid(grid_size: Positive = 7) -> NanoDetGrid:
    """NanoDet-m's features at the cells of a grid.

    Args:
        grid_size: G, to use G x G cells of the photo as instances.
    """
    return NanoDetGrid(grid_size)
