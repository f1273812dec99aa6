"""MS-COCO 2014 in its official layout: two image folders and two annotation files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from gm_mlic.datasets.annotation_rows import Source, TableFormat, label_mask
from gm_mlic.datasets.base import BoxAnnotations, MultiLabelDataset, check_images, check_targets
from gm_mlic.datasets.coco_format import read_instances
from gm_mlic.datasets.download import Archive, fetch
from gm_mlic.datasets.photo_folder import PhotoFolder
from gm_mlic.datasets.splits import Split, rows_of
from gm_mlic.errors import DataError
from gm_mlic.registry import register_dataset
from gm_mlic.schema import Fraction, Seed, Url, checked


def _official(path: str, md5: str, size: int, *holds: str) -> Archive:
    return Archive(f"http://images.cocodataset.org/{path}.zip", f"md5:{md5}", size, holds)


_FORM = TableFormat(file="file_name", split=None)
_TRAIN, _VAL = "train2014/COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000000042.jpg"
_IMAGES = {
    "train2014": _official("zips/train2014", "0da8c0bd3d6becc4dcb32757491aca88", 13_510_573_713, _TRAIN),
    "val2014": _official("zips/val2014", "a3d79f5ed8d289b7a7554ce06a5782b3", 6_645_013_297, _VAL),
}
_JSON = [f"annotations/instances_{archive}.json" for archive in _IMAGES]
_ANNOTATIONS = _official(
    "annotations/annotations_trainval2014", "0a379cfc70b0e71301e0f377548639bd", 252_872_794, *_JSON
)


@register_dataset("coco2014", root="data/coco2014")
class COCO2014(MultiLabelDataset):
    """MS-COCO 2014 with image-level labels derived from its object annotations.

    Expects the layout of the official archives::

        root/train2014/*.jpg
        root/val2014/*.jpg
        root/annotations/instances_train2014.json
        root/annotations/instances_val2014.json

    As in the literature, ``val2014`` is the test set. ``train`` and ``val`` split the images of ``train2014``, ordered
    by id, at random (:func:`~gm_mlic.datasets.splits.rows_of`).

    ============ ========================= ============== ==========
    archive      images with a label       all images     labels
    ============ ========================= ============== ==========
    train2014    82,081                    82,783         80
    val2014      40,137                    40,504         80
    ============ ========================= ============== ==========

    The default ``unlabeled="drop"`` gives 82,081 and 40,137 images, as in the literature.

    A label is present if any annotation of the image has its category, including crowd regions (``iscrowd=1``), as in
    ML-GCN's label files. :meth:`boxes` omits crowd regions, which do not outline single objects, and boxes without
    area. Boxes that exceed the image by at most :data:`~gm_mlic.datasets.coco_format.BOX_TOLERANCE` pixels are clipped.
    Rows are sorted by image id; ``ids`` are these ids as decimal strings.

    Args:
        root: folder with ``train2014``, ``val2014`` and ``annotations``.
        split: ``train``, ``val`` or ``test``.
        val_fraction: fraction of ``train2014`` held out as ``val``, in [0, 1).
        seed: seed of the random val split.
        unlabeled: images without annotations: ``drop`` or ``keep`` them.
        label_order: sort labels by ``name`` (alphabetical, as published label embeddings are) or by category ``id``.
        download: download missing files of this split from the official server (13 GB for train2014, 6 GB for val2014,
            0.25 GB of annotations) and verify them.
        mirror: base URL of a mirror (``http://HOST/FOLDER``); its files are verified in the same way.

    Raises:
        ConfigError: if an argument has an invalid value.
        DataError: if a file is missing or malformed, an annotation names an unknown image or category or has an invalid
            box, or an image file does not exist.
    """

    name = "coco2014"

    @checked
    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        val_fraction: Fraction = 0.1,
        seed: Seed = 0,
        unlabeled: Literal["drop", "keep"] = "drop",
        label_order: Literal["name", "id"] = "name",
        download: bool = False,
        mirror: Url | None = None,
    ) -> None:
        self.split = split
        self.root = Path(root)
        archive = "val2014" if split == "test" else "train2014"
        self.folder = self.root / archive
        source = self.root / "annotations" / f"instances_{archive}.json"
        if download:
            fetch([_ANNOTATIONS, _IMAGES[archive]], self.root, mirror)
        for path, exists in ((self.folder, self.folder.is_dir()), (source, source.is_file())):
            if not exists:
                what = path.relative_to(self.root)
                raise DataError(
                    f"COCO's {what} is missing: expected {path} under `root` ({self.root}); `download=True` fetches it."
                )

        self.labels, rows = read_instances(Source(source, _FORM, PhotoFolder(self.folder)), label_order, boxed=True)
        keys = [key for key, row in rows.items() if unlabeled == "keep" or row.present]
        keys = [keys[n] for n in rows_of(split, len(keys), val_fraction, seed)]
        self._rows = [rows[key] for key in keys]
        check_images(self.folder, [row.file for row in self._rows], str(source))
        self.ids = tuple(map(str, keys))
        self.targets = label_mask(self._rows, self.labels, "present").astype(np.int8)
        check_targets(self.ids, self.labels, self.targets)

    def image(self, i: int) -> Image.Image:
        """The photo of row ``i``; raises :class:`DataError` if its size differs from the annotated one."""
        return self._rows[i].image(self.folder)

    def boxes(self, i: int) -> BoxAnnotations:
        """Object boxes of row ``i`` without crowd regions; possibly empty."""
        return BoxAnnotations.of(self._rows[i].boxes or (), self.labels)
