"""Detector ``precomputed`` from the shell, with files of which some are missing or damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from gm_mlic import Scenes
from gm_mlic.cli.main import run

SIZES = {"train": 16, "val": 8, "test": 8}
TRAIN = [
    "train", "experiment=scenes_smoke", "dataset.sizes={train: 16, val: 8, test: 8}", "dataset.image_size=96",
    "trainer.max_epochs=1", "model.widths=[8,8]", "trainer.accelerator=cpu", "detector=precomputed",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random instances of all scenes, and the photos of the test split."""
    root = tmp_path_factory.mktemp("shell")
    (root / "instances").mkdir()
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for split, size in SIZES.items():
        scenes = Scenes(split, size=size, image_size=96)
        for i, name in enumerate(scenes.ids):
            np.savez(
                root / "instances" / f"{name}.npz", classes=rng.integers(0, 2, 5), scores=rng.uniform(size=5),
                boxes=np.concatenate([rng.uniform(0, 40, (5, 2)), rng.uniform(50, 96, (5, 2))], axis=1),
                features=rng.normal(size=(5, 4)), image_w=96, image_h=96,
            )  # fmt: skip
            if split == "test":
                scenes.image(i).save(root / "photos" / f"{name}.png")
    (root / "instances" / "labels.txt").write_text("mug\nhouse\n")
    return root


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    stores = f"instances.root={folder}/stores"
    assert run([*TRAIN, f"detector.path={folder}/instances", stores, f"run_dir={folder}/run"]) == 0
    return folder / "run" / "checkpoints" / "best.ckpt"


def damaged(folder: Path, out: Path, missing: str = "", infinite: str = "") -> Path:
    """A copy of the instances without a photo, and with a NaN in another."""
    shutil.copytree(folder / "instances", out)
    if missing:
        (out / f"{missing}.npz").unlink()
    if infinite:
        with np.load(out / f"{infinite}.npz") as arrays:
            changed = dict(arrays)
        changed["features"][3, 2] = np.nan
        np.savez(out / f"{infinite}.npz", **changed)
    return out


def failed(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error == [f"gm-mlic: error: {message}"]


@pytest.mark.usefixtures("checkpoint")  # without a NaN it trains
def test_train(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    path = damaged(folder, tmp_path / "one", missing="val-00003", infinite="test-00002")
    lacks = f"1 of 8 photos has no instances in {path}: val-00003: add them, or set detector.missing=skip to leave "
    failed([*TRAIN, f"detector.path={path}"], f"{lacks}photos out.", capsys)
    nan = f"{path}/test-00002.npz: features[3] is NaN or infinite: leave this instance out, or detect again."
    failed([*TRAIN, f"detector.path={path}", "detector.missing=skip"], nan, capsys)


def test_predict_explain_and_serve(checkpoint: Path, folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    path = damaged(folder, tmp_path / "one", missing="test-00001", infinite="test-00002")
    photos = {i: f"{folder}/photos/test-0000{i}.png" for i in range(4)}
    predict = ["predict", f"checkpoint={checkpoint}", f"detector.path={path}"]
    lacks = f"1 of 2 photos has no instances in {path}: {photos[1]}: add them, or set detector.missing=skip to leave "
    failed([*predict, f"images=[{photos[0]},{photos[1]}]"], f"{lacks}photos out.", capsys)
    nan = f"{path}/test-00002.npz: features[3] is NaN or infinite: leave this instance out, or detect again."
    failed([*predict, f"images={photos[2]}"], nan, capsys)
    assert run([*predict, f"images=[{photos[0]},{photos[1]},{photos[3]}]", "detector.missing=skip"]) == 0
    lines = (tmp_path / "runs" / "predictions" / "predictions.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["image"]).name for line in lines] == ["test-00000.png", "test-00003.png"]
    assert run(["explain", f"checkpoint={checkpoint}", f"image={photos[0]}", "label=mug"]) == 0
    assert (tmp_path / "runs" / "explanations" / "test-00000-mug.json").is_file()
    capsys.readouterr()
    message = (
        "The detector precomputed looks instances up by the name of a photo, which an upload does not have: use "
        "gm-mlic predict, or a model of another detector."
    )
    failed(["serve", f"checkpoint={checkpoint}", "port=0"], message, capsys)
