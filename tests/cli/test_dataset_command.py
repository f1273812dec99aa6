"""``gm-mlic dataset``, and training on custom photos."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gm_mlic.cli.main import run

LABELS = ["cat", "dog", "red bird"]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """24 photos with a table of labels: 12 train, 6 val, 6 test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gm-mlic"])
    root = tmp_path / "photos"
    root.mkdir()
    lines = ["file,labels,split"]
    for n in range(24):
        pixels = np.random.default_rng(n).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{n:02}.jpg")
        labels = ";".join(label for c, label in enumerate(LABELS) if n % (c + 2) == 0)
        lines.append(f"{n:02}.jpg,{labels},{'train' if n < 12 else 'val' if n < 18 else 'test'}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


def custom(command: str, root: Path, *overrides: str) -> int:
    return run([command, "dataset=custom", f"dataset.root={root}", "run_dir=run", *overrides])


def statistics() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("run/statistics.json").read_text())
    return content


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("gm-mlic: error: ")
    return line


def cells(printed: str, name: str) -> list[str]:
    """Cells of the row ``name`` of a table."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines()]
    (row,) = [row for row in rows if row[0] == name]
    return row[1:]


def test_statistics_of_custom_photos(photos: Path, capsys: pytest.CaptureFixture[str]):
    assert custom("dataset", photos) == 0
    printed = capsys.readouterr().out
    assert "custom: 3 labels" in printed
    assert cells(printed, "images") == ["12", "6", "6"]
    assert cells(printed, "images without labels") == ["4", "2", "2"]  # 1, 5, 7, 11; 13, 17; 19, 23
    assert cells(printed, "unreadable images") == ["check=true"] * 3
    assert cells(printed, "dog") == ["4", "2", "2", "0.3333"]
    assert "out of vocabulary" not in printed
    assert "folder:   run" in printed
    assert "pictures: train.png, val.png, test.png" in printed
    for split in ("train", "val", "test"):
        assert Path(f"run/{split}.png").read_bytes().startswith(b"\x89PNG")
    content = statistics()
    assert content["splits"]["train"]["labels"]["cat"] == {"images": 6, "r_c": 0.5, "difficult": 0, "boxes": None}
    assert content["unreadable"] is None
    assert content["out_of_vocabulary"] is None


def test_missing_and_unreadable_images_are_listed(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "03.jpg").unlink()
    (photos / "20.jpg").write_bytes(b"")
    path = photos / "21.jpg"
    path.write_bytes(path.read_bytes()[:400])
    assert custom("dataset", photos) == 2
    assert "1 of 12 images of split 'train' are missing" in refused(capsys)
    assert custom("dataset", photos, "dataset.missing=drop", "check=true") == 0
    printed = capsys.readouterr()
    assert cells(printed.out, "missing images") == ["1", "0", "0"]
    assert cells(printed.out, "unreadable images") == ["0", "0", "2"]
    assert "train: 1 missing images:\n  03.jpg\n" in printed.out
    assert "test: 2 unreadable images:\n" in printed.out
    assert "20.jpg is empty (0 bytes)" in printed.out
    assert "1 of 12 images" in printed.err  # the warning, which all commands log
    assert set(statistics()["unreadable"]["test"]) == {"20.jpg", "21.jpg"}
    assert statistics()["splits"]["train"]["missing"] == ["03.jpg"]


def test_labels_without_a_vector_are_listed(photos: Path, capsys: pytest.CaptureFixture[str]):
    Path("words.txt").write_text("cat 1 2\nbird 3 4\n")
    glove = ["embedding=glove", "embedding.path=words.txt"]
    assert custom("dataset", photos, *glove) == 0
    assert "2 of 3 labels are out of vocabulary (words.txt):\n  dog\n  red bird\n" in capsys.readouterr().out
    assert statistics()["out_of_vocabulary"] == ["dog", "red bird"]
    assert custom("dataset", photos, "embedding=hashed") == 0
    assert "0 of 3 labels are out of vocabulary (hashed).\n" in capsys.readouterr().out
    assert custom("dataset", photos, "embedding=glove") == 2
    assert "embedding.path has no value" in refused(capsys)


def test_subset_of_splits(photos: Path, capsys: pytest.CaptureFixture[str]):
    text = (photos / "labels.csv").read_text().replace(",test", ",val")
    (photos / "labels.csv").write_text(text)
    assert custom("dataset", photos) == 2
    assert "split 'test' has no images" in refused(capsys)
    assert custom("dataset", photos, "splits=[train,val]") == 0
    assert cells(capsys.readouterr().out, "images") == ["12", "12"]
    assert custom("dataset", photos, "splits=[all]") == 2
    assert "splits=[all]: expected a non-empty list of some of train, val, test." in refused(capsys)
    assert custom("dataset", photos, "splits=[]") == 2
    assert "splits=[]: expected" in refused(capsys)


def test_statistics_of_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gm-mlic"])
    assert run(["dataset", "dataset.sizes={train: 30, val: 10, test: 10}", "run_dir=run", "check=true"]) == 0
    printed = capsys.readouterr().out
    assert cells(printed, "images") == ["30", "10", "10"]
    assert cells(printed, "unreadable images") == ["0", "0", "0"]
    assert int(cells(printed, "boxes")[0]) == sum(
        entry["boxes"] for entry in statistics()["splits"]["train"]["labels"].values()
    )


def test_training_on_custom_photos(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "05.jpg").write_bytes(b"no photo")
    small = [
        "detector=scenes_tiny", "detector.min_size=32", "detector.max_instances=3", "graph.m=3",
        "model.widths=[8,8]", "trainer.max_epochs=1", "trainer.accelerator=cpu",
    ]  # fmt: skip
    assert custom("train", photos, *small) == 0
    assert "test split of custom" in capsys.readouterr().out
    result = json.loads(Path("run/metrics.json").read_text())
    assert list(result["test"]["AP"]) == LABELS
    assert list(result["skipped"]["train"]) == ["05.jpg"]
    assert list(Path("data/instances/custom").iterdir())


def test_train_detector_on_custom_boxes(photos: Path):
    lines = [
        json.dumps({"file": f"{n:02}.jpg", "boxes": [[5, 5, 30, 30, LABELS[n % 3]]], "split": split})
        for split, first in (("train", 0), ("val", 12), ("test", 18))
        for n in range(first, first + 6)
    ]
    (photos / "labels.jsonl").write_text("\n".join(lines))
    small = ["dataset.annotations=labels.jsonl", "detector=scenes_tiny", "detector.min_size=32", "epochs=1",
             "device=cpu", "out=mine.safetensors"]  # fmt: skip
    assert custom("train-detector", photos, *small) == 0
    assert json.loads(Path("mine.json").read_text())["labels"] == LABELS


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "dataset.annotations=none.csv",
            "none.csv is not a file: dataset.annotations must be relative to dataset.root",
        ),
        (
            "dataset.annotations={train: labels.csv, dev: labels.csv}",
            "dataset.annotations={train: labels.csv, dev: labels.csv}: expected a file name, or {train: FILE",
        ),
        ("dataset.annotations={train: 3}", "expected a file name, or {train: FILE"),
        ("dataset.annotations=[labels.csv]", "expected a file name, or {train: FILE"),
        ("dataset.folders={train: 3}", "expected {train: FOLDER"),
        ("dataset.folders={train: x}", "dataset.folders needs dataset.annotations with one file per split."),
        ("dataset.labels=[cat,dogs]", "line 2: the label 'dog' is not in dataset.labels; did you mean 'dogs'?"),
        ("dataset.labels=3", "dataset.labels=3: expected a file name or a list of names, or null."),
        ("dataset.columns.file=name", "no column 'name' in its first line (file, labels, split)"),
        ("dataset.columns.labels=tags", "column 'labels' has 'cat;dog;red bird': expected 1 or 0."),
        ("dataset.columns.file=null", "dataset.columns.file is null: expected the name of a column."),
        ("dataset.column.file=name", "dataset.column: unknown setting; did you mean dataset.columns?"),
        ("dataset.separator=''", "dataset.separator=: expected a string."),
        ("dataset.test_fraction=1", "dataset.test_fraction=1: expected a number of at least 0 and below 1."),
        ("dataset.missing=skip", "dataset.missing=skip: expected one of error, drop."),
        ("dataset.ignore_columns=x", "dataset.ignore_columns=x: expected a list of column names."),
        ("check=maybe", "check=maybe: expected true or false."),
    ],
)
def test_invalid_settings(photos: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert custom("dataset", photos, override) == 2
    assert message in refused(capsys)


@pytest.mark.shared
def test_statistics_of_coco_mini(shared_data: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    table = shared_data / "glove" / "coco2014.npz"
    root = f"dataset.root={shared_data / 'coco-mini'}"
    assert run(["dataset", "dataset=coco2014", root, "embedding=glove", f"embedding.path={table}", "run_dir=run"]) == 0
    printed = capsys.readouterr().out
    assert "coco2014: 80 labels" in printed
    assert cells(printed, "images") == ["229", "26", "81"]
    assert "0 of 80 labels are out of vocabulary" in printed
