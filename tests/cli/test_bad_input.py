"""Commands on unusual, damaged or missing photos and files succeed or fail with a one-line message."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gm_mlic import Scenes, register_model
from gm_mlic.cli import commands
from gm_mlic.cli.compose import compose
from gm_mlic.cli.main import run
from gm_mlic.registry import register_dataset

CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 5, "name": "red bird"}]


def photo(path: Path, seed: int, mode: str = "RGB") -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos in COCO's 2014 layout: 10 for training and validation, 3 for test."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split, size in (("train2014", 10), ("val2014", 3)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(1, size + 1):
            name = f"{split}_{i:03}.jpg"
            photo(root / split / name, seed=i)
            images.append({"id": i, "file_name": name, "width": 50, "height": 40})
            box = [5, 5, 20, 20]
            annotations.append({"id": i, "image_id": i, "category_id": CATEGORIES[i % 3]["id"], "bbox": box,
                                "area": 400, "iscrowd": 0})  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def photos(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the photos that tests may change."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gm-mlic"])
    shutil.copytree(good, tmp_path / "photos")
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def finished(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with photos, a run on them, and its stores."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(good, folder / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["gm-mlic"])
        assert train(Path("photos")) == 0
    return folder


@pytest.fixture
def trained(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy of the photos, the run and its stores that tests may change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gm-mlic"])
    return Path("photos")


def train(root: Path, *overrides: str) -> int:
    return run(
        [
            "train", "dataset=coco2014", f"dataset.root={root}", "dataset.val_fraction=0.3", "detector=scenes_tiny",
            "detector.weights=null", "detector.min_size=32", "detector.max_instances=3", "graph.m=3",
            "model.widths=[8,8]", "trainer.max_epochs=1", "trainer.accelerator=cpu", "run_dir=run", *overrides,
        ]
    )  # fmt: skip


@pytest.mark.parametrize("setting", ["trainer.accelerator=cuda", "instances.root=file"])
def test_settings_that_fail_late_leave_no_run_folder(setting: str, photos: Path, capsys: pytest.CaptureFixture[str]):
    if torch.cuda.is_available() and "cuda" in setting:
        pytest.skip("the accelerator is available")
    Path("file").touch()
    assert train(photos, setting) == 2
    assert setting.partition("=")[0] in refused(capsys)
    assert not Path("run").exists()


def test_a_command_that_failed_late_keeps_its_folder(photos: Path, monkeypatch: pytest.MonkeyPatch):
    """For example an extraction that was out of memory after an hour."""
    monkeypatch.setattr(commands, "_SETUP_S", 0.0)
    Path("file").touch()
    assert train(photos, "instances.root=file") == 2
    assert {"config.yaml", "state.json", "train.log"} <= {path.name for path in Path("run").iterdir()}


def change(root: Path, split: str, key: str, i: int, **values: Any) -> None:
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    content[key][i] |= values
    path.write_text(json.dumps(content))


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The error line."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("gm-mlic: ")]
    assert len(lines) == 1
    assert lines[0] == err.strip().splitlines()[-1]
    assert lines[0].startswith("gm-mlic: error: ")
    return lines[0]


def result() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("run/metrics.json").read_text())
    return content


def test_color_modes_and_formats(photos: Path):
    photo(photos / "train2014/train2014_001.jpg", 1, "L")
    photo(photos / "train2014/train2014_002.jpg", 2, "CMYK")
    name = "train2014_003.png"
    photo(photos / "train2014" / name, 3, "RGBA")
    change(photos, "train2014", "images", 2, file_name=name)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("RGB", (40, 50)).save(photos / "train2014/train2014_004.jpg", exif=exif)
    assert train(photos) == 0
    assert result()["skipped"] == {"train": {}, "val": {}, "test": {}}


def test_unreadable_photos_are_named_and_left_out(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "val2014/val2014_001.jpg").write_bytes(b"")
    path = photos / "val2014/val2014_002.jpg"
    path.write_bytes(path.read_bytes()[:500])
    assert train(photos) == 0
    assert len(result()["skipped"]["test"]) == 2
    err = capsys.readouterr().err
    assert "2 of 3 images cannot be read and are left out" in err
    assert "left out of test: 2 of 3 images (" in err.splitlines()[-2]  # summary with reasons
    assert "val2014_001.jpg" in err.splitlines()[-2]


def test_a_missing_photo_is_named(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "val2014/val2014_003.jpg").unlink()
    assert train(photos) == 2
    assert "1 of 3 images" in (line := refused(capsys))
    assert "val2014_003.jpg" in line
    assert not Path("data").exists()  # reported before any slow stage


def test_a_box_outside_the_image(photos: Path, capsys: pytest.CaptureFixture[str]):
    change(photos, "train2014", "annotations", 0, bbox=[30, 30, 100, 100])
    assert train(photos) == 2
    line = refused(capsys)
    assert "train2014_001.jpg" in line
    assert "outside the image of 50 x 40 pixels" in line


def test_an_unknown_label(photos: Path, capsys: pytest.CaptureFixture[str]):
    change(photos, "train2014", "annotations", 4, category_id=77)
    assert train(photos) == 2
    line = refused(capsys)
    assert "77" in line
    assert "instances_train2014.json" in line


def test_invalid_json_annotations(photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "annotations/instances_val2014.json").write_text("{")
    assert train(photos) == 2
    assert "instances_val2014.json" in refused(capsys)


def test_an_empty_dataset(photos: Path, capsys: pytest.CaptureFixture[str]):
    path = photos / "annotations/instances_train2014.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": CATEGORIES}))
    assert train(photos) == 2
    assert "no images" in refused(capsys)


def test_a_missing_root(photos: Path, capsys: pytest.CaptureFixture[str]):
    assert train(photos / "nowhere") == 2
    assert "nowhere" in refused(capsys)


def test_nan_in_the_embedding(photos: Path, capsys: pytest.CaptureFixture[str]):
    vectors = np.ones((3, 8), dtype=np.float32)
    vectors[1, 2] = np.nan
    np.savez("vectors.npz", labels=np.array(["cat", "dog", "red bird"]), vectors=vectors)
    assert train(photos, "embedding=glove", "embedding.path=vectors.npz") == 2
    assert "vectors.npz" in refused(capsys)
    assert not Path("data").exists()


def test_out_of_vocabulary_labels(photos: Path, capsys: pytest.CaptureFixture[str]):
    Path("vectors.txt").write_text("cat 1 2 3\nred 0 1 0\n")
    assert train(photos, "embedding=glove", "embedding.path=vectors.txt") == 2
    line = refused(capsys)
    assert "dog" in line
    assert "bird" in line


def test_a_store_with_fewer_instances(photos: Path, capsys: pytest.CaptureFixture[str]):
    assert train(photos, "instances.path=stores") == 0
    capsys.readouterr()
    more = ["detector.max_instances=5", "graph.m=5", "run_dir=other"]
    assert train(photos, "instances.path=stores", *more) == 2
    line = refused(capsys)
    assert "m=3" in line
    assert "m=5" in line


def test_a_checkpoint_for_other_labels(trained: Path, capsys: pytest.CaptureFixture[str]):
    for split in ("train2014", "val2014"):
        change(trained, split, "categories", 0, name="lion")
    assert run(["eval", "checkpoint=run/checkpoints/best.ckpt"]) == 2
    assert "trained on other labels" in refused(capsys)


def test_eval_equals_the_test_of_the_run(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert train(trained) == 0  # prints the result of the finished run
    printed = capsys.readouterr().out
    assert run(["eval", "checkpoint=run/checkpoints/best.ckpt"]) == 0
    again = capsys.readouterr().out
    assert again.startswith(printed)
    assert again.removeprefix(printed).startswith("95 % interval of mAP: ")
    assert json.loads(Path("run/eval/test.json").read_text())["metrics"] == result()["test"]


@pytest.mark.usefixtures("trained")
def test_eval_writes_scores_that_eval_reads(capsys: pytest.CaptureFixture[str]):
    assert run(["eval", "checkpoint=run/checkpoints/best.ckpt", "calibrate=true", "bootstrap=20"]) == 0
    assert "top 3, fitted thresholds" in capsys.readouterr().out
    from_checkpoint = json.loads(Path("run/eval/test.json").read_text())
    assert from_checkpoint["calibrated"]["mAP"] == from_checkpoint["metrics"]["mAP"]
    assert run(["eval", "scores=run/eval/test.npz", "targets=run/eval/test.npz", "bootstrap=20"]) == 0
    from_file = json.loads(Path("runs/eval-test/test.json").read_text())
    assert from_file["metrics"]["mlgcn"] == from_checkpoint["metrics"]
    assert from_file["intervals"]["mlgcn"] == from_checkpoint["intervals"]["mlgcn"]
    assert list(from_checkpoint["thresholds"]) == ["cat", "dog", "red bird"]

    assert run(["eval", "checkpoint=run/checkpoints/best.ckpt", "split=val", "calibrate=true"]) == 2
    assert "fits thresholds on val" in refused(capsys)


def test_invalid_detector_weights(photos: Path, capsys: pytest.CaptureFixture[str]):
    torch.save({"a": 1}, "weights.pt")
    assert train(photos, "detector.weights=weights.pt") == 2
    assert "weights.pt" in refused(capsys)


def test_a_detector_trained_on_photos_is_used_by_train(photos: Path):
    small = ["dataset=coco2014", f"dataset.root={photos}", "dataset.val_fraction=0.3", "detector=scenes_tiny"]
    out = ["detector.min_size=32", "epochs=1", "device=cpu", "out=mine.safetensors", "run_dir=detector"]
    assert run(["train-detector", *small, *out]) == 0
    assert train(photos, "detector.weights=mine.safetensors") == 0
    assert result()["detector"]["name"] == "scenes_tiny"


def test_extract_in_two_shards(photos: Path, capsys: pytest.CaptureFixture[str]):
    common = ["extract", "dataset=coco2014", f"dataset.root={photos}", "detector=scenes_tiny", "detector.min_size=32",
              "detector.weights=null", "instances.batch_size=1", "splits=[test]"]  # fmt: skip
    assert run([*common, "instances.shard=0/2"]) == 0
    assert "shard 0/2 is finished, other shards are not" in capsys.readouterr().err
    assert run([*common, "instances.shard=1/2"]) == 0
    assert "test: 3 images in data/instances/coco2014/test-scenes_tiny-" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["dataset=custom", "dataset.root=nowhere"], "nowhere is not a folder: set dataset.root to the folder"),
        (["dataset=voc2007", "dataset.root=nowhere"], "dataset.download=true fetches it."),
        (["plugins=mine"], "plugins=mine: expected a list: plugins=[mine]."),
        (["dataset.image_size=64"], "dataset.image_size=64: expected an integer from 96 to 640."),
        (["dataset.sizes.train=20000000"], "dataset.sizes.train=20000000: expected an integer from 1 to 10000000."),
        (["detector.weights=cocoo"], "detector.weights is 'cocoo': expected null, coco, scenes"),
        (["detector.weights=coco"], "detector.weights is 'coco', which requires one of fasterrcnn_"),
        (["detector.min_size=300", "detector.max_size=200"], "detector.min_size is 300, above detector.max_size 200: "),
        (["embedding=glove", "embedding.path=none.txt"], "do not exist: check embedding.path."),
    ],
    ids=lambda settings: settings[-1] if isinstance(settings, list) else "",
)
def test_errors_of_the_library_name_the_key(
    settings: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run(["train", *settings, "run_dir=run"]) == 2
    assert line in refused(capsys)


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("model.name=foo", "gm_mlic_paper"), ("dataset.name=foo", "coco2014, custom, nuswide"),
        ("dataset.name=null", "one of coco2014"), ("detector.name=foo", "scenes_tiny"),
        ("trainer.strategy=fast", "one of auto, ddp"),
    ],
)  # fmt: skip
def test_unknown_names_are_rejected_before_the_run_folder_is_created(
    setting: str, known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run(["train", "experiment=scenes_smoke", setting]) == 2
    line = refused(capsys)
    assert f"{setting}: expected " in line
    assert known in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("registries")
def test_registered_names_are_valid():
    register_dataset("mine")(type("Mine", (Scenes,), {"name": "mine"}))
    register_model("my_model")(type("my_model", (torch.nn.Module,), {"__doc__": "A model."}))
    config = compose("train", ["model=my_model", "dataset=mine"])
    assert (config.model, config.dataset.name) == ({"name": "my_model"}, "mine")
    assert config.detector.name == "scenes_tiny"  # that of Scenes
