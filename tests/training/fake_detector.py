"""Fast detector: grid cells and their colors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from gm_mlic.detection import Instances


class GridExtractor:
    """Extractor of a 3 x 3 grid; features are the mean, maximum and minimum color of each cell."""

    name = "grid"
    labels = ("cell",)
    feature_dim = 9

    def __init__(self, seed: int = 0) -> None:
        self.fingerprint = hashlib.sha256(f"grid {seed}".encode()).hexdigest()

    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        return [self._instances(image, m) for image in images]

    def _instances(self, image: Tensor, m: int) -> Instances:
        cells, boxes = [], []
        for y in range(3):
            for x in range(3):
                rows = slice(y * image.shape[1] // 3, (y + 1) * image.shape[1] // 3)
                columns = slice(x * image.shape[2] // 3, (x + 1) * image.shape[2] // 3)
                cell = image[:, rows, columns].flatten(1)
                cells.append(torch.cat([cell.mean(dim=1), cell.amax(dim=1), cell.amin(dim=1)]))
                boxes.append([x / 3, y / 3, (x + 1) / 3, (y + 1) / 3])
        features = torch.stack(cells)
        scores, order = features.std(dim=1).sort(descending=True)
        labels = torch.zeros(9, dtype=torch.int64)
        return Instances(torch.tensor(boxes)[order], scores, labels, features[order]).top(m)
