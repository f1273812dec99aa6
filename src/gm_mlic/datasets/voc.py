"""PASCAL VOC 2007 and 2012 in their official layout: image lists per class and one XML file per image."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from gm_mlic.datasets.annotation_folders import parse_xml, voc_objects, xml_number
from gm_mlic.datasets.annotation_tables import read_text
from gm_mlic.datasets.base import BoxAnnotations, MultiLabelDataset, check_images, check_targets
from gm_mlic.datasets.download import Archive, fetch
from gm_mlic.datasets.images import check_size, image_size, read_image
from gm_mlic.datasets.splits import Split, rows_of
from gm_mlic.errors import DataError
from gm_mlic.registry import register_dataset
from gm_mlic.schema import Fraction, Seed, Url, checked

#: The 20 classes in VOC's (alphabetical) order.
LABELS = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def _official(year: int, image_set: str, name: str, md5: str, size: int) -> tuple[str, Archive]:
    """An image set and its archive."""
    url = f"http://host.robots.ox.ac.uk/pascal/VOC/voc{year}/{name}.tar"
    holds = (f"VOCdevkit/VOC{year}/ImageSets/Main/aeroplane_{image_set}.txt",)
    return image_set, Archive(url, f"md5:{md5}", size, holds)


class _VOC(MultiLabelDataset):
    """Common base of both years; see :class:`VOC2007`."""

    year: ClassVar[int]
    #: Official image set and archive of train and val; the same of test.
    train_set: ClassVar[tuple[str, Archive]]
    test_set: ClassVar[tuple[str, Archive]]

    @checked
    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        val_fraction: Fraction = 0.1,
        seed: Seed = 0,
        download: bool = False,
        mirror: Url | None = None,
    ) -> None:
        self.split, self.root = split, Path(root)
        image_set, archive = self.test_set if split == "test" else self.train_set
        if download:
            fetch([archive], self.root, mirror)
        self.folder = self._folder(archive)
        ids, values = self._image_set(image_set)
        rows = rows_of(split, len(ids), val_fraction, seed)
        self.labels, self.ids = LABELS, tuple(ids[row] for row in rows)
        self.targets, self.difficult = (values[rows] == 1).astype(np.int8), values[rows] == 0
        check_images(self.folder / "JPEGImages", [f"{image_id}.jpg" for image_id in self.ids], image_set)
        check_targets(self.ids, self.labels, self.targets, self.difficult)

    def _folder(self, archive: Archive) -> Path:
        """Folder with ImageSets; ``root`` may be any of its parents in the official layout."""
        name = f"VOC{self.year}"
        for folder in (self.root, self.root / name, self.root / "VOCdevkit" / name):
            if (folder / "ImageSets" / "Main").is_dir():
                return folder
        raise DataError(
            f"VOC {self.year}'s ImageSets/Main is missing: expected it in {self.root / 'VOCdevkit' / name}, that is, "
            f"{archive.url.rpartition('/')[2]} unpacked in `root` ({self.root}); `download=True` fetches it."
        )

    def _image_set(self, image_set: str) -> tuple[list[str], np.ndarray]:
        """Ids, and values (N, 20) in {1, 0, -1}, of an official image set, from its 20 class files."""
        files = [self.folder / "ImageSets" / "Main" / f"{label}_{image_set}.txt" for label in LABELS]
        lists, columns = zip(*map(_class_file, files), strict=True)
        for source, ids in zip(files, lists, strict=True):
            if len(set(ids)) != len(ids):
                duplicate = next(image_id for image_id in ids if ids.count(image_id) > 1)
                raise DataError(f"{source} lists image {duplicate} twice: extract the archive again.")
            if ids != lists[0]:
                mismatch = sorted(set(ids) ^ set(lists[0]))
                what = f"image {mismatch[0]} is only in one of them" if mismatch else "their order differs"
                raise DataError(
                    f"{source} and {files[0].name} list different images ({what}): extract the archive again."
                )
        return lists[0], np.stack(columns, axis=1)

    def image(self, i: int) -> Image.Image:
        return read_image(self.folder / "JPEGImages" / f"{self.ids[i]}.jpg")

    def boxes(self, i: int) -> BoxAnnotations:
        """Boxes of row ``i`` from its XML file, without difficult objects; possibly empty.

        Raises:
            DataError: if the file is missing or malformed, names an unknown class, or does not match the image.
        """
        source = self.folder / "Annotations" / f"{self.ids[i]}.xml"
        root = parse_xml(source, "extract the archive again")
        path = self.folder / "JPEGImages" / f"{self.ids[i]}.jpg"
        size = image_size(path)
        width, height = (int(xml_number(root, f"size/{side}", str(source))) for side in ("width", "height"))
        check_size(path, size, (width, height), str(source))
        boxes = []
        for where, label, difficult, box in voc_objects(root, str(source), size, boxed=True):
            if label not in LABELS:
                raise DataError(f"{where} has name {label!r}, not one of VOC's 20 classes: correct the file.")
            if box is not None and not difficult:
                boxes.append((box, label))
        return BoxAnnotations.of(boxes, LABELS)


@register_dataset("voc2007", root="data/voc2007")
class VOC2007(_VOC):
    """PASCAL VOC 2007 with image-level labels from ``ImageSets/Main``.

    Expects the layout of the two official archives; ``root`` may be the parent of ``VOCdevkit``, ``VOCdevkit``, or
    ``VOC2007``::

        root/VOCdevkit/VOC2007/ImageSets/Main/CLASS_trainval.txt, CLASS_test.txt
        root/VOCdevkit/VOC2007/JPEGImages/ID.jpg
        root/VOCdevkit/VOC2007/Annotations/ID.xml

    As in the literature, ``trainval`` is the training set and ``test`` the test set. ``train`` and ``val`` split
    ``trainval`` at random (:func:`~gm_mlic.datasets.splits.rows_of`).

    A target is 1 if the image has an object of the class that is not difficult, else 0. ``difficult`` marks pairs of
    image and class with difficult objects only (0 in the class files). The loss and the metrics define how these are
    counted.

    ============ ========= ========= ================= ============= =========
    image set    images    labels    present           an image      difficult
    ============ ========= ========= ================= ============= =========
    trainval     5,011     20        7,306             1.46          607
    test         4,952     20        7,013             1.42          619
    ============ ========= ========= ================= ============= =========

    Args:
        root: folder with ``VOCdevkit``.
        split: ``train``, ``val`` or ``test``.
        val_fraction: fraction of ``trainval`` held out as ``val``, in [0, 1).
        seed: seed of the random val split.
        download: download missing archives (0.5 GB each) from the official server and verify them.
        mirror: base URL of a mirror (``http://HOST/FOLDER``); its files are verified in the same way.

    Raises:
        ConfigError: if an argument has an invalid value.
        DataError: if a file is missing or malformed, or the class files list different images.
    """

    name = "voc2007"
    year = 2007
    train_set = _official(2007, "trainval", "VOCtrainval_06-Nov-2007", "c52e279531787c972589f7e41ab4ae64", 460_032_000)
    test_set = _official(2007, "test", "VOCtest_06-Nov-2007", "b6e924de25625d8de591ea690078ad9f", 451_020_800)


@register_dataset("voc2012", root="data/voc2012")
class VOC2012(_VOC):
    """PASCAL VOC 2012, as :class:`VOC2007`, with the official val set as ``test``.

    The labels of the official test set are not public. ``train`` and ``val`` split the official ``train`` (5,717
    images); ``test`` is the official ``val`` (5,823 images).

    Args:
        root: folder with ``VOCdevkit``.
        split: ``train``, ``val`` or ``test``.
        val_fraction: fraction of the official ``train`` held out as ``val``, in [0, 1).
        seed: seed of the random val split.
        download: download the missing archive (2 GB) from the official server and verify it.
        mirror: base URL of a mirror (``http://HOST/FOLDER``); its files are verified in the same way.
    """

    name = "voc2012"
    year = 2012
    train_set = _official(2012, "train", "VOCtrainval_11-May-2012", "6cd6e144f989b92b3379bac3b3de84fd", 1_999_639_040)
    test_set = ("val", train_set[1])


def _class_file(source: Path) -> tuple[list[str], np.ndarray]:
    """Ids and values of one ``ImageSets/Main/CLASS_SET.txt``, with lines of an id and 1, 0 or -1."""
    words = read_text(source, "extract the archive again, or set `download=True`").split()
    ids, values = words[::2], words[1::2]
    if len(ids) != len(values) or not ids:
        raise DataError(f"{source} is truncated or empty ({len(words)} words): extract the archive again.")
    wrong = next((n for n, value in enumerate(values) if value not in ("1", "0", "-1")), None)
    if wrong is not None:
        raise DataError(f"{source}: image {ids[wrong]} has value {values[wrong]!r}, expected 1, 0 or -1.")
    return ids, np.array(values, dtype=np.int8)
