"""Custom dataset: a folder of images and an annotation file."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from annotated_types import DocInfo
from PIL import Image

from gm_mlic.datasets.annotation_files import SUFFIXES, read_annotations
from gm_mlic.datasets.annotation_rows import Annotations, TableFormat, label_mask, label_names, shown
from gm_mlic.datasets.annotation_tables import close_to, read_text
from gm_mlic.datasets.base import BoxAnnotations, MultiLabelDataset, check_targets
from gm_mlic.datasets.coco_format import clip_box
from gm_mlic.datasets.images import image_size
from gm_mlic.datasets.photo_folder import PhotoFolder, file_size, inside
from gm_mlic.datasets.splits import SPLITS, Split, stratified
from gm_mlic.errors import ArgumentError, DataError, UnreadableImage
from gm_mlic.io import few
from gm_mlic.registry import register_dataset
from gm_mlic.schema import Fraction, Seed, checked

log = logging.getLogger(__name__)


#: Largest number of characters of a label.
_MAX_LABEL = 200
#: Default names of columns.
COLUMNS: Mapping[str, str | None] = {"file": "file", "labels": "labels", "split": "split"}


@register_dataset("custom", root="data/custom")
class CustomDataset(MultiLabelDataset):
    r"""Image folder with labels from one or several annotation files.

    docs/own_photos.md describes the formats. A table (``.csv``, ``.tsv``, ``.txt``) lists the labels of an image in the
    column ``labels`` (``cat;dog`` or ``["cat", "dog"]``; empty: none), or has a column with 1 or 0 for each label::

        file,labels,split                  file,cat,dog
        a.jpg,cat;dog,train                a.jpg,1,1
        b.jpg,,test                        b.jpg,0,0

    Rows of the same image that differ only in their labels are merged, as in exports with one row per label. JSON Lines
    (``.jsonl``, ``.ndjson``) have boxes in pixels, which may replace the label list::

        {"file": "a.jpg", "labels": ["cat"], "boxes": [[10, 20, 110, 90, "cat"]], "split": "train"}

    COCO's format (``.json``) is checked as by :class:`~gm_mlic.datasets.coco.COCO2014`, but annotations may have no
    box. Polygons of YOLO become boxes.

    *File names* are relative to ``root``, or absolute and inside it. Windows separators, composed and decomposed
    characters, URL-encoding and Label Studio's upload prefix are resolved. Names that lead out of ``root`` are
    errors, and so are links of YOLO's text files that do; links of photos are followed.

    *Targets.* A label is present or absent; images without labels are kept. In the column ``labels``, ``nan``,
    ``None``, ``NULL`` and ``N/A`` are no label, unless ``labels`` lists them. With ``target_format="voc"``, tables with
    one column per label may have difficult labels: 1 present, 0 difficult, -1 absent. (Such a table without any -1 is
    refused, since every absent label would become difficult.) Labels of Pascal VOC with difficult objects only are
    difficult then, and present otherwise. In every format, ``targets`` are in {0, 1} and ``difficult`` is a mask.

    *Labels* are in the order of ``labels`` if given, else of the columns, else alphabetical. They are collected over
    all splits. Labels that differ only in case, spaces or underscores are refused.

    *Splits* are annotated (one file per split, or a column ``split`` with train, val or test, or another spelling such
    as Train, valid, dev or testing) or drawn, stratified by label (:func:`~gm_mlic.datasets.splits.stratified`):
    ``test`` is ``test_fraction`` of all images, ``val`` is ``val_fraction`` of the rest. If the annotated splits have
    no ``val``, it is drawn from ``train``. The same annotations and seed give the same splits, even if files are
    missing.

    Rows are in the order of the annotation file (COCO: sorted by image id); ``ids`` are file names relative to
    ``root``. The fingerprint covers each file's size in bytes, so that changed photos are detected again.

    Args:
        root: base folder of the file names in the annotations.
        split: ``train``, ``val`` or ``test``.
        annotations: annotation file, or one per split: {train: a.csv, val: b.csv, test: c.csv}. Relative paths start at
            root. .csv (also .tsv, .txt): a table with a header. .jsonl: one JSON object per line, with optional boxes.
            .json: COCO instances format. .yaml: YOLO's data.yaml. A folder: Pascal VOC's XML files, or YOLO's text
            files with classes.txt.
        folders: with one annotation file per split, the base folder of its file names, relative to root, e.g. {train:
            train, val: valid, test: test}; null: root.
        labels: allowed labels in output order: a list, or a text file with one label per line; other annotated labels
            are errors. null: all labels in the annotations.
        columns: names of the columns (CSV) or keys (JSON) with the file names of the images, their labels (a CSV
            without this column has one 0/1 column per label), and their split (train, val or test; without this column
            splits are sampled); null for labels or split if absent. The key ``boxes`` cannot be renamed.
        separator: separator of labels within a cell.
        suffix: suffix added to each file name, e.g. .jpg for a table of ids.
        ignore_columns: columns that are not labels, for tables with one column per label; in other tables, columns in
            which rows of the same image may differ.
        target_format: values of label columns: binary (1 present, 0 absent) or voc (1 present, 0 difficult, -1 absent).
        missing_value: empty cells and NaN in label columns: absent (the label is absent) or error (stop).
        missing: missing images: error (stop) or drop (leave them out and list them).
        val_fraction: fraction of the training images in a sampled val split, stratified by label.
        test_fraction: fraction of all images in a sampled test split, stratified by label.
        seed: seed of the sampled splits.

    Attributes:
        missing: file names of this split that were dropped.

    Raises:
        ConfigError: if an argument has an invalid value.
        DataError: if a file is missing or malformed, an image occurs twice (or in two splits), a label is not allowed,
            or the split is empty.
    """

    name = "custom"

    @checked
    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        annotations: Annotated[
            str | Path | Mapping[Split, str | Path],
            DocInfo("a file name, or {train: FILE, val: FILE, test: FILE}"),
        ] = "labels.csv",
        folders: Annotated[Mapping[Split, str], DocInfo("{train: FOLDER, val: FOLDER, test: FOLDER}")] | None = None,
        labels: Annotated[str | Path | Sequence[str], DocInfo("a file name or a list of names")] | None = None,
        columns: Mapping[str, str | None] = COLUMNS,
        separator: str = ";",
        suffix: str = "",
        ignore_columns: Annotated[Sequence[str], DocInfo("a list of column names")] = (),
        target_format: Literal["binary", "voc"] = "binary",
        missing_value: Literal["absent", "error"] = "error",
        missing: Literal["error", "drop"] = "error",
        val_fraction: Fraction = 0.1,
        test_fraction: Fraction = 0.2,
        seed: Seed = 0,
    ) -> None:
        if not separator:
            raise ArgumentError("separator", "is empty: set it to the text between the labels of one cell.")
        unknown = [key for key in columns if key not in ("file", "labels", "split")]
        if unknown:
            raise ArgumentError("columns", f"has the key {unknown[0]!r}: expected file, labels or split.")
        if columns.get("file", "") is None:
            raise ArgumentError("columns.file", "is null: expected the name of a column.")
        self.split = split
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{self.root} is not a folder: set `root` to the folder with the images.")
        allowed = None if labels is None else _allowed(self.root, labels)
        form = TableFormat(
            **columns,  # type: ignore[arg-type]
            separator=separator,
            suffix=suffix,
            ignore=tuple(ignore_columns),
            target_format=target_format,
            missing_value=missing_value,
            known=frozenset(allowed or ()),
        )

        read = _read_all(self.root, annotations, folders or {}, form)  # type: ignore[arg-type]
        rows = [row for part in read for row in part.rows]
        self.labels = _labels(read, allowed)
        targets, difficult = label_mask(rows, self.labels, "present"), label_mask(rows, self.labels, "difficult")
        if split == "train":  # the same for every split: warn once
            for part in read:
                for note in part.notes:
                    log.warning("%s", note)
            _warn(self.labels, targets, separator)
        check_targets([row.file for row in rows], self.labels, targets, difficult)
        splits = _assign([row.split for row in rows], targets, val_fraction, test_fraction, seed)
        chosen = np.flatnonzero(splits == split)
        if not chosen.size:
            raise DataError(_empty(split, splits, read, val_fraction, test_fraction))

        sizes = {int(i): file_size(self.root / rows[i].file) for i in chosen}
        absent = [rows[i].file for i, size in sizes.items() if size is None]
        if absent:
            message = f"{len(absent)} of {len(chosen)} images of split {split!r} are missing in {self.root}"
            examples = few(absent) + _similar_file(self.root, absent[0])
            if missing == "error" or len(absent) == len(chosen):
                raise DataError(f"{message} ({examples}): restore them, or drop them with `missing='drop'`.")
            log.warning("%s and are dropped: %s", message, examples)
        self.missing = tuple(absent)
        kept = [i for i, size in sizes.items() if size is not None]
        self._bytes = [sizes[i] for i in kept]
        self._rows = [rows[i] for i in kept]
        self.ids = tuple(row.file for row in self._rows)
        self.targets = targets[kept].astype(np.int8)
        self.difficult = difficult[kept] if target_format == "voc" else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the base class's fingerprint and the size of every image file in bytes."""
        return hashlib.sha256(json.dumps([super().fingerprint, self._bytes]).encode()).hexdigest()

    def image(self, i: int) -> Image.Image:
        """The photo of row ``i``; raises :class:`DataError` if its size differs from the annotated one."""
        return self._rows[i].image(self.root)

    def boxes(self, i: int) -> BoxAnnotations | None:
        """Boxes of row ``i``, clipped to the image; None if none are annotated or the image cannot be read.

        Raises:
            DataError: if a box exceeds the image border by more than two pixels.
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
            width, height = size if row.relative else (1, 1)
            boxes = tuple(((x1 * width, y1 * height, x2 * width, y2 * height), c) for (x1, y1, x2, y2), c in boxes)
            clipped = [(clip_box(box, size, f"{row.where} has the box {list(box)}"), label) for box, label in boxes]
            boxes = tuple((box, label) for box, label in clipped if box is not None)
        return BoxAnnotations.of(boxes, self.labels)


# ---- Reading ----


def _read_all(
    root: Path, annotations: str | Path | Mapping[str, str | Path], folders: Mapping[str, str], form: TableFormat
) -> list[Annotations]:
    """Read all annotation files; with one per split, set the split and folder of each row."""
    if not isinstance(annotations, Mapping):
        if folders:
            raise ArgumentError("folders", "needs `annotations` with one file per split.")
        return [read_annotations(_path(root, annotations, "annotations"), form, PhotoFolder(root))]
    if not annotations:
        raise ArgumentError("annotations", "is empty: name an annotation file.")
    for split in annotations:
        if split not in SPLITS:
            raise ArgumentError("annotations", f"has the key {split!r}: expected train, val or test.")
    for split, folder in folders.items():
        if split not in annotations:
            raise ArgumentError("folders", f"has the key {split!r}, which `annotations` lacks.")
        if folder not in ("", ".") and inside(folder) is None:
            raise ArgumentError(f"folders[{split!r}]", f"is {folder!r}: name a folder inside `root`.")
    read = []
    first: dict[str, str] = {}
    for split, path in annotations.items():
        photos = PhotoFolder(root, folders.get(split, ""))
        part = read_annotations(_path(root, path, f"annotations[{split!r}]"), form, photos)
        for row in part.rows:
            if row.file in first:
                raise DataError(
                    f"{row.where} repeats the image {row.file!r} ({first[row.file]}): an image belongs to one split."
                )
            if row.split not in (None, split):
                raise DataError(f"{row.where} has split {row.split!r}, but `annotations` lists its file as {split!r}.")
            first[row.file] = row.where
        read.append(part._replace(rows=tuple(row._replace(split=split) for row in part.rows)))
    return read


def _path(root: Path, path: str | Path, argument: str) -> Path:
    """Resolve a file argument relative to the image folder."""
    resolved = root / path
    if not resolved.is_file() and not (argument != "labels" and resolved.is_dir()):
        local = Path(path).absolute()
        hint = f"; {local} exists, so set this absolute path" if local.is_file() else ""
        others = sorted(entry.name for entry in root.iterdir() if entry.suffix.lower() in SUFFIXES)
        if others and not hint:
            hint = f"; {root} has {few(others)}"
        raise DataError(f"{resolved} is not a file: `{argument}` must be relative to `root` or absolute{hint}.")
    return resolved


# ---- Labels ----


def _allowed(root: Path, labels: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Label names from the argument ``labels``."""
    if isinstance(labels, (str, Path)):
        source = _path(root, labels, "labels")
        where, labels = str(source), list(filter(str.strip, read_text(source).splitlines()))
    else:
        where = "`labels`"
    names = label_names(labels, where)
    if not names:
        raise DataError(f"{where} is empty: list at least one label.")
    _check_spelling(dict.fromkeys(names, where))
    return names


def _labels(read: Sequence[Annotations], allowed: tuple[str, ...] | None) -> tuple[str, ...]:
    """Ordered label names of all annotation files."""
    # First occurrence of each label; declared labels (columns, categories) before labels listed in rows.
    first_at: dict[str, str] = {}
    for part in read:
        for label in part.labels or ():
            first_at.setdefault(label, str(part.source))
        for row in part.rows:
            for label in (*row.present, *row.difficult):
                first_at.setdefault(label, row.where)
    if allowed is not None:
        for label, where in first_at.items():
            if label not in allowed:
                raise DataError(f"{where}: the label {shown(label)} is not in `labels`{close_to(label, allowed)}")
        return allowed
    _check_spelling(first_at)
    declared = read[0].labels
    for part in read[1:]:
        if (part.labels is None) != (declared is None) or set(part.labels or ()) != set(declared or ()):
            mismatch = sorted(set(declared or ()) ^ set(part.labels or ()))[:1]
            example = f" (only one has {mismatch[0]!r})" if mismatch else ""
            raise DataError(
                f"{read[0].source} and {part.source} declare different labels{example}: make them equal, or list all "
                "labels in `labels`."
            )
    return declared if declared is not None else tuple(sorted(first_at))


def _check_spelling(first_at: Mapping[str, str]) -> None:
    """Refuse blank, padded, unprintable and near-duplicate labels; ``first_at`` maps labels to locations."""
    first: dict[str, str] = {}
    for label, where in first_at.items():
        if not label.strip() or label != label.strip():
            raise DataError(f"{where}: the label {shown(label)} is blank or has surrounding spaces: remove the spaces.")
        if len(label) > _MAX_LABEL:
            raise DataError(
                f"{where}: the label {shown(label)} has {len(label)} characters: if these are several labels, set "
                "`separator`."
            )
        if not label.isprintable():
            raise DataError(f"{where}: the label {label!r} has an unprintable character: remove it.")
        key = " ".join(unicodedata.normalize("NFKC", label).casefold().replace("_", " ").split())
        if key in first:
            other = first[key]
            raise DataError(
                f"{where}: the labels {label!r} and {other!r} ({first_at[other]}) differ only in case, spaces or "
                "underscores: unify or rename them."
            )
        first[key] = label


def _warn(labels: Sequence[str], targets: np.ndarray, separator: str) -> None:
    """Warn about unused labels and probable separators inside labels."""
    never = [label for c, label in enumerate(labels) if not targets[:, c].any()]
    if never:
        occur = "1 label occurs" if len(never) == 1 else f"{len(never)} labels occur"
        log.warning("%s in no image: %s", occur, few(never, 10))
    joined = [label for label in labels if any(mark in label for mark in ";|,\t" if mark != separator)]
    if joined:
        log.warning(
            "%r is read as one label; if these are several labels, change the separator (now %r)",
            joined[0],
            separator,
        )


# ---- Splits ----


def _assign(
    annotated: Sequence[str | None], targets: np.ndarray, val_fraction: float, test_fraction: float, seed: int
) -> np.ndarray:
    """(N,) split of each row: annotated or drawn."""
    splits = np.array([split or "train" for split in annotated])
    drawn = {"test": test_fraction} if annotated[0] is None else {}
    if "val" not in annotated:
        drawn["val"] = val_fraction
    for split, fraction in drawn.items():
        rows = np.flatnonzero(splits == "train")
        if fraction and rows.size:
            splits[rows[stratified(targets[rows], fraction, seed)]] = split
    return splits


def _empty(
    split: str, splits: np.ndarray, read: Sequence[Annotations], val_fraction: float, test_fraction: float
) -> str:
    counts = ", ".join(f"{name} {int((splits == name).sum())}" for name in SPLITS)
    where = " and ".join(str(part.source) for part in read)
    has_splits = read[0].rows[0].split is not None
    if has_splits and split != "val":
        remedy = f"mark some rows as {split!r}" if len(read) == 1 else f"set a file in `annotations[{split!r}]`"
    else:
        remedy = f"raise `{split}_fraction`" if split != "train" else "lower `val_fraction` and `test_fraction`"
    return f"{where}: split {split!r} has no images ({counts}): {remedy}."


# ---- Files ----


def _similar_file(root: Path, file: str) -> str:
    """Hint ``; similar: 'x.JPG'`` for a missing file."""
    path = PurePosixPath(file)
    try:
        names = [entry.name for entry in (root / path.parent).iterdir()]
    except (OSError, ValueError):
        return f"; the folder {root / path.parent} does not exist"
    wanted = {path.name.casefold(), path.stem.casefold()}
    similar = [name for name in names if wanted & {name.casefold(), PurePosixPath(name).stem.casefold()}]
    similar += difflib.get_close_matches(path.name, names[:5000], n=1, cutoff=0.8)
    return f"; similar: {similar[0]!r}" if similar else ""
