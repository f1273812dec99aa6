"""VOC 2007 and 2012 readers with synthetic photos, and with the full, real label matrices."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gm_mlic.datasets import VOC2007, VOC2012
from gm_mlic.datasets.voc import LABELS
from gm_mlic.errors import ConfigError, DataError, GMMLICError

OBJECT = """  <object>
    <name>{name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>{difficult}</difficult>
    <bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
  </object>
"""


def annotation(objects: list[tuple[str, int, tuple[int, ...]]], size: tuple[int, int] = (40, 30)) -> str:
    """XML annotation in VOC's format."""
    inside = "".join(OBJECT.format(name=name, difficult=difficult, box=box) for name, difficult, box in objects)
    return (
        "<annotation>\n  <folder>VOC2007</folder>\n"
        f"  <size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>\n{inside}</annotation>\n"
    )


def write_set(folder: Path, image_set: str, ids: list[str], targets: np.ndarray) -> None:
    """Write the 20 class files of an image set in VOC's format."""
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True, exist_ok=True)
    for c, label in enumerate(LABELS):
        lines = (f"{one} {value:2d}\n" for one, value in zip(ids, targets[:, c], strict=True))
        (main / f"{label}_{image_set}.txt").write_text("".join(lines))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """VOCdevkit with 20 trainval and 6 test images of 2007, and 10 train and 5 val images of 2012."""
    rng = np.random.default_rng(0)
    for year, sets in {2007: {"trainval": 20, "test": 6}, 2012: {"train": 10, "val": 5}}.items():
        folder = tmp_path / "VOCdevkit" / f"VOC{year}"
        (folder / "JPEGImages").mkdir(parents=True)
        (folder / "Annotations").mkdir()
        number = 0
        for image_set, count in sets.items():
            ids = [f"{number + n + 1:06d}" for n in range(count)]
            number += count
            write_set(folder, image_set, ids, rng.choice([1, 0, -1], (count, 20), p=[0.1, 0.05, 0.85]))
            for one in ids:
                Image.new("RGB", (40, 30), "teal").save(folder / "JPEGImages" / f"{one}.jpg")
                (folder / "Annotations" / f"{one}.xml").write_text(
                    annotation([("dog", 0, (1, 1, 40, 30)), ("tvmonitor", 1, (3, 4, 10, 12)), ("cat", 0, (5, 6, 9, 8))])
                )
    return tmp_path


def main_file(root: Path, name: str) -> Path:
    return root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main" / name


def refused(root: Path, *words: str, split: str = "test") -> None:
    with pytest.raises(DataError) as error:
        VOC2007(root, split)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_splits_and_targets(root: Path) -> None:
    train, val, test = (VOC2007(root, split, val_fraction=0.2) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (16, 4, 6)
    assert sorted(train.ids + val.ids) == [f"{n + 1:06d}" for n in range(20)]
    assert train.labels == LABELS
    assert set(np.unique(train.targets)) == {1, 0}
    text = main_file(root, "sofa_test.txt").read_text().split()
    sofa, values = LABELS.index("sofa"), text[1::2]
    assert test.targets[:, sofa].tolist() == [int(v == "1") for v in values]
    assert test.difficult is not None
    assert test.difficult[:, sofa].tolist() == [v == "0" for v in values]
    assert train.difficult is not None
    assert train.difficult.any()
    assert len(VOC2007(root, "train", val_fraction=0)) == 20
    assert VOC2007(root, "val", seed=1).ids != VOC2007(root, "val", seed=2).ids
    assert train.image(0).size == (40, 30)


def test_2012_uses_val_as_test(root: Path) -> None:
    assert len(VOC2012(root, "test")) == 5
    assert len(VOC2012(root, "train")) + len(VOC2012(root, "val")) == 10
    assert VOC2012(root, "train").fingerprint != VOC2007(root, "train").fingerprint


@pytest.mark.parametrize("inner", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_root_may_be_any_of_three_folders(root: Path, inner: str) -> None:
    assert VOC2007(root / inner, "test").ids == VOC2007(root, "test").ids


def test_boxes_are_one_based_without_difficult_objects(root: Path) -> None:
    boxes = VOC2007(root, "test").boxes(0)
    assert boxes.boxes.tolist() == [[0, 0, 40, 30], [4, 5, 9, 8]]
    assert [LABELS[label] for label in boxes.labels] == ["dog", "cat"]
    (root / "VOCdevkit/VOC2007/Annotations/000021.xml").write_text(annotation([]))
    assert VOC2007(root, "test").boxes(0).boxes.shape == (0, 4)
    assert VOC2007(root, "test").boxes(0).labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (annotation([("unicorn", 0, (1, 1, 5, 5))]), ["'unicorn'", "object number 0"]),
        (annotation([("dog", 0, (1, 1, 50, 30))]), ["outside the image of 40 x 30"]),
        (annotation([("dog", 0, (9, 1, 5, 5))]), ["has the box [9.0, 1.0, 5.0, 5.0], max < min"]),
        (annotation([("dog", 0, (1, 1, 5, 5))]).replace("<xmin>1", "<xmin>one"), ["bndbox/xmin", "'one'"]),
        (annotation([], (41, 30)), ["is 40 x 30 pixels", "has 41 x 30: correct the annotation or replace the image"]),
        ("<annotation>", ["not valid XML"]),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', ["declares XML entities"]),
        ("", ["not valid XML"]),
    ],
)
def test_malformed_annotations(root: Path, text: str, words: list[str]) -> None:
    (root / "VOCdevkit/VOC2007/Annotations/000021.xml").write_text(text)
    dataset = VOC2007(root, "test")
    with pytest.raises(DataError) as error:
        dataset.boxes(0)
    for word in ["000021.xml", *words]:
        assert word in str(error.value)
    dataset.boxes(1)


def test_missing_annotation(root: Path) -> None:
    (root / "VOCdevkit/VOC2007/Annotations/000021.xml").unlink()
    with pytest.raises(DataError, match=r"000021\.xml cannot be read"):
        VOC2007(root, "test").boxes(0)


def test_malformed_class_files(root: Path) -> None:
    cow = main_file(root, "cow_test.txt")
    whole = cow.read_text()
    cow.write_text(whole.replace("000023", "000099"))
    refused(root, "cow_test.txt", "image 000023 is only in one of them")
    cow.write_text("".join(reversed(whole.splitlines(keepends=True))))
    refused(root, "their order differs")
    cow.write_text(whole.rstrip()[:-2])
    refused(root, "cow_test.txt is truncated")
    cow.write_text(whole.replace(" -1", "  2", 1))
    refused(root, "cow_test.txt", "has value '2', expected 1, 0 or -1")
    cow.write_text("")
    refused(root, "empty")
    cow.unlink()
    refused(root, "cow_test.txt cannot be read (No such file or directory)", "`download=True`")


def test_duplicate_image(root: Path) -> None:
    for path in main_file(root, "x").parent.glob("*_test.txt"):
        path.write_text(path.read_text().replace("000022", "000021"))
    refused(root, "lists image 000021 twice")


@pytest.mark.parametrize("name", ["../../../000023", "x" * 300])
def test_photos_outside_the_folder_are_missing(root: Path, name: str) -> None:
    (root / "VOCdevkit/VOC2007/JPEGImages/000023.jpg").rename(root / "000023.jpg")
    for path in main_file(root, "x").parent.glob("*_test.txt"):
        path.write_text(path.read_text().replace("000023", name))
    refused(root, "1 of 6 images of test are missing", name)


def test_missing_photos_and_folders(root: Path) -> None:
    (root / "VOCdevkit/VOC2007/JPEGImages/000022.jpg").unlink()
    refused(root, "1 of 6 images of test are missing", "000022.jpg")
    VOC2007(root, "train")
    with pytest.raises(DataError, match=r"VOC 2007's ImageSets/Main is missing.*VOCtest_06-Nov-2007.tar unpacked"):
        VOC2007(root / "nowhere", "test")


@pytest.mark.parametrize(
    "settings", [{"split": "trainval"}, {"val_fraction": 1.0}, {"split": "val", "val_fraction": 0}]
)
def test_invalid_arguments(root: Path, settings: dict) -> None:
    with pytest.raises(ConfigError):
        VOC2007(root, **settings)


def test_unreadable_photo(root: Path) -> None:
    (root / "VOCdevkit/VOC2007/JPEGImages/000021.jpg").write_bytes(b"")
    with pytest.raises(GMMLICError, match=r"000021\.jpg is empty"):
        VOC2007(root, "test").image(0)


@pytest.mark.shared
def test_real_labels(shared_data: Path, tmp_path: Path) -> None:
    """Reads all of VOC 2007, and checks the statistics in the docstring."""
    folder = tmp_path / "VOC2007"
    (folder / "JPEGImages").mkdir(parents=True)
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 8)).save(photo)
    with np.load(shared_data / "labels" / "voc2007.npz") as file:
        assert tuple(file["labels"]) == LABELS
        sets = {name: (file[f"{name}_ids"].tolist(), file[name]) for name in ("trainval", "test")}
    for name, (ids, targets) in sets.items():
        write_set(folder, name, ids, targets)
        for one in ids:
            os.link(photo, folder / "JPEGImages" / f"{one}.jpg")
    for split, name, count in (("train", "trainval", 5011), ("test", "test", 4952)):
        dataset = VOC2007(tmp_path, split, val_fraction=0)
        ids, targets = sets[name]
        assert len(dataset) == count
        assert list(dataset.ids) == ids
        assert (dataset.targets == (targets == 1)).all()
        assert (dataset.difficult == (targets == 0)).all()
        present, difficult = (targets == 1).sum(), (targets == 0).sum()
        row = f"{name:12s} {count:,}     20        {present:,}             {present / count:.2f}          {difficult}"
        assert row in str(VOC2007.__doc__)
