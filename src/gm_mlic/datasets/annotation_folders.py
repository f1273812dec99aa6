"""Annotations with one file per image: YOLO's text files and Pascal VOC's XML files."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import yaml

from gm_mlic.datasets.annotation_rows import Box, ImageRow, Source, label_names, shown, split_called
from gm_mlic.datasets.annotation_tables import read_text
from gm_mlic.datasets.base import read_bytes
from gm_mlic.datasets.coco_format import clip_box
from gm_mlic.datasets.images import IMAGE_SUFFIXES
from gm_mlic.datasets.photo_folder import inside
from gm_mlic.errors import DataError
from gm_mlic.io import first_line

#: Overhang of a box over the image border that is rounding, as a fraction of the image.
_ROUNDING = 0.01
#: Files with one class name per line, in the order of preference.
_CLASS_FILES = ("classes.txt", "obj.names")
_LAST_IMAGES = re.compile(r"^(.*/)?images/", re.DOTALL)


def read_folder(source: Source) -> tuple[tuple[str, ...] | None, list[ImageRow]]:
    """Read a folder of Pascal VOC's XML files, or of YOLO's text files with a file ``classes.txt``."""
    files = sorted(path for path in source.path.rglob("[!.]*") if path.suffix.lower() == ".xml" and path.is_file())
    if files:
        return None, _read_voc(source, files)
    for folder in (source.path, source.path.parent):
        for name in _CLASS_FILES:
            if (folder / name).is_file():
                return _read_yolo_folder(source, folder / name)
        if (folder / "data.yaml").is_file():
            file = (folder / "data.yaml").absolute()
            raise DataError(f"{source.path} is a folder of YOLO labels: set `annotations='{file}'`.")
    raise DataError(
        f"{source.path} is a folder without annotations: expected .xml files (Pascal VOC), or .txt files and "
        "classes.txt (YOLO)."
    )


# ---- YOLO ----


def read_yolo(source: Source) -> tuple[tuple[str, ...], list[ImageRow]]:
    """Read YOLO's ``data.yaml``, its images and their text files."""
    try:
        content = yaml.safe_load(read_text(source.path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{source.path} is not valid YAML ({first_line(error)}): correct the file.") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(f"{source.path} has names with the keys {shown(list(names))}: expected 0, 1, 2 and so on.")
        names = [names[n] for n in range(len(names))]
    if not isinstance(content, dict) or not isinstance(names, list) or not names:
        raise DataError(f"{source.path} has no list 'names': expected YOLO's data.yaml with names, train and val.")
    labels = label_names(names, str(source.path))
    splits = {split: places for key, places in content.items() if (split := split_called(key)) and places}
    if not splits:
        raise DataError(f"{source.path} has none of the keys train, val and test: add the folders of the images.")
    images = [
        (image, split if len(splits) > 1 else None)
        for split, places in splits.items()
        for place in (places if isinstance(places, list) else [places])
        for image in _yolo_images(source, content.get("path"), place, split)
    ]
    return labels, _yolo_rows(source, images, labels, bool(content.get("kpt_shape")))


def _read_yolo_folder(source: Source, classes: Path) -> tuple[tuple[str, ...], list[ImageRow]]:
    """Rows of a folder ``labels`` beside ``images``, or of text files beside the images, without ``data.yaml``.

    Folders in it that are called as splits, such as ``images/train``, are the splits.
    """
    labels = label_names(filter(str.strip, read_text(classes).splitlines()), str(classes))
    for folder in (source.path.parent / "images", source.path):
        below = _below_root(source, folder)
        images = [] if below is None else [path for path in source.folder.files(below) if _is_photo(path)]
        if below is not None and images:
            splits = [split_called(path.relative_to(below).parts[0]) for path in images]
            named = [(image, None if None in splits else split) for image, split in zip(images, splits, strict=True)]
            return labels, _yolo_rows(source, named, labels, False)
    raise DataError(f"{source.path} has no images: expected them in {source.path.parent / 'images'}.")


def _below_root(source: Source, path: Path) -> PurePosixPath | None:
    """A path relative to the dataset's root; None if it does not exist or is outside."""
    root = source.folder.root
    plain = Path(os.path.normpath(path.absolute()))  # a link in the root may lead to another disk
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # names that no file can have, and links in a circle
        for found, start in ((plain, root.absolute()), (path.resolve(), root.resolve())):
            if found.exists() and found.is_relative_to(start):
                return PurePosixPath(found.relative_to(start).as_posix())
    return None


def _is_photo(path: PurePath) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _yolo_images(source: Source, path: Any, place: Any, split: str) -> Iterator[PurePosixPath]:
    """Images of a folder, or of a text file that lists them; paths are relative to the dataset's root.

    The folder is relative to the key ``path``, or to data.yaml. Files of some tools have a wrong ``..`` in front.
    """
    where = f"{source.path}: {split}"
    if not isinstance(place, str) or not isinstance(path, str | None):
        raise DataError(f"{where} is {shown(place)}: expected the folder of the images.")
    home, plain = source.path.parent, place.replace("\\", "/")
    candidates = (home / (path or "") / plain, home / plain, home / plain.removeprefix("../"))
    for found in (*candidates, source.folder.root / plain):
        below = _below_root(source, found)
        if below is not None and found.is_dir():
            images = [file for file in source.folder.files(below) if _is_photo(file)]
            if not images:
                raise DataError(f"{where}: the folder {found} has no images: copy them into it.")
            yield from images
            return
        if below is not None and found.suffix == ".txt":
            for number, line in enumerate(read_text(found).splitlines(), start=1):
                if line.strip():
                    yield _listed_image(source, below.parent, line.strip(), f"{found}: line {number}")
            return
    raise DataError(f"{where} is {shown(place)}, which is no folder in {source.folder.root}: correct the path.")


def _listed_image(source: Source, folder: PurePosixPath, name: str, where: str) -> PurePosixPath:
    """Path of an image in a list, relative to the root; the name is relative to the list, to the root, or absolute."""
    relative = inside(name)
    if relative is not None:
        for start in (folder, PurePosixPath()):
            if (found := source.folder.find(start / relative)) is not None:
                return found
    return PurePosixPath(source.file(name, where))


def _yolo_rows(
    source: Source, images: list[tuple[PurePosixPath, str | None]], labels: tuple[str, ...], keypoints: bool
) -> list[ImageRow]:
    """A row per image. An image without a text file has no labels."""
    rows = []
    for image, split in images:
        name = PurePosixPath(_LAST_IMAGES.sub(r"\1labels/", str(image))).with_suffix(".txt")
        found = source.folder.find(name)
        file = source.folder.root / (found or name)
        boxes: dict[tuple[Box, str], None] = {}
        if not file.resolve().is_relative_to(source.folder.root.resolve()):
            raise DataError(f"{file} is a link to a place outside {source.folder.root}: copy it into this folder.")
        if found is not None:
            for number, line in enumerate(read_text(file).splitlines(), start=1):
                if line.strip():
                    label, box = _yolo_box(line.split(), labels, keypoints, f"{file}: line {number}")
                    boxes[box, label] = None
        else:
            source.note(
                "{count} images have no text file and are read as images without labels, such as {example}", file.name
            )
        present = tuple(dict.fromkeys(label for _, label in boxes))
        rows.append(ImageRow(str(image), str(file), split, present, boxes=tuple(boxes), relative=True))
    if rows and not any(Path(row.where).is_file() for row in rows):
        raise DataError(f"{source.path}: no image has a file with its labels: expected {rows[0].where}.")
    return rows


def _yolo_box(words: list[str], labels: tuple[str, ...], keypoints: bool, where: str) -> tuple[str, Box]:
    """Label and box (x1, y1, x2, y2) of one line: a class and center, width and height, or a class and a polygon."""
    try:
        number, values = float(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise DataError(f"{where} is {shown(' '.join(words))}: expected a class number and four numbers.") from None
    if number not in range(len(labels)):
        raise DataError(f"{where} has the class {shown(words[0])}: the classes are 0 to {len(labels) - 1}.")
    if keypoints:
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise DataError(
            f"{where} has {len(values)} numbers after the class: expected four (center, width, height), or the x and y "
            "of three or more corners."
        )
    if not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in values):
        raise DataError(
            f"{where} is {shown(' '.join(words))}: expected fractions of the image's width and height between 0 and 1, "
            "not pixels."
        )
    if len(values) == 4:
        x, y, width, height = values
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    else:
        box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in box)
    return labels[int(number)], (x1, y1, x2, y2)


# ---- Pascal VOC ----


def _read_voc(source: Source, files: list[Path]) -> list[ImageRow]:
    """A row per XML file. The lists of ``ImageSets/Main``, if any, are the splits."""
    splits = _image_sets(source.path.parent / "ImageSets" / "Main")
    find = _photo_of(source)
    rows = []
    for file in files:
        if splits and file.stem not in splits:
            source.note(
                "{count} images are in no list of ImageSets/Main and are left out, such as {example}", file.stem
            )
        else:
            rows.append(_voc_row(source, file, splits.get(file.stem), find))
    return rows


def _image_sets(folder: Path) -> dict[str, str]:
    """Split of each image in train.txt (or trainval.txt), val.txt and test.txt; empty without these files."""
    splits: dict[str, str] = {}
    train = "train" if (folder / "train.txt").is_file() else "trainval"
    for name, split in ((train, "train"), ("val", "val"), ("test", "test")):
        source = folder / f"{name}.txt"
        if not source.is_file() or (train == "trainval" and name == "val"):
            continue
        for line in filter(str.strip, read_text(source).splitlines()):
            image = line.split()[0] if re.fullmatch(r"\S+\s+(0|-?1)", line.strip()) else line.strip()
            if splits.setdefault(image, split) != split:
                raise DataError(
                    f"{source} lists the image {shown(image)}, which is also in {splits[image]}: an image belongs to "
                    "one split."
                )
    return splits


def _photo_of(source: Source) -> Callable[[Path, str], str]:
    """Function of an XML file and its ``filename``: the path of the photo.

    Photos are in a folder ``JPEGImages`` or ``images`` beside the folder of the XML files, beside the XML file, or in
    the root. They have the name of the XML file, or else ``filename``.
    """

    @functools.cache
    def photos(folder: PurePosixPath) -> dict[str, list[str]]:
        """File names by their part before the suffix."""
        names: dict[str, list[str]] = {}
        for path in filter(_is_photo, sorted((source.folder.root / folder).iterdir())):
            names.setdefault(path.stem, []).append(path.name)
        return names

    def find(file: Path, filename: str) -> str:
        name = (inside(filename.rpartition("/")[2]) or PurePosixPath(file.stem)).name
        near = source.path.parent
        places = [near / "JPEGImages", near / "images", file.parent, source.folder.root]
        folders = [folder for place in places if place.is_dir() and (folder := _below_root(source, place)) is not None]
        for folder in folders:
            found = photos(folder).get(file.stem) or photos(folder).get(PurePosixPath(name).stem) or []
            if found:
                return str(folder / (name if name in found else found[0]))
        return str(folders[0] / name)

    return find


def _voc_row(source: Source, file: Path, split: str | None, find: Callable[[Path, str], str]) -> ImageRow:
    where = str(file)
    root = parse_xml(file, "correct or remove it")
    if root.tag != "annotation":
        raise DataError(f"{where} has the element {shown(root.tag)}: expected Pascal VOC's <annotation>.")
    width, height = (xml_number(root, f"size/{side}", where, "0") for side in ("width", "height"))
    size = (int(width), int(height)) if min(width, height) >= 1 else None
    present: dict[str, bool] = {}
    boxes = []
    for place, label, is_difficult, box in voc_objects(root, where, size):
        if not label:
            raise DataError(f"{place} has no name: add the label.")
        difficult = is_difficult and source.form.target_format == "voc"
        present[label] = present.get(label, False) or not difficult
        if box is not None and not difficult:
            boxes.append((box, label))
    photo = find(file, (root.findtext("filename") or "").strip().replace("\\", "/"))
    return ImageRow(
        photo,
        where,
        split,
        tuple(label for label, certain in present.items() if certain),
        tuple(label for label, certain in present.items() if not certain),
        boxes=tuple(boxes),
        size=size,
        other={"file": where},
    )


class _NoDoctype(ElementTree.TreeBuilder):
    """Builder that stops at a document type, before its entities are expanded."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares XML entities or a document type")


def parse_xml(source: Path, remedy: str) -> ElementTree.Element:
    """Parse an XML file, which may declare neither a document type nor entities; ``remedy`` ends messages."""
    content = read_bytes(source, remedy)
    try:
        parser = ElementTree.XMLParser(target=_NoDoctype())
        parser.feed(content)
        root: ElementTree.Element = parser.close()
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise DataError(f"{source} is not valid XML ({first_line(error)}): {remedy}.") from error
    return root


def xml_number(element: ElementTree.Element, path: str, where: str, default: str = "") -> float:
    """Finite number at a path below an element; ``where`` starts messages."""
    text = element.findtext(path) or default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: {path} is {shown(text)}: expected a number.")
    return value


def voc_objects(
    root: ElementTree.Element, where: str, size: tuple[int, int] | None, *, boxed: bool = False
) -> Iterator[tuple[str, str, bool, Box | None]]:
    """Objects of a Pascal VOC file: the start of messages, the name, whether it is difficult, and its box.

    VOC counts pixels from 1 and includes the last one, so x1 = xmin - 1 and x2 = xmax. If ``size`` (width, height) is
    given, boxes are clipped to it, and those without area are None. With ``boxed``, each object must have a box.
    """
    for number, item in enumerate(root.iter("object")):
        place, box = f"{where}: object number {number}", None
        if boxed or item.find("bndbox") is not None:
            corners = [xml_number(item, f"bndbox/{key}", place) for key in ("xmin", "ymin", "xmax", "ymax")]
            if corners[2] < corners[0] or corners[3] < corners[1]:
                raise DataError(f"{place} has the box {shown(corners)}, max < min: correct the file.")
            box = (corners[0] - 1, corners[1] - 1, corners[2], corners[3])
            box = box if size is None else clip_box(box, size, f"{place} has the box {shown(corners)}")
        difficult = (item.findtext("difficult") or "0").strip() == "1"
        yield place, (item.findtext("name") or "").strip(), difficult, box
