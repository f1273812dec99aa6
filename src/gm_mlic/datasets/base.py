"""What every dataset offers to the rest of the package: ids, labels, targets, images and, where they exist, boxes."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

#: Values of a target, as in VOC's ``ImageSets/Main``.
PRESENT, DIFFICULT, ABSENT = 1, 0, -1


@dataclass(frozen=True)
class BoxAnnotations:
    """Ground-truth boxes of one image.

    Shapes: ``boxes`` (n, 4) float32 as (x1, y1, x2, y2) in pixels, clipped to the image; ``labels`` (n,) int64,
    indices into :attr:`MultiLabelDataset.labels`.
    """

    boxes: Tensor
    labels: Tensor


class MultiLabelDataset(ABC):
    """One split of a multi-label image dataset.

    Rows are images in a fixed order; every later stage (store, graphs, scores) keeps this order and these ids.

    Attributes:
        name: short name of the dataset, the same for all its splits, fit for a folder name.
        split: ``train``, ``val`` or ``test``.
        labels: the C label names; their order is the order of every label axis in the package.
        ids: the N image ids, unique.
        targets: (N, C) int8 with 1 present, 0 difficult, -1 absent.
    """

    name: str
    split: str
    labels: tuple[str, ...]
    ids: tuple[str, ...]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """The image of row ``i`` as RGB, upright.

        Raises:
            UnreadableImage: if it cannot be decoded.
        """

    def boxes(self, i: int) -> BoxAnnotations | None:
        """Ground-truth boxes of row ``i``, or None where the dataset has none."""
        return None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of name, split, labels, ids and targets: what a store or checkpoint was made for."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.name, self.split, list(self.labels), list(self.ids)]).encode())
        digest.update(np.ascontiguousarray(self.targets, dtype=np.int8).tobytes())
        return digest.hexdigest()


def label_ratio(targets: np.ndarray) -> np.ndarray:
    r"""The share :math:`r_c` of images that carry label c (eq. 15 of the paper); "difficult" does not count.

    Args:
        targets: (N, C) in {1, 0, -1}.

    Returns:
        (C,) float64 in [0, 1].
    """
    return np.asarray((targets == PRESENT).mean(axis=0), dtype=np.float64)


def check_targets(ids: Sequence[str], labels: Sequence[str], targets: np.ndarray) -> None:
    """Raise :class:`~gm_mlic.errors.DataError` unless ids and labels are unique, non-empty and fit ``targets``."""
    from gm_mlic.errors import DataError

    if len(ids) == 0:
        raise DataError("The dataset has no images: check `root` and `split`.")
    if len(labels) == 0:
        raise DataError("The dataset has no labels: check its annotation file.")
    for what, names in (("image id", ids), ("label", labels)):
        if len(set(names)) != len(names):
            twice = next(n for n in names if list(names).count(n) > 1)
            raise DataError(f"The {what} {twice!r} occurs more than once: make {what}s unique.")
    if targets.shape != (len(ids), len(labels)):
        raise DataError(f"targets have shape {targets.shape}, expected {(len(ids), len(labels))}.")
    if not np.isin(targets, (PRESENT, DIFFICULT, ABSENT)).all():
        raise DataError("targets may only hold 1 (present), 0 (difficult) and -1 (absent).")
