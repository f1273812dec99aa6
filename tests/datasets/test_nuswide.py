"""NUS-WIDE reader with synthetic photos, and at full size with the real labels."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gm_mlic.datasets import NUSWIDE
from gm_mlic.errors import ConfigError, DataError

CONCEPTS = ("airport", "bear", "sky")


def write_lists(root: Path, part: str, names: list[str], present: np.ndarray, concepts: tuple[str, ...]) -> None:
    """Write an image list and label files in NUS-WIDE's format."""
    for folder in ("ImageList", "TrainTestLabels", "ConceptsList"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "ConceptsList" / "Concepts81.txt").write_text("".join(f"{name}\n" for name in concepts))
    (root / "ImageList" / f"{part}Imagelist.txt").write_text("".join(f"{name}\r\n" for name in names))
    for c, concept in enumerate(concepts):
        column = present[:, c].astype(int).astype("U1")
        (root / "TrainTestLabels" / f"Labels_{concept}_{part}.txt").write_text("\n".join(column) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """20 training and 6 test photos in folders by their first concept."""
    rng = np.random.default_rng(0)
    for part, count in (("Train", 20), ("Test", 6)):
        names = [f"{CONCEPTS[n % 3]}\\{part[0]}{n:04d}_{n}.jpg" for n in range(count)]
        write_lists(tmp_path, part, names, rng.random((count, 3)) < 0.4, CONCEPTS)
        for n, name in enumerate(names):
            path = tmp_path / "Flickr" / name.replace("\\", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10 + n, 8)).save(path)
    return tmp_path


def test_splits_and_targets(root: Path) -> None:
    train, val, test = (NUSWIDE(root, split, val_fraction=0.25) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (15, 5, 6)
    assert not set(train.ids) & set(val.ids)
    assert test.labels == CONCEPTS
    assert test.ids[0] == "airport/T0000_0.jpg"
    column = (root / "TrainTestLabels" / "Labels_bear_Test.txt").read_text().split()
    assert test.targets[:, 1].tolist() == [int(value) for value in column]
    assert test.image(3).size == (13, 8)
    assert test.boxes(0) is None
    assert test.missing == ()


def test_labels_under_groundtruth_and_flat_photos(root: Path) -> None:
    before = NUSWIDE(root, "test")
    (root / "Groundtruth").mkdir()
    (root / "TrainTestLabels").rename(root / "Groundtruth" / "TrainTestLabels")
    (root / "images").mkdir()
    for path in (root / "Flickr").rglob("*.jpg"):
        path.rename(root / "images" / path.name)
    after = NUSWIDE(root, "test")
    assert after.fingerprint == before.fingerprint
    assert after.image(3).size == (13, 8)


def test_missing_photos_are_dropped_and_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = NUSWIDE(root, "train")
    gone = whole.ids[2]
    (root / "Flickr" / gone).unlink()
    with caplog.at_level(logging.WARNING):
        rest = NUSWIDE(root, "train")
    assert rest.missing == (gone,)
    assert rest.ids == whole.ids[:2] + whole.ids[3:]
    assert (rest.targets == np.delete(whole.targets, 2, axis=0)).all()
    assert f"1 of 18 photos are missing in {root} and are dropped: {gone}" in caplog.text
    assert NUSWIDE(root, "val").ids == tuple(i for i in NUSWIDE(root, "val").ids if i != gone)


def test_unlabeled_images(root: Path) -> None:
    everything, labeled = (NUSWIDE(root, "train", unlabeled=policy) for policy in ("keep", "drop"))
    empty = ~(everything.targets == 1).any(axis=1)
    assert empty.any()
    assert len(labeled) == len(everything) - empty.sum()
    assert (labeled.targets == 1).any(axis=1).all()
    for label in CONCEPTS:
        corrupt(root, f"TrainTestLabels/Labels_{label}_Test.txt", "0\n" * 6)
    assert len(NUSWIDE(root, "test")) == 6
    with pytest.raises(DataError, match=r"`unlabeled=\'keep\'`"):
        NUSWIDE(root, "test", unlabeled="drop")


def corrupt(root: Path, file: str, text: str) -> None:
    (root / file).write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("TrainTestLabels/Labels_sky_Test.txt", "1\n0\n", ["2 values", "TestImagelist.txt has 6 images"]),
        ("TrainTestLabels/Labels_sky_Test.txt", "1\n0\n2\n0\n0\n0\n", ["'2' (value number 2)", "expected 0 or 1"]),
        ("ImageList/TestImagelist.txt", "..\\..\\etc\\passwd\n" * 6, ["must stay inside the image folder"]),
        ("ImageList/TestImagelist.txt", "\n", ["TestImagelist.txt is empty"]),
        ("ImageList/TestImagelist.txt", "bear\\a.jpg\n" * 6, ["None of the 6 photos", "bear/a.jpg", "Flickr"]),
        ("ConceptsList/Concepts81.txt", "sky\nsky\n", ["label 'sky' occurs more than once"]),
        (
            "ConceptsList/Concepts81.txt",
            "sky\nsea\n",
            ["Labels_sea_Test.txt cannot be read (No such", "Groundtruth.zip"],
        ),
    ],
)
def test_malformed_files(root: Path, file: str, text: str, words: list[str]) -> None:
    corrupt(root, file, text)
    with pytest.raises(DataError) as error:
        NUSWIDE(root, "test")
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_lists_error_names_the_downloads(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Concepts81\.txt cannot be read.*Groundtruth\.zip.*ImageList\.zip.*Flickr/"):
        NUSWIDE(tmp_path, "train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "train, val, test"),
        ({"unlabeled": "maybe"}, "keep, drop"),
        ({"val_fraction": -0.1}, "val_fraction must be a number of at least 0 and below 1"),
        ({"split": "val", "val_fraction": 0}, "leaves no image"),
        ({"download": True}, "copy the photos, available from the authors on request, to Flickr/"),
    ],
)
def test_invalid_arguments(root: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NUSWIDE(root, **settings)


@pytest.mark.slow
@pytest.mark.shared
def test_full_size(shared_data: Path, tmp_path: Path) -> None:
    """Reads 269,648 images with their real labels, and checks the statistics in the docstring."""
    with np.load(shared_data / "labels" / "nuswide81.npz") as file:
        concepts = tuple(map(str, file["labels"]))
        present = np.unpackbits(file["rows"], axis=1)[:, : len(concepts)].astype(bool)
    parts = {"Train": slice(0, 161_789), "Test": slice(161_789, None)}
    for part, rows in parts.items():
        count = len(present[rows])
        write_lists(tmp_path, part, [f"a\\{part}{n}.jpg" for n in range(count)], present[rows], concepts)
    (tmp_path / "Flickr" / "a").mkdir(parents=True)
    for n in range(0, 107_859, 1000):  # most photos are missing
        (tmp_path / "Flickr" / "a" / f"Test{n}.jpg").touch()
    test = NUSWIDE(tmp_path, "test")
    assert (len(test), len(test.missing)) == (108, 107_859 - 108)
    assert ((test.targets == 1) == present[161_789:][::1000]).all()
    table = str(NUSWIDE.__doc__)
    for row in ("Train        161,789       81", "Test         107,859       81", f"both         {len(present):,}"):
        assert row in table
    assert f"{present.sum():,}" in table
