"""People's own photos: a folder of images and a table of labels."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from PIL import Image

from gm_mlic.datasets.annotation_files import (
    Annotations,
    ImageRow,
    TableFormat,
    close_to,
    read_annotations,
    read_text,
)
from gm_mlic.datasets.base import BoxAnnotations, MultiLabelDataset, check_targets
from gm_mlic.datasets.coco_format import clip_box, leaves_folder
from gm_mlic.datasets.images import image_size, read_image
from gm_mlic.datasets.splits import SPLITS, check_split, stratified
from gm_mlic.errors import ArgumentError, DataError, UnreadableImage

log = logging.getLogger(__name__)


class CustomDataset(MultiLabelDataset):
    r"""A folder of photos and what people know about them, in one or several annotation files.

    The suffix of an annotation file says what it is (UTF-8, with or without a byte order mark):

    * ``.csv``, ``.tsv``, ``.txt``: a table whose first line names the columns; delimiter comma, semicolon, tab or bar.
      Either the column ``labels`` lists them (``cat;dog``; empty: none), or each label has a column of its own with
      1 or 0. Spaces around names and cells do not count::

          file,labels,split                  file,cat,dog
          a.jpg,cat;dog,train                a.jpg,1,1
          b.jpg,,test                        b.jpg,0,0

    * ``.jsonl``, ``.ndjson``: one object a line; boxes are in pixels, and may stand for the labels::

          {"file": "a.jpg", "labels": ["cat"], "boxes": [[10, 20, 110, 90, "cat"]], "split": "train"}

    * ``.json``: COCO's instances format, as strictly as :class:`~gm_mlic.datasets.coco.COCO2014` reads it.

    *Targets.* A label is present or absent; an image without labels is kept, with all of them absent. Only a table with
    a column for each label can hold difficult ones, and only with ``target_format="voc"``: its cells are 1 present, 0
    difficult, -1 absent. (A table of 0 and 1 alone is refused there: it would turn every absent label into a difficult
    one.) However the file is written, ``targets`` are in {0, 1}, and ``difficult`` is a mask.

    *Labels* are in the order of ``labels`` if given, else of the columns, else alphabetical. They are those of all
    splits together. Two that differ only in case, spaces or underscores are refused.

    *Splits.* Annotations say them (one file for each split, or the column ``split`` with train, val or test), or they
    are drawn, stratified over the labels (:func:`~gm_mlic.datasets.splits.stratified`): ``test`` is ``test_fraction``
    of all images, ``val`` is ``val_fraction`` of the others. Where annotations say splits but no ``val``, that is drawn
    from their ``train``. The same annotations and seed give the same splits; whether a file is missing changes nothing.

    Rows are in the order of the annotation file (COCO: of the image ids); ``ids`` are the file names below ``root``.
    The fingerprint covers the size of each file in bytes, so that photos that were changed are detected again.

    Args:
        root: the folder that file names start from.
        split: ``train``, ``val`` or ``test``.
        annotations: one annotation file, or one for each split as ``{"train": ..., "test": ...}``. Relative paths start
            from ``root``.
        folders: with one annotation file for each split, the folder below ``root`` that its file names start from, as
            ``{"train": "train", "test": "test"}``; None: ``root`` itself.
        labels: the names allowed, in this order: a list, or a text file with one in each line. An annotated label that
            is not among them is an error.
        columns: what the columns or keys ``file``, ``labels`` and ``split`` are called; None for labels or split: there
            is none. (``boxes`` is always called so.)
        separator: between the labels of one cell.
        suffix: added to each file name, as ``.jpg`` where the table has only ids.
        ignore_columns: columns of a table that are no labels (only needed where each label has its own).
        target_format: ``binary`` or ``voc``, as above.
        missing: what to do about images that do not exist: stop (``error``), or leave them out (``drop``), log them and
            name them in ``missing``.
        val_fraction: in [0, 1).
        test_fraction: in [0, 1).
        seed: of the splits that are drawn.

    Attributes:
        missing: file names of this split that were left out.

    Raises:
        ConfigError: for a setting with another value.
        DataError: if a file is missing or malformed, an image occurs twice (or in two splits), a label is not allowed,
            or no image is left for the split.
    """

    name = "custom"

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        annotations: str | Path | Mapping[str, str | Path] = "labels.csv",
        folders: Mapping[str, str] | None = None,
        labels: str | Path | Sequence[str] | None = None,
        columns: Mapping[str, str | None] | None = None,
        separator: str = ";",
        suffix: str = "",
        ignore_columns: Sequence[str] = (),
        target_format: Literal["binary", "voc"] = "binary",
        missing: Literal["error", "drop"] = "error",
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        check_split(split, val_fraction)
        for key, value, allowed in (
            ("target_format", target_format, ("binary", "voc")),
            ("missing", missing, ("error", "drop")),
        ):
            if value not in allowed:
                raise ArgumentError(key, f"is {value!r}: choose one of {', '.join(allowed)}.")
        if not 0.0 <= test_fraction < 1.0:
            raise ArgumentError("test_fraction", f"is {test_fraction}: choose a share in [0, 1).")
        if not separator:
            raise ArgumentError("separator", "is empty: give the text between the labels of one cell.")
        unknown = [key for key in columns or {} if key not in ("file", "labels", "split")]
        if unknown:
            raise ArgumentError("columns", f"has {unknown[0]!r}: only file, labels and split can be renamed.")
        self.split = split
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{self.root} is not a folder: set `root` to the folder with the images.")
        form = TableFormat(
            **dict(columns or {}),  # type: ignore[arg-type]
            separator=separator,
            suffix=suffix,
            ignore=tuple(ignore_columns),
            target_format=target_format,
        )

        read = _read_all(self.root, annotations, folders or {}, form)
        rows = [row for part in read for row in part.rows]
        self.labels = _labels(read, None if labels is None else _allowed(self.root, labels))
        targets, difficult = (_mask(rows, self.labels, name) for name in ("present", "difficult"))
        if split == "train":  # it is the same for every split: say it once
            _warn(self.labels, targets, separator)
        check_targets([row.file for row in rows], self.labels, targets, difficult)
        splits = _assign([row.split for row in rows], targets, val_fraction, test_fraction, seed)
        chosen = np.flatnonzero(splits == split)
        if not chosen.size:
            raise DataError(_empty(split, splits, read, val_fraction, test_fraction))

        sizes = [_bytes(self.root / rows[i].file) for i in chosen]
        gone = [rows[i].file for i, size in zip(chosen, sizes, strict=True) if size is None]
        if gone:
            message = f"{len(gone)} of {len(chosen)} images of split {split!r} are missing in {self.root}"
            examples = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "") + _similar_file(self.root, gone[0])
            if missing == "error" or len(gone) == len(chosen):
                raise DataError(f"{message} ({examples}): restore them, or leave them out with `missing='drop'`.")
            log.warning("%s and are left out: %s", message, examples)
        self.missing = tuple(gone)
        self._bytes = [size for size in sizes if size is not None]
        kept = [int(i) for i, size in zip(chosen, sizes, strict=True) if size is not None]
        self._rows = [rows[i] for i in kept]
        self.ids = tuple(row.file for row in self._rows)
        self.targets = targets[kept].astype(np.int8)
        self.difficult = difficult[kept] if target_format == "voc" else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the base class's fingerprint and of the size of every image file in bytes."""
        return hashlib.sha256(json.dumps([super().fingerprint, self._bytes]).encode()).hexdigest()

    def image(self, i: int) -> Image.Image:
        """The photo of row ``i`` as RGB, upright.

        Raises:
            UnreadableImage: if it cannot be decoded.
            DataError: if its size is not the one that COCO's JSON says, since the boxes would not fit.
        """
        row = self._rows[i]
        image = read_image(self.root / row.file)
        if row.size is not None and image.size != row.size:
            raise DataError(
                f"Image {self.root / row.file} is {image.width} x {image.height} pixels, but {row.where} says "
                f"{row.size[0]} x {row.size[1]}: the boxes would not fit; mend one of them."
            )
        return image

    def boxes(self, i: int) -> BoxAnnotations | None:
        """The boxes of row ``i``, clipped to the image; None where none are annotated, or the image cannot be read.

        Raises:
            DataError: if a box reaches more than two pixels over the image's border.
        """
        row = self._rows[i]
        if row.boxes is None:
            return None
        boxes = row.boxes
        if row.size is None:
            try:
                size = image_size(self.root / row.file)
            except UnreadableImage:
                return None
            clipped = [(clip_box(box, size, f"{row.where} has the box {list(box)}"), label) for box, label in boxes]
            boxes = tuple((box, label) for box, label in clipped if box is not None)
        return BoxAnnotations(
            boxes=torch.tensor([box for box, _ in boxes], dtype=torch.float32).reshape(-1, 4),
            labels=torch.tensor([self.labels.index(label) for _, label in boxes], dtype=torch.int64),
        )


# ---- Reading ----


def _read_all(
    root: Path, annotations: str | Path | Mapping[str, str | Path], folders: Mapping[str, str], form: TableFormat
) -> list[Annotations]:
    """The annotation files; with one for each split, every row says its split and has its folder."""
    if not isinstance(annotations, Mapping):
        if folders:
            raise ArgumentError("folders", "needs `annotations` with a file for each split.")
        return [read_annotations(_path(root, annotations, "annotations"), form)]
    for split in annotations:
        if split not in SPLITS:
            raise ArgumentError("annotations", f"has {split!r}: expected a file for each of train, val and test.")
    for split, folder in folders.items():
        if split not in annotations:
            raise ArgumentError("folders", f"has {split!r}, but `annotations` has not.")
        if leaves_folder(folder):
            raise ArgumentError(f"folders[{split!r}]", f"is {folder!r}: name a folder inside `root`.")
    read = []
    first: dict[str, str] = {}
    for split, path in annotations.items():
        part = read_annotations(_path(root, path, f"annotations[{split!r}]"), form)
        below = PurePosixPath(folders.get(split, ""))
        rows = tuple(row._replace(file=str(below / row.file)) for row in part.rows)
        for row in rows:
            if row.file in first:
                raise DataError(
                    f"{row.where} repeats the image {row.file!r} ({first[row.file]}): an image belongs to one split."
                )
            if row.split not in (None, split):
                raise DataError(f"{row.where} says split {row.split!r}, but `annotations` says {split!r}.")
            first[row.file] = row.where
        read.append(Annotations(part.source, part.labels, tuple(row._replace(split=split) for row in rows)))
    if not read:
        raise ArgumentError("annotations", "is empty: name an annotation file.")
    return read


def _path(root: Path, path: str | Path, argument: str) -> Path:
    """A file that an argument names, relative to the image folder."""
    found = root / path
    if not found.is_file():
        here = Path(path).absolute()
        hint = f"; there is one at {here}, so set its full path" if here.is_file() else ""
        raise DataError(f"{found} is not a file: `{argument}` is a path from `root`, or a full one{hint}.")
    return found


# ---- Labels ----


def _allowed(root: Path, labels: str | Path | Sequence[str]) -> tuple[str, ...]:
    """The label list of the setting ``labels``."""
    if isinstance(labels, (str, Path)):
        source = _path(root, labels, "labels")
        names = tuple(line.strip() for line in read_text(source).splitlines() if line.strip())
        where = f"{source}"
    else:
        names, where = tuple(labels), "`labels`"
    if not names:
        raise DataError(f"{where} names no label: name at least one.")
    for n, name in enumerate(names):
        if not isinstance(name, str):
            raise DataError(f"{where} has the label {name!r}: a text is needed.")
        if name in names[:n]:
            raise DataError(f"{where} names the label {name!r} twice: remove one.")
    _check_spelling(dict.fromkeys(names, where))
    return names


def _labels(read: Sequence[Annotations], allowed: tuple[str, ...] | None) -> tuple[str, ...]:
    """The label names of all annotation files, in their order."""
    # Every label and where it was first met; declared ones (columns, categories) before those that rows list.
    met: dict[str, str] = {}
    for part in read:
        for label in part.labels or ():
            met.setdefault(label, str(part.source))
        for row in part.rows:
            for label in (*row.present, *row.difficult):
                if label not in met:
                    met[label] = row.where
    if allowed is not None:
        for label, where in met.items():
            if label not in allowed:
                raise DataError(f"{where}: the label {label!r} is not in `labels`{close_to(label, allowed)}")
        return allowed
    _check_spelling(met)
    declared = read[0].labels
    for part in read[1:]:
        if (part.labels is None) != (declared is None) or set(part.labels or ()) != set(declared or ()):
            ours, theirs = set(declared or ()), set(part.labels or ())
            only = sorted(ours ^ theirs)[:1]
            what = f" (only one has {only[0]!r})" if only else ""
            raise DataError(
                f"{read[0].source} and {part.source} do not declare the same labels{what}: mend one, or name all "
                "labels in `labels`."
            )
    return declared if declared is not None else tuple(sorted(met))


def _check_spelling(met: Mapping[str, str]) -> None:
    """Refuse labels that are blank, unprintable or padded, and two that look alike; ``met`` says where each one is."""
    first: dict[str, str] = {}
    for label, where in met.items():
        if not label.strip() or label != label.strip():
            raise DataError(f"{where}: the label {label!r} has spaces around it or nothing in it: mend it.")
        if not label.isprintable():
            raise DataError(f"{where}: the label {label!r} has an unprintable character: type it anew.")
        key = " ".join(unicodedata.normalize("NFKC", label).casefold().replace("_", " ").split())
        if key in first:
            other = first[key]
            raise DataError(
                f"{where}: the label {label!r} and the label {other!r} ({met[other]}) differ only in case, spaces or "
                "the like: spell them alike if they are one, else rename one."
            )
        first[key] = label


def _mask(rows: Sequence[ImageRow], labels: Sequence[str], which: str) -> np.ndarray:
    """(N, C) bool, the labels that each row lists as ``present`` or ``difficult``."""
    column = {label: c for c, label in enumerate(labels)}
    mask = np.zeros((len(rows), len(labels)), dtype=bool)
    for i, row in enumerate(rows):
        mask[i, [column[label] for label in getattr(row, which)]] = True
    return mask


def _warn(labels: Sequence[str], targets: np.ndarray, separator: str) -> None:
    """Log what is allowed, but is seldom meant."""
    never = [label for c, label in enumerate(labels) if not targets[:, c].any()]
    if never:
        examples = ", ".join(never[:10]) + (", ..." if len(never) > 10 else "")
        log.warning("%d labels are on no image: %s", len(never), examples)
    joined = [label for label in labels if any(mark in label for mark in ";|,\t" if mark != separator)]
    if joined:
        log.warning(
            "%r is read as one label; if these are several, set the separator (now %r) to what separates them",
            joined[0],
            separator,
        )


# ---- Splits ----


def _assign(
    annotated: Sequence[str | None], targets: np.ndarray, val_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """(N,) the split of each row: as annotated, the rest drawn."""
    splits = np.array([split or "train" for split in annotated])
    if annotated[0] is None:
        _draw(splits, "test", targets, test_fraction, seed)
    if "val" not in annotated:
        _draw(splits, "val", targets, val_fraction, seed)
    return splits


def _draw(splits: np.ndarray, split: str, targets: np.ndarray, fraction: float, seed: int) -> None:
    """Move that share of the training rows to ``split``, in place."""
    rows = np.flatnonzero(splits == "train")
    if fraction and rows.size:
        splits[rows[stratified(targets[rows], fraction, seed)]] = split


def _empty(
    split: str, splits: np.ndarray, read: Sequence[Annotations], val_fraction: float, test_fraction: float
) -> str:
    counts = ", ".join(f"{name} {int((splits == name).sum())}" for name in SPLITS)
    where = " and ".join(str(part.source) for part in read)
    has_splits = read[0].rows[0].split is not None
    if has_splits and split != "val":
        mend = f"mark some rows as {split!r}" if len(read) == 1 else f"name a file in `annotations[{split!r}]`"
    else:
        mend = f"raise `{split}_fraction`" if split != "train" else "lower `val_fraction` and `test_fraction`"
    return f"{where}: no image is left for split {split!r} ({counts}): {mend}."


# ---- Files ----


def _bytes(path: Path) -> int | None:
    """The size of a file; None if there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _similar_file(root: Path, file: str) -> str:
    """``; there is 'x.JPG'``: what the folder has instead of a missing file."""
    path = PurePosixPath(file)
    try:
        names = [entry.name for entry in (root / path.parent).iterdir()]
    except (OSError, ValueError):
        return f"; there is no folder {root / path.parent}"
    alike = [name for name in names if name.casefold() in (path.name.casefold(), path.stem.casefold())]
    alike += [
        name for name in names if PurePosixPath(name).stem.casefold() in (path.name.casefold(), path.stem.casefold())
    ]
    alike += difflib.get_close_matches(path.name, names[:5000], n=1, cutoff=0.8)
    return f"; there is {alike[0]!r}" if alike else ""
