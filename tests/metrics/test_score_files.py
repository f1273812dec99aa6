from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlic.errors import ConfigError, DataError
from gm_mlic.metrics import read_scored_images, write_scored_images

LABELS = ("cat", "red bird", "dog, small")
IDS = ("a.jpg", "b.jpg", "007", "d")
SCORES = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4], [0.25, 1.0, 0.0], [0.7, 0.6, 0.125]])
VOC = np.array([[1, -1, 0], [-1, 1, -1], [1, 1, -1], [-1, -1, 1]])
TARGETS, DIFFICULT = (VOC == 1).astype(int), VOC == 0


def write_csv(path: Path, values: np.ndarray, ids: Any = IDS, labels: Any = LABELS, id_header: str = "id") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(labels if ids is None else [id_header, *labels])
        for i, row in enumerate(values.tolist()):
            writer.writerow(row if ids is None else [ids[i], *row])
    return path


def write_npz(path: Path, **entries: Any) -> Path:
    np.savez(path, **{name: np.array(value) for name, value in entries.items() if value is not None})
    return path


def write_pt(path: Path, **entries: Any) -> Path:
    torch.save({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in entries.items()}, path)
    return path


WRITERS: dict[str, Callable[[Path, str, np.ndarray], Path]] = {
    ".csv": lambda folder, key, values: write_csv(folder / f"{key}.csv", values),
    ".npz": lambda folder, key, values: write_npz(folder / f"{key}.npz", **{key: values}, ids=IDS, labels=LABELS),
    ".pt": lambda folder, key, values: write_pt(
        folder / f"{key}.pt", **{key: values}, ids=list(IDS), labels=list(LABELS)
    ),
}


@pytest.mark.parametrize("of_scores", WRITERS)
@pytest.mark.parametrize("of_targets", WRITERS)
def test_all_formats_are_equivalent(tmp_path: Path, of_scores: str, of_targets: str) -> None:
    scores = [WRITERS[of_scores](tmp_path, "scores", SCORES)]
    for form, written in (("binary", TARGETS), ("voc", VOC)):
        images = read_scored_images(scores, WRITERS[of_targets](tmp_path, "targets", written), form)  # type: ignore[arg-type]
        np.testing.assert_array_equal(images.scores[0], SCORES)
        np.testing.assert_array_equal(images.targets, TARGETS)
        assert (images.difficult is None) == (form == "binary")
        assert (images.ids, images.labels, images.target_format) == (IDS, LABELS, form)
    np.testing.assert_array_equal(images.difficult, DIFFICULT)


def test_write_and_read(tmp_path: Path) -> None:
    path = tmp_path / "test.npz"
    scores = torch.from_numpy(SCORES).float()
    for difficult in (None, torch.from_numpy(DIFFICULT)):
        write_scored_images(path, scores, torch.from_numpy(TARGETS), IDS, LABELS, difficult)
        images = read_scored_images([path], path)
        assert torch.equal(images.scores[0], scores)
        assert images.scores[0].dtype == torch.float32
        np.testing.assert_array_equal(images.targets, TARGETS)
        assert (images.ids, images.labels) == (IDS, LABELS)
        assert (images.difficult is None) == (difficult is None)
    assert images.difficult is not None
    np.testing.assert_array_equal(images.difficult, DIFFICULT)
    with pytest.raises(DataError, match="targets contain -1"):
        write_scored_images(path, scores, torch.from_numpy(VOC), IDS, LABELS)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(4)), other=st.permutations(range(4)))
def test_rows_are_matched_by_id(tmp_path_factory: pytest.TempPathFactory, order: list[int], other: list[int]) -> None:
    folder = tmp_path_factory.mktemp("files")
    ids = np.array(IDS)
    scores = write_csv(folder / "scores.csv", SCORES[order], ids[order])
    theirs = write_npz(folder / "other.npz", scores=1 - SCORES[other], ids=ids[other])
    images = read_scored_images([scores, theirs], write_npz(folder / "targets.npz", targets=TARGETS, ids=ids))
    np.testing.assert_array_equal(images.scores[0], SCORES)
    np.testing.assert_array_equal(images.scores[1], 1 - SCORES)
    assert images.ids == IDS


def test_numeric_ids_match_as_strings(tmp_path: Path) -> None:
    scores = write_npz(tmp_path / "s.npz", scores=SCORES, ids=[10, 20, 30, 40])
    targets = write_csv(tmp_path / "t.csv", TARGETS[::-1], ["40", "30", "20", "10"])
    images = read_scored_images([scores], targets)
    np.testing.assert_array_equal(images.scores[0], SCORES[::-1])
    assert images.ids == ("40", "30", "20", "10")


def test_files_without_ids_are_matched_by_row(tmp_path: Path) -> None:
    images = read_scored_images(
        [write_npz(tmp_path / "s.npz", scores=SCORES)], write_csv(tmp_path / "t.csv", TARGETS, None)
    )
    assert (images.ids, images.labels) == (None, LABELS)
    np.testing.assert_array_equal(images.targets, TARGETS)


@pytest.mark.parametrize("header", ["", "id", "Image_ID", "file_name", "photo"])
def test_id_column_of_csv(tmp_path: Path, header: str) -> None:
    """Detected by its header, or (photo) because no cell is a number."""
    ids = ["x", "y", "z", "w"] if header == "photo" else ["1", "2", "3", "4"]
    targets = write_npz(tmp_path / "t.npz", targets=TARGETS)
    images = read_scored_images([write_csv(tmp_path / "s.csv", SCORES, ids, id_header=header)], targets)
    assert images.ids == tuple(ids)
    assert images.labels == LABELS


def test_target_formats(tmp_path: Path) -> None:
    scores = write_npz(tmp_path / "s.npz", scores=SCORES)
    binary = write_npz(tmp_path / "b.npz", targets=TARGETS.astype(np.float32))
    voc = write_npz(tmp_path / "v.npz", targets=VOC)
    masked = write_pt(tmp_path / "c.pt", targets=TARGETS == 1, difficult=DIFFICULT)
    for path, form in ((binary, "binary"), (voc, "voc"), (masked, "binary")):
        images = read_scored_images([scores], path, form)  # type: ignore[arg-type]
        assert images.target_format == form
        assert images.targets.dtype == torch.bool
        np.testing.assert_array_equal(images.targets, TARGETS)
        assert images.difficult is None or np.array_equal(images.difficult, DIFFICULT)
        assert (images.difficult is None) == (path == binary)
    with pytest.raises(DataError, match=r"v\.npz: targets contain -1: pass target_format='voc'"):
        read_scored_images([scores], voc)
    with pytest.raises(DataError, match=r"b\.npz: targets contain no -1.*target_format='binary'"):
        read_scored_images([scores], binary, "voc")
    allowed = read_scored_images([scores], binary, "voc", allow_all_present=True)
    np.testing.assert_array_equal(allowed.difficult, TARGETS == 0)
    with pytest.raises(DataError, match=r"c\.pt: difficult requires target_format='binary'"):
        read_scored_images([scores], masked, "voc")
    for wrong in (DIFFICULT * 2, DIFFICULT[:2], DIFFICULT[0]):
        with pytest.raises(DataError, match=r"w\.npz: difficult must be"):
            read_scored_images([scores], write_npz(tmp_path / "w.npz", targets=TARGETS, difficult=wrong))
    with pytest.raises(ConfigError, match="target_format"):
        read_scored_images([scores], voc, "pm1")  # type: ignore[arg-type]


def corrupt(values: np.ndarray, value: float) -> np.ndarray:
    values = values.astype(float)
    values[2, 1] = value
    return values


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        ({"scores": corrupt(SCORES, np.nan)}, {}, r"s\.npz: scores contain NaN \(first at row 2, label 1\)"),
        ({"scores": corrupt(SCORES, 1.5)}, {}, r"s\.npz: scores are in \[0, 1\.5\], expected \[0, 1\]"),
        ({"scores": corrupt(SCORES, -0.5)}, {}, r"s\.npz: scores are in \[-0\.5"),
        ({"scores": (SCORES > 0.5).astype(int)}, {}, r"s\.npz: scores are torch\.int64"),
        ({"scores": SCORES[:3], "ids": None}, {}, r"s\.npz: scores \(3, 3\) and targets \(4, 3\) .*differ in shape"),
        ({"scores": SCORES[:, :2], "labels": None}, {}, r"differ in shape"),
        ({"scores": SCORES[0], "ids": None, "labels": None}, {}, r"s\.npz: scores have shape \(3,\)"),
        ({"scores": SCORES[:0], "ids": None}, {}, r"s\.npz: scores have shape \(0, 3\)"),
        ({"scores": SCORES[:, :0], "labels": None}, {}, r"s\.npz: scores have shape \(4, 0\)"),
        ({"scores": SCORES.astype(str)}, {}, r"s\.npz: .*numbers"),
        ({"scores": SCORES.astype(complex)}, {}, r"s\.npz: .*numbers"),
        ({}, {"targets": corrupt(TARGETS, 2)}, r"t\.npz: targets contain 2"),
        ({}, {"targets": corrupt(TARGETS, 0.5)}, r"t\.npz: targets contain 0\.5"),
        ({}, {"targets": corrupt(TARGETS, np.nan)}, r"t\.npz: targets contain nan"),
        ({"ids": ["a", "b", "a", "d"]}, {}, r"s\.npz: the image id 'a' occurs more than once"),
        ({}, {"ids": ["a", "b", "b", "d"]}, r"t\.npz: the image id 'b' occurs more than once"),
        ({"ids": IDS[:3]}, {}, r"s\.npz: 3 image ids for scores of shape \(4, 3\)"),
        ({"ids": [1.5, 2.5, 3.5, 4.5]}, {}, r"s\.npz: ids must be"),
        ({"ids": ["a.jpg", "b.jpg", "7", "d"]}, {}, r"s\.npz: no scores for 1 of the 4 images .*t\.npz, such as '007'"),
        ({"labels": ["cat", "cat", "dog"]}, {}, r"s\.npz: the label 'cat' occurs more than once"),
        ({"labels": LABELS[::-1]}, {}, r"s\.npz: the order of the labels differs from .*\(label 0 is 'dog"),
        ({"labels": ["cat", "bird", "dog"]}, {}, r"s\.npz: the labels differ from .*label 1 is 'bird'"),
        ({"labels": LABELS[:2], "scores": SCORES[:, :2]}, {"labels": None}, "differ in shape"),
    ],
)  # fmt: skip
def test_invalid_tables_are_refused(tmp_path: Path, scores: dict, targets: dict, message: str) -> None:
    names = {"ids": IDS, "labels": LABELS}
    file = write_npz(tmp_path / "s.npz", **{"scores": SCORES, **names, **scores})
    truth = write_npz(tmp_path / "t.npz", **{"targets": TARGETS, **names, **targets})
    with pytest.raises(DataError, match=message) as caught:
        read_scored_images([file], truth)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no header"),
        ("0.5,0.2\n0.1,0.2\n", "no header"),
        ("id,cat,dog\na,0.1,0.2\nb,0.3\n", "line 3 has 2 cells, the header 3"),
        ("id,cat,dog\na,0.1,high\n", r"not 'high' \(line 2, column 'dog'\)"),
        ("id,cat,dog\na,0.1,\n", r"not '' \(line 2, column 'dog'\)"),
        ("cat,dog\n0.5,0.1\nx,0.2\n", r"not 'x' \(image 1, column 'cat'\).*named id"),
        ("id,cat\na,0.5\na,0.6\n", "image id 'a' occurs more than once"),
        ("id,cat\n", r"shape \(0, 1\)"),
    ],
)
def test_invalid_csv_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_scored_images([path], write_npz(tmp_path / "t.npz", targets=TARGETS))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("evil"),)


def test_other_file_contents_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    truth = write_npz(tmp_path / "t.npz", targets=TARGETS)
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 half a zip")
    (tmp_path / "b.npz").write_bytes(b"")
    np.savez(tmp_path / "c.npz", scores=np.array([Evil()], dtype=object))
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as file:
        file.writestr("scores.npy", b"no array")
    (tmp_path / "a.pt").write_bytes(b"no pickle")
    torch.save({"scores": Evil()}, tmp_path / "b.pt")
    torch.save([1, 2], tmp_path / "c.pt")
    torch.save({"scores": "high"}, tmp_path / "d.pt")
    torch.save({"logits": torch.ones(2, 2)}, tmp_path / "e.pt")
    (tmp_path / "a.csv").write_bytes(b"id,cat\n\xff\xfe,0.5\n")
    (tmp_path / "a.txt").write_text("id,cat\n")
    names = [
        "a.npz",
        "b.npz",
        "c.npz",
        "d.npz",
        "a.pt",
        "b.pt",
        "c.pt",
        "d.pt",
        "e.pt",
        "a.csv",
        "a.txt",
        "nowhere.npz",
    ]
    for name in names:
        with pytest.raises(DataError, match=name) as caught:
            read_scored_images([name], truth)
        assert "\n" not in str(caught.value), name
    assert not Path("evil").exists()
    with pytest.raises(DataError, match=r"t\.npz: has no 'scores' \(only 'targets'"):
        read_scored_images([truth], truth)
