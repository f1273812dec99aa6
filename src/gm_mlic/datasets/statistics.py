"""Dataset statistics: label frequencies, label co-occurrence, unreadable images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gm_mlic.datasets.base import MultiLabelDataset, rgb_image
from gm_mlic.errors import DataError
from gm_mlic.targets import normalize_targets


class CoOccurrence(NamedTuple):
    """Co-occurrence of label ``other`` with label ``given``.

    Attributes:
        given, other: label names a and b.
        probability: P(b | a), the fraction of images with a that have b.
        together: number of images with both.
        ratio: r_b, the fraction of all images that have b; equals P(b | a) for independent labels.
    """

    given: str
    other: str
    probability: float
    together: int
    ratio: float


@dataclass(frozen=True)
class DatasetStatistics:
    """Counts over one split of N images and C labels. Difficult labels are only counted in ``difficult``.

    Attributes:
        name, split: of the dataset.
        images: N.
        labels: the C names.
        positives: (C,) int64, images per label.
        difficult: (C,) int64, images per difficult label.
        ratio: (C,) float64, r_c of eq. 15: the fraction of images with each label.
        together: (C, C) int64, images with both labels; the diagonal is ``positives``.
        per_image: (K,) int64, number of images with 0, 1, ..., K - 1 labels.
        boxes: (C,) int64, boxes per label; None without box annotations.
        missing: ids of dropped images whose files do not exist.
    """

    name: str
    split: str
    images: int
    labels: tuple[str, ...]
    positives: NDArray[np.int64]
    difficult: NDArray[np.int64]
    ratio: NDArray[np.float64]
    together: NDArray[np.int64]
    per_image: NDArray[np.int64]
    boxes: NDArray[np.int64] | None
    missing: tuple[str, ...]

    @property
    def labels_per_image(self) -> float:
        """Mean number of labels per image."""
        return float(self.positives.sum() / self.images)

    @property
    def unlabeled(self) -> int:
        """Number of images without labels."""
        return int(self.per_image[0])

    @property
    def conditional(self) -> NDArray[np.float64]:
        """(C, C) P(b | a) for row a and column b; NaN in rows of labels that never occur."""
        with np.errstate(invalid="ignore"):
            return self.together / self.positives[:, None].astype(np.float64)

    def strongest(self, count: int = 10, support: int = 5) -> list[CoOccurrence]:
        """Label pairs with the highest P(b | a), among labels a with at least ``support`` images.

        Ties are ordered by number of images.
        """
        probability = np.where(self.positives[:, None] >= support, np.nan_to_num(self.conditional), 0.0)
        np.fill_diagonal(probability, 0.0)
        order = np.lexsort((-self.together.ravel(), -probability.ravel()))[:count]
        return [
            CoOccurrence(self.labels[a], self.labels[b], float(p), int(self.together[a, b]), float(self.ratio[b]))
            for a, b in (divmod(int(flat), len(self.labels)) for flat in order)
            if (p := probability[a, b]) > 0
        ]

    def as_dict(self) -> dict[str, Any]:
        """Dictionary of plain types, for JSON."""
        return {
            "name": self.name,
            "split": self.split,
            "images": self.images,
            "unlabeled": self.unlabeled,
            "labels_per_image": self.labels_per_image,
            "images_with_n_labels": self.per_image.tolist(),
            "missing": list(self.missing),
            "labels": {
                label: {
                    "images": int(self.positives[c]),
                    "r_c": float(self.ratio[c]),
                    "difficult": int(self.difficult[c]),
                    "boxes": None if self.boxes is None else int(self.boxes[c]),
                }
                for c, label in enumerate(self.labels)
            },
            "together": self.together.tolist(),
        }


def statistics(dataset: MultiLabelDataset) -> DatasetStatistics:
    """Compute the statistics of a split, without decoding images."""
    present, difficult = normalize_targets(np.asarray(dataset.targets), dataset.difficult)
    # float32 is exact up to 2^24 images and multiplies far faster than integers.
    ones = present.astype(np.float32 if len(present) < 2**24 else np.float64)
    return DatasetStatistics(
        name=dataset.name,
        split=dataset.split,
        images=len(dataset),
        labels=tuple(dataset.labels),
        positives=present.sum(axis=0, dtype=np.int64),
        difficult=(np.zeros_like(present) if difficult is None else difficult).sum(axis=0, dtype=np.int64),
        ratio=present.mean(axis=0),
        together=np.rint(ones.T @ ones).astype(np.int64),
        per_image=np.bincount(present.sum(axis=1)).astype(np.int64),
        boxes=_box_counts(dataset),
        missing=tuple(getattr(dataset, "missing", ())),
    )


def _box_counts(dataset: MultiLabelDataset) -> NDArray[np.int64] | None:
    if type(dataset).boxes is MultiLabelDataset.boxes:
        return None
    labels = [boxes.labels.numpy() for boxes in map(dataset.boxes, range(len(dataset))) if boxes is not None]
    return np.bincount(np.concatenate(labels), minlength=len(dataset.labels)).astype(np.int64) if labels else None


def unreadable_images(
    dataset: MultiLabelDataset, progress: Callable[[Iterable[str | None]], Iterable[str | None]] = iter
) -> dict[str, str]:
    """Decode every image; returns the reason for each unreadable image id.

    Args:
        dataset: one split.
        progress: wrapper of the iterable of results (one per image).
    """

    def reason(i: int) -> str | None:
        try:
            rgb_image(dataset, i)
        except DataError as error:
            return str(error)
        return None

    # Pillow releases the GIL while decoding.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        reasons = list(progress(pool.map(reason, range(len(dataset)))))
    return {dataset.ids[i]: text for i, text in enumerate(reasons) if text is not None}
