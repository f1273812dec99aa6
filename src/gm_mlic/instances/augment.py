"""Augmented views of an image, deterministic in (seed, image id, view number)."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image, ImageOps

#: Ranges of a crop's area (fraction of the image) and aspect ratio (width / height) before resizing.
AREA = (0.5, 1.0)
ASPECT = (3 / 4, 4 / 3)


def crop_and_flip(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Crop an image at random, resize it to ``size`` x ``size``, and flip it horizontally with probability 1/2.

    The paper only states random crops, resizing to 448 x 448 and random horizontal flips. Here the crop's area is
    uniform in :data:`AREA` (large, since the labels are kept), its aspect ratio log-uniform in :data:`ASPECT` (limited
    by the image), its position uniform.

    Args:
        image: an RGB image.
        size: output size in pixels.
        rng: random generator; exactly five numbers are drawn.
    """
    area, aspect, across, down, mirror = rng.random(5)
    width, height = image.size
    pixels = width * height * (AREA[0] + area * (AREA[1] - AREA[0]))
    ratio = np.exp(np.log(ASPECT[0]) + aspect * (np.log(ASPECT[1]) - np.log(ASPECT[0])))
    crop_width = min(float(np.sqrt(pixels * ratio)), width)
    crop_height = min(float(np.sqrt(pixels / ratio)), height)
    left, top = across * (width - crop_width), down * (height - crop_height)
    box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
    view = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return ImageOps.mirror(view) if mirror < 0.5 else view


def view_rng(seed: int, image_id: str, view: int) -> np.random.Generator:
    """Random generator of one view, independent of process and order."""
    key = hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, view, *np.frombuffer(key, "<u4").tolist()])
