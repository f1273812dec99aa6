"""NUS-WIDE in its official layout: image lists, one 0/1 file per concept, and photos from Flickr."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
from PIL import Image

from gm_mlic.datasets.annotation_rows import shown
from gm_mlic.datasets.annotation_tables import read_text
from gm_mlic.datasets.base import MultiLabelDataset, check_targets, read_bytes
from gm_mlic.datasets.images import read_image
from gm_mlic.datasets.photo_folder import PhotoFolder, inside
from gm_mlic.datasets.splits import Split, rows_of
from gm_mlic.errors import ConfigError, DataError
from gm_mlic.io import few
from gm_mlic.registry import register_dataset
from gm_mlic.schema import Fraction, Seed, checked

log = logging.getLogger(__name__)

_BY_HAND = (
    "NUS-WIDE cannot be downloaded automatically. From its site (https://lms.comp.nus.edu.sg/wp-content/uploads/2019/"
    "research/nuswide/NUS-WIDE.html) download Groundtruth.zip (TrainTestLabels), ImageList.zip and ConceptsList.zip, "
    "unpack them in dataset.root, and copy the photos, available from the authors on request, to Flickr/"
)


@register_dataset("nuswide", root="data/nuswide")
class NUSWIDE(MultiLabelDataset):
    r"""NUS-WIDE with its 81 concepts.

    Expects::

        root/ConceptsList/Concepts81.txt
        root/ImageList/TrainImagelist.txt, TestImagelist.txt
        root/TrainTestLabels/Labels_CONCEPT_Train.txt, Labels_CONCEPT_Test.txt   (Groundtruth/TrainTestLabels/ too)
        root/Flickr/FOLDER/NAME.jpg                                              (or flat, Flickr/NAME.jpg; images/ too)

    The lists name photos as ``FOLDER\NAME.jpg``. Many photos were removed from Flickr; missing photos are dropped,
    listed in ``missing``, and counted in a warning. Ids are the names in the lists, with ``/``. ``train`` and ``val``
    split the training list at random (:func:`~gm_mlic.datasets.splits.rows_of`), before photos are dropped.

    ============ ============= ========= =================
    list         images        labels    present
    ============ ============= ========= =================
    Train        161,789       81
    Test         107,859       81
    both         269,648       81        503,848
    ============ ============= ========= =================

    Args:
        root: folder with the files above.
        split: ``train``, ``val`` or ``test``.
        val_fraction: fraction of the training list held out as ``val``, in [0, 1).
        seed: seed of the random val split.
        unlabeled: ``keep`` (161,789 and 107,859 images, as in the literature) or ``drop`` images without any of the 81
            concepts.
        download: not supported; true: an error lists what to download manually.

    Attributes:
        missing: names of the missing photos of this split.

    Raises:
        ConfigError: if an argument has an invalid value, or for ``download=True``.
        DataError: if a list is missing or malformed, a label file does not match its list in length or has values other
            than 0 and 1, or no photo exists.
    """

    name = "nuswide"

    @checked
    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        val_fraction: Fraction = 0.1,
        seed: Seed = 0,
        unlabeled: Literal["keep", "drop"] = "keep",
        download: bool = False,
    ) -> None:
        if download:
            raise ConfigError(f"`download=True`: {_BY_HAND} ({Path(root)}).")
        self.split, self.root = split, Path(root)
        part = "Test" if split == "test" else "Train"
        concepts = self.root / "ConceptsList" / "Concepts81.txt"
        self.labels = tuple(_lines(concepts))
        for name in self.labels:
            if len(name) > 100 or "/" in name or "\\" in name:
                raise DataError(f"{concepts} has the invalid concept name {shown(name)}: unpack it again.")
        source = self.root / "ImageList" / f"{part}Imagelist.txt"
        names = [line.replace("\\", "/") for line in _lines(source)]
        for name in names:
            if inside(name) is None:
                raise DataError(f"{source} has the image {shown(name)}: it must stay inside the image folder.")
        present = np.stack([self._label_file(label, part, len(names), source) for label in self.labels], axis=1)

        rows = rows_of(split, len(names), val_fraction, seed)
        if unlabeled == "drop":
            rows = rows[present[rows].any(axis=1)]
            if not rows.size:
                raise DataError(f"No image of {source} in split {split!r} has a concept: set `unlabeled='keep'`.")
        photos = PhotoFolder(self.root)
        found = {int(row): file for row in rows if (file := _find(photos, names[row])) is not None}
        self.missing = tuple(names[row] for row in rows if row not in found)
        if not found:
            raise DataError(
                f"None of the {len(rows)} photos of {source} is in {self.root / 'Flickr'} or {self.root / 'images'} "
                f"(the first is {names[rows[0]]}). {_BY_HAND}."
            )
        if self.missing:
            log.warning(
                "nuswide %s: %d of %d photos are missing in %s and are dropped: %s",
                split, len(self.missing), len(rows), self.root, few(self.missing),
            )  # fmt: skip
        self._files = tuple(found.values())
        self.ids = tuple(names[row] for row in found)
        self.targets = present[list(found)].astype(np.int8)
        check_targets(self.ids, self.labels, self.targets)

    def image(self, i: int) -> Image.Image:
        return read_image(self.root / self._files[i])

    def _label_file(self, label: str, part: str, count: int, listed: Path) -> np.ndarray:
        """(count,) bool of one concept, from a file with 0 or 1 per line."""
        name = f"Labels_{label}_{part}.txt"
        folders = (self.root / "TrainTestLabels", self.root / "Groundtruth" / "TrainTestLabels")
        source = next((folder / name for folder in folders if (folder / name).is_file()), folders[0] / name)
        # Parsed as bytes: a million one-digit lines take milliseconds.
        values = np.frombuffer(read_bytes(source, _BY_HAND).translate(None, b"\r\n \t"), dtype=np.uint8)
        wrong = np.flatnonzero((values != ord("0")) & (values != ord("1")))
        if wrong.size:
            raise DataError(
                f"{source} has {chr(values[wrong[0]])!r} (value number {wrong[0]}): expected 0 or 1 on each line."
            )
        if len(values) != count:
            raise DataError(f"{source} has {len(values)} values, but {listed} has {count} images: unpack both again.")
        result: np.ndarray = values == ord("1")
        return result


def _find(photos: PhotoFolder, name: str) -> PurePosixPath | None:
    """Path of a photo relative to the root; None if it is missing."""
    places = (PurePosixPath(top, part) for top in ("Flickr", "images") for part in (name, name.rpartition("/")[2]))
    return next((found for place in places if (found := photos.find(place)) is not None), None)


def _lines(source: Path) -> list[str]:
    """Stripped, non-empty lines of a text file."""
    lines = [line.strip() for line in read_text(source, _BY_HAND).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"{source} is empty: unpack it again.")
    return lines
