"""Dataset base class: ids, labels, targets, images and optional boxes."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gm_mlic.datasets.photo_folder import PhotoFolder
from gm_mlic.errors import DataError
from gm_mlic.io import few
from gm_mlic.targets import first_other_value, normalize_targets

#: Corners (x1, y1, x2, y2).
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class BoxAnnotations:
    """Ground-truth boxes of one image.

    Shapes: ``boxes`` (n, 4) float32 as (x1, y1, x2, y2) in pixels, clipped to the image; ``labels`` (n,) int64,
    indices into :attr:`MultiLabelDataset.labels`.
    """

    boxes: Tensor
    labels: Tensor

    @classmethod
    def of(cls, boxes: Sequence[tuple[Box, str]], labels: Sequence[str]) -> BoxAnnotations:
        """From pairs of a box and its label, which may be none, and all labels."""
        corners, names = torch.tensor([box for box, _ in boxes], dtype=torch.float32), [name for _, name in boxes]
        return cls(corners.reshape(-1, 4), torch.tensor([labels.index(name) for name in names], dtype=torch.int64))


class MultiLabelDataset(ABC):
    """One split of a multi-label image dataset.

    Rows are images in a fixed order. Every later stage (store, graphs, scores) keeps this order and these ids.

    Attributes:
        name: short name of the dataset, equal for all splits and valid as a folder name.
        split: ``train``, ``val`` or ``test``.
        labels: the C label names, in the order of every label axis in the package.
        ids: the N image ids, unique.
        targets: (N, C), 1 present, 0 absent; bool or any number type (int8 in the built-in datasets).
        difficult: (N, C) bool mask of difficult image-label pairs (VOC), whose target is 0; None (default) for datasets
            without difficult labels.
    """

    name: str
    split: str
    labels: tuple[str, ...]
    ids: tuple[str, ...]
    targets: np.ndarray
    difficult: np.ndarray | None = None
    #: Option of the config group ``detector`` that this dataset selects.
    detector: ClassVar[str] = "resnet50_fpn"

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """The image of row ``i`` as RGB, upright.

        Raises:
            UnreadableImage: if it cannot be decoded.
        """

    def boxes(self, i: int) -> BoxAnnotations | None:
        """Ground-truth boxes of row ``i``; None if the dataset has none."""
        return None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of name, split, labels, ids, targets and the difficult mask."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.name, self.split, list(self.labels), list(self.ids)]).encode())
        digest.update(np.ascontiguousarray(self.targets, dtype=np.int8).tobytes())
        if self.difficult is not None:
            digest.update(np.ascontiguousarray(self.difficult, dtype=bool).tobytes())
        return digest.hexdigest()


def label_ratio(targets: np.ndarray, difficult: np.ndarray | None = None) -> np.ndarray:
    r"""Label frequency :math:`r_c`: the fraction of images with label c (eq. 15). Difficult pairs are not counted.

    Args:
        targets: (N, C) in {0, 1}.
        difficult: (N, C) bool, or None.

    Returns:
        (C,) float64 in [0, 1].

    Raises:
        DataError: if targets have other values.
    """
    present, _ = normalize_targets(targets, difficult)
    return np.asarray(present.mean(axis=0), dtype=np.float64)


def rgb_image(dataset: MultiLabelDataset, row: int) -> Image.Image:
    """The image of a row.

    Raises:
        UnreadableImage: if it cannot be decoded.
        DataError: if the class of the dataset returns something else.
    """
    image = dataset.image(row)
    if not isinstance(image, Image.Image) or image.mode != "RGB":
        kind = f"an image of mode {image.mode}" if isinstance(image, Image.Image) else f"a {type(image).__name__}"
        place = f"{type(dataset).__name__}.image"
        raise DataError(f"{place} returned {kind} for {dataset.ids[row]!r}, expected an RGB image of PIL: correct it.")
    return image


def check_dataset(dataset: object) -> None:
    """Check a dataset that a registered class has built, before its images are read.

    Raises:
        DataError: if it lacks an attribute, has no labels or images, or is inconsistent.
    """
    kind = type(dataset).__name__
    if not isinstance(dataset, MultiLabelDataset):
        raise DataError(f"The dataset is a {kind}, expected a subclass of MultiLabelDataset: correct its class.")
    for attribute in ("name", "split", "labels", "ids", "targets"):
        if not hasattr(dataset, attribute):
            raise DataError(f"The dataset {kind} has no attribute {attribute}: correct its class.")
    for attribute in ("labels", "ids"):
        names = getattr(dataset, attribute)
        if not isinstance(names, tuple):
            raise DataError(f"The dataset {kind} has {attribute} of type {type(names).__name__}, expected a tuple.")
        if others := [name for name in names if not isinstance(name, str)]:
            raise DataError(f"The dataset {kind} has {attribute} of type {type(others[0]).__name__}, expected strings.")
    if not isinstance(dataset.name, str) or not re.fullmatch(r"\w[\w.-]*", dataset.name):
        raise DataError(f"The dataset {kind} has the name {dataset.name!r}, which cannot be the name of a folder.")
    if not isinstance(dataset.targets, np.ndarray):
        raise DataError(f"The dataset {kind} has targets of type {type(dataset.targets).__name__}, expected an array.")
    check_targets(dataset.ids, dataset.labels, dataset.targets, dataset.difficult)


def read_bytes(source: Path, remedy: str = "check the path and the permissions") -> bytes:
    """Content of a file; raises :class:`DataError`, which ends with ``remedy``, if it cannot be read."""
    try:
        return source.read_bytes()
    except OSError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}): {remedy}.") from error


def check_images(folder: Path, names: Sequence[str], listed_in: str) -> None:
    """Raise :class:`DataError` if an image does not exist in the folder. The folder is listed once, which is fast."""
    photos = PhotoFolder(folder)
    missing = [name for name in names if photos.find(PurePosixPath(name)) != PurePosixPath(name)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} images of {listed_in} are missing in {folder} ({few(missing)}): extract "
            "the archive again, or set `download=True`."
        )


def check_targets(
    ids: Sequence[str], labels: Sequence[str], targets: np.ndarray, difficult: np.ndarray | None = None
) -> None:
    """Check that ids, labels, targets and the difficult mask of a dataset are consistent.

    Ids and labels must be unique and non-empty, targets in {0, 1}, and 0 for difficult pairs.

    Raises:
        DataError: if they are not.
    """
    if len(ids) == 0:
        raise DataError("The dataset has no images: check its folder and its splits.")
    if len(labels) == 0:
        raise DataError("The dataset has no labels: check its annotations.")
    for what, names in (("image id", ids), ("label", labels)):
        if len(set(names)) != len(names):
            duplicate = next(n for n in names if list(names).count(n) > 1)
            raise DataError(f"The {what} {duplicate!r} occurs more than once: {what}s must be unique.")
    if targets.shape != (len(ids), len(labels)):
        raise DataError(f"targets have shape {targets.shape}, expected {(len(ids), len(labels))}.")
    other = first_other_value(targets, (0, 1))
    if other is not None:
        raise DataError(
            f"targets contain {other:g}: use 1 (present) and 0 (absent), and the bool mask `difficult` for difficult "
            "labels."
        )
    if difficult is None:
        return
    if difficult.dtype != bool or difficult.shape != targets.shape:
        raise DataError(f"difficult is {difficult.dtype} {difficult.shape}, expected bool {targets.shape}.")
    row, column = (part[:1] for part in np.nonzero(difficult & (targets == 1)))
    if row.size:
        raise DataError(
            f"Image {ids[int(row[0])]!r}: the label {labels[int(column[0])]!r} is both present and difficult: set its "
            "target to 0."
        )
