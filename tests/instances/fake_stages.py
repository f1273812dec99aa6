"""Deterministic test doubles: a dataset of small JPEG files, and an extractor based on pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gm_mlic.datasets.base import MultiLabelDataset
from gm_mlic.detection.protocol import Instances
from gm_mlic.errors import UnreadableImage


class Files(MultiLabelDataset):
    """Dataset of ``n`` JPEG files in ``root``, created if missing."""

    def __init__(self, root: Path, n: int = 21, labels: Sequence[str] = ("cat", "dog", "sofa"), seed: int = 0) -> None:
        self.name, self.split, self.root = "files", "train", root
        self.labels = tuple(labels)
        self.ids = tuple(f"{i:04d}" for i in range(n))
        rng = np.random.default_rng(seed)
        voc = rng.integers(-1, 2, (n, len(labels)))
        self.targets, self.difficult = (voc == 1).astype(np.int8), voc == 0
        root.mkdir(exist_ok=True)
        for image_id in self.ids:
            size = tuple(rng.integers(24, 48, 2).tolist())
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            if not self.file(image_id).exists():
                Image.fromarray(pixels).save(self.file(image_id), quality=90)

    def file(self, image_id: str) -> Path:
        return self.root / f"{image_id}.jpg"

    def image(self, i: int) -> Image.Image:
        try:
            return Image.open(self.file(self.ids[i])).convert("RGB")
        except OSError as error:
            raise UnreadableImage(f"{self.ids[i]}.jpg cannot be decoded ({type(error).__name__})") from error


class PixelExtractor:
    """Extractor with grid cells as detections, sorted by brightness; none in black images. Logs calls to ``calls``."""

    name = "pixels"
    labels = ("dark", "bright")
    feature_dim = 6

    def __init__(self, calls: Path | None = None, scale: float = 1.0) -> None:
        self.calls, self.scale = calls, scale
        self.fingerprint = hashlib.sha256(f"pixels {scale}".encode()).hexdigest()

    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        if self.calls is not None:
            line = " ".join(hashlib.sha256(image.numpy().tobytes()).hexdigest()[:12] for image in images) + "\n"
            descriptor = os.open(self.calls, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, line.encode())
            os.close(descriptor)
        return [self._detect(image, m) for image in images]

    def _detect(self, image: Tensor, m: int) -> Instances:
        cells = []
        for y in range(3):
            for x in range(4):
                box = (x / 4, y / 3, (x + 1) / 4, (y + 1) / 3)
                cells.append((self._feature(image, box), box))
        cells = [(f, box) for f, box in cells if f[0] > 0.5]  # image-dependent, often fewer than m
        cells.sort(key=lambda cell: -float(cell[0][0]))
        if not cells:
            whole = (0.0, 0.0, 1.0, 1.0)
            feature = self._feature(image, whole)[None] * self.scale
            return Instances(torch.tensor([whole]), torch.zeros(1), torch.tensor([-1]), feature)
        features = torch.stack([f for f, _ in cells[:m]])
        return Instances(
            boxes=torch.tensor([box for _, box in cells[:m]]),
            scores=features[:, 0].clamp(0, 1),
            detected_labels=(features[:, 0] > 0.51).long(),
            features=features * self.scale,
        )

    @staticmethod
    def _feature(image: Tensor, box: tuple[float, ...]) -> Tensor:
        height, width = image.shape[1:]
        x1, y1, x2, y2 = (round(b * s) for b, s in zip(box, (width, height, width, height), strict=True))
        cell = image[:, y1:y2, x1:x2].reshape(3, -1)
        return torch.cat([cell.mean().reshape(1), cell.mean(1), cell.amax().reshape(1), cell.std().reshape(1)])
