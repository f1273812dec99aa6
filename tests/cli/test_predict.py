from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from gm_mlic import Scenes
from gm_mlic.cli import predict
from gm_mlic.cli.main import run
from gm_mlic.cli.predict import COLUMNS, find_photos
from gm_mlic.errors import DataError


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four scenes, one of them in a subfolder, a text file, and a damaged image."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    scenes = Scenes("test", size=4, image_size=96)
    for i, name in enumerate(["a.png", "b, c.png", "more/d.JPG", "[e].png"]):
        scenes.image(i).save(folder / name, "JPEG" if name.endswith("JPG") else "PNG")
    (folder / "notes.txt").write_text("x")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8nothing")
    return folder


def test_predict_a_folder(checkpoint: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["predict", f"checkpoint={checkpoint}", "images=photos", "pictures=true", "top=4", "batch_size=2"]) == 0
    out, err = capsys.readouterr()
    assert "4 of 5 photos; folder: runs/predictions (predictions.jsonl, predictions.csv, pictures/)" in out
    assert "left out: Image photos/torn.jpg" in err
    folder = Path("runs/predictions")
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    names = ["[e].png", "a.png", "b, c.png", "more/d.JPG"]
    assert [line["image"] for line in lines] == [f"photos/{name}" for name in names]
    for line in lines:
        assert (line["width"], line["height"]) == (96, 96)
        probabilities = [label["probability"] for label in line["labels"]]
        assert len(probabilities) >= 4
        assert probabilities == sorted(probabilities, reverse=True)
        assert line["predicted"] == [label["label"] for label in line["labels"] if label["probability"] >= 0.5]
        for label in line["labels"]:
            x1, y1, x2, y2 = label["box"]
            assert 0 <= x1 < x2 <= 96
            assert 0 <= y1 < y2 <= 96
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["image"], row["label"]) for row in rows] == [
        (line["image"], label["label"]) for line in lines for label in line["labels"]
    ]
    pictures = sorted((folder / "pictures").iterdir())
    assert [line["picture"] for line in lines] == [f"pictures/{picture.name}" for picture in pictures]
    assert len(pictures) == 4
    with Image.open(pictures[0]) as picture:
        assert picture.width == 640


def test_pictures_of_earlier_predictions_are_removed(checkpoint: Path, photos: Path):
    command = ["predict", f"checkpoint={checkpoint}", "run_dir=out"]
    assert run([*command, "images=photos", "pictures=true"]) == 0
    assert len(list(Path("out/pictures").iterdir())) == 4
    other_files = [Path("out/pictures/mine.jpg"), Path("out/00000-mine.jpg"), Path("out/pictures/00009-b.png")]
    for path in other_files:
        path.write_text("x")
    with Path("out/predictions.jsonl").open("a") as file:  # untrusted entries
        for line in ({"picture": str(path.relative_to("out"))} for path in other_files):
            file.write(json.dumps(line) + "\n")
        file.write('{"picture": "pictures/../00000-mine.jpg"}\n{"picture": 5}\n[]\n{"pict')
    assert run([*command, "images=photos/a.png", "pictures=true"]) == 0
    assert {path.name for path in Path("out/pictures").iterdir()} == {"00000-a.jpg", "mine.jpg", "00009-b.png"}
    assert run([*command, "images=photos/a.png"]) == 0
    assert {path.name for path in Path("out/pictures").iterdir()} == {"mine.jpg", "00009-b.png"}
    assert all(path.exists() for path in other_files)
    (line,) = Path("out/predictions.jsonl").read_text().splitlines()
    assert "picture" not in json.loads(line)


def test_improbable_labels_are_not_drawn(checkpoint: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[float] = []
    draw = predict.annotated
    monkeypatch.setattr(
        predict, "annotated", lambda image, labels: (drawn.extend(p for _, p, _ in labels), draw(image, labels))[1]
    )
    command = ["predict", f"checkpoint={checkpoint}", "images=photos/a.png", "pictures=true", "top=22"]
    assert run([*command, "threshold=0"]) == 0
    (line,) = (json.loads(text) for text in Path("runs/predictions/predictions.jsonl").read_text().splitlines())
    written = [label["probability"] for label in line["labels"]]
    assert drawn == pytest.approx(written, abs=1e-6)
    drawn.clear()
    monkeypatch.setattr(predict, "_DRAWN", (written[9] + written[10]) / 2)
    assert run([*command, "threshold=1"]) == 0
    assert drawn == pytest.approx(written[:10], abs=1e-6)


def test_other_labels(checkpoint: Path, photos: Path):
    arguments = ["predict", f"checkpoint={checkpoint}", "images=photos/a.png", "run_dir=out", "top=9"]
    assert run([*arguments, "labels=[mug,zebra crossing]"]) == 0
    (line,) = (json.loads(text) for text in Path("out/predictions.jsonl").read_text().splitlines())
    assert {label["label"] for label in line["labels"]} == {"mug", "zebra crossing"}
    for typed in ("labels='mug, zebra crossing'", "labels=mug, zebra crossing,"):
        assert run([*arguments, typed]) == 0
        (again,) = (json.loads(text) for text in Path("out/predictions.jsonl").read_text().splitlines())
        assert again == line


NAMES = ["IMG (1).png", "it's.png", "a=b.png", "x, y.png", "[1].png", "{z}.png", '50% & "so".png', "照片 é.png", "1.5"]


def test_files_of_any_name(checkpoint: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    """Most of these characters have a meaning in Hydra's grammar."""
    for name in NAMES:
        (photos / "a.png").with_name(name).write_bytes((photos / "a.png").read_bytes())
    monkeypatch.chdir(photos)
    for name in NAMES:
        assert run(["predict", f"checkpoint={checkpoint}", f"images={name}"]) == 0, name
        assert json.loads(Path("runs/predictions/predictions.jsonl").read_text(encoding="utf-8"))["image"] == name
    assert run(["predict", f"checkpoint={checkpoint}", "images=a.png,IMG (1).png"]) == 0
    assert len(Path("runs/predictions/predictions.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems reject such file names")
def test_invalid_unicode_and_long_file_names(checkpoint: Path, photos: Path, tmp_path: Path):
    image = (photos / "a.png").read_bytes()
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"latin\xe9.png", b"x" * 250 + b".png", b"two\nlines.png"):
        (folder / os.fsdecode(name)).write_bytes(image)
    (folder / "gone.png").symlink_to("nowhere")
    command = [sys.executable, "-W", "ignore", "-m", "gm_mlic", "predict", f"checkpoint={checkpoint}", "images=odd"]
    done = subprocess.run([*command, "pictures=true"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 of 4 photos" in done.stdout
    assert "left out: Image odd/gone.png does not exist" in done.stderr
    lines = (tmp_path / "runs/predictions/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert all((tmp_path / json.loads(line)["image"]).is_file() for line in lines)
    assert len(list((tmp_path / "runs/predictions/pictures").iterdir())) == 3


def test_files_patterns_and_lists(photos: Path):
    assert find_photos(["photos/a.png", "photos/a.png"]) == [Path("photos/a.png")]
    assert find_photos(["photos/*.png"]) == [Path(f"photos/{name}.png") for name in ("[e]", "a", "b, c")]
    assert find_photos(["photos/**/*.JPG", "photos/[e].png"]) == [Path("photos/more/d.JPG"), Path("photos/[e].png")]
    assert find_photos(["photos/notes.txt"]) == [Path("photos/notes.txt")]  # named files are never filtered
    for missing in ("photos/*.gif", "nowhere"):
        with pytest.raises(DataError, match="no such file, folder or pattern"):
            find_photos([missing])
    Path("empty").mkdir()
    with pytest.raises(DataError, match="the folder has no photos"):
        find_photos(["empty"])


def test_folders_with_heic_before_its_reader_is_registered(tmp_path: Path):
    for name in ("a.HEIC", "b.avif", "c.txt"):
        (tmp_path / name).touch()
    code = f"from gm_mlic.cli.predict import find_photos\nprint(*(p.name for p in find_photos([{str(tmp_path)!r}])))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["a.HEIC", "b.avif"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images=photos"], "checkpoint has no value"),
        (["checkpoint=nowhere.ckpt", "images=photos"], "nowhere.ckpt: no such checkpoint"),
        (["checkpoint=photos/a.png", "images=photos"], "photos/a.png: not a checkpoint"),
        (["images=nowhere"], "images=nowhere: no such file"),
        (["images=[photos/torn.jpg,photos/notes.txt]"], "None of the 2 photos can be read"),
        (["images=photos/a.png", "run_dir=photos/a.png"], "photos/a.png: a file with this name exists"),
        (["images=photos", "top=0"], "top=0: expected an integer of at least 1"),
        pytest.param(
            ["images=photos", "device=cuda"], "device is cuda, but torch finds no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available"),
        ),
        (["images=photos", "threshold=2"], "threshold=2: expected a number"),
        (["images=photos", "labels=[]"], "labels=[]: expected names"),
        (["images=photos", "labels=[mug,mug]"], "labels must be unique"),
        (["images=photos", "labels=[mug]", "embedding.path=nowhere.npz"], "nowhere.npz does not exist"),
        (["images=photos", "labels=[mug]", "embedding.sauce=x"], "embedding.sauce: unknown setting"),
        (["images=photos", "detector.weights=nowhere.safetensors"], "nowhere.safetensors"),
    ],
)  # fmt: skip
def test_invalid_input(
    checkpoint: Path, photos: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    if not any(argument.startswith("checkpoint=") for argument in arguments) and "no value" not in message:
        arguments = [f"checkpoint={checkpoint}", *arguments]
    assert run(["predict", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("gm-mlic: error: ")
    assert message in last
