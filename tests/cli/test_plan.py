from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gm_mlic.cli.compose import compose
from gm_mlic.cli.main import run
from gm_mlic.cli.plan import PUBLISHED, Probe, Sizes, duration, estimate, plan
from gm_mlic.training import build

PROBE = Probe(
    detect=1.0, view=0.5, train=0.1, evaluate=0.01, fixed=1000, growing=10, checkpoint=300, feature_dim=4
)  # fmt: skip
SIZES = Sizes({"train": 100, "val": 20, "test": 40}, 3, None)


def planned(*overrides: str) -> dict[str, dict[str, float]]:
    config = compose(
        "plan", ["trainer.max_epochs=5", "trainer.batch_size=8", "detector.max_instances=6", "graph.m=6", *overrides]
    )
    return estimate(config, SIZES, PROBE)


def test_one_device():
    result = planned()
    assert result["images"] == {"extract": 160, "train": 500, "validate": 100, "test": 40}
    # 13 steps of 8 images per epoch; the incomplete last step counts in full
    assert result["seconds"] == pytest.approx(
        {"extract": 160, "train": 5 * 13 * 8 * 0.1, "validate": 1.0, "test": 0.4, "total": 160 + 52 + 1.4}
    )
    image_bytes = 6 * (4 * 2 + 4 * 4 + 4 + 4) + 4 + 3 + 40
    assert result["bytes"] == {"stores": 160 * image_bytes, "checkpoints": 600, "memory": 1080}


def test_more_devices_and_views():
    result = planned("devices=4", "instances.num_augmentations=3")
    assert result["images"]["extract"] == 460
    assert result["seconds"]["extract"] == pytest.approx((160 + 300 * 0.5) / 4)
    assert result["seconds"]["train"] == pytest.approx(5 * 4 * 8 * 0.1)  # 25 images each: 4 steps
    assert result["bytes"]["stores"] > 2 * planned()["bytes"]["stores"]


def test_views_of_evaluated_photos_are_detected_and_stored():
    one, two = planned(), planned("graph.views=2")
    assert two["images"]["extract"] == 100 + 2 * (20 + 40)
    assert two["seconds"]["extract"] == pytest.approx(one["seconds"]["extract"] + 60)
    assert two["bytes"]["stores"] == one["bytes"]["stores"] + 60 * 6 * (4 * 2 + 4 * 4 + 4 + 4)


def test_passes_of_the_smallest_number_of_steps():
    # 5 epochs of 100 images, in steps of 8, on each of 4 devices in the third case
    assert planned("trainer.min_steps=100")["images"]["train"] == 5 * 2 * 100
    assert planned("trainer.min_steps=100")["seconds"]["train"] == pytest.approx(5 * 25 * 8 * 0.1)
    assert planned("trainer.min_steps=100", "devices=4")["images"]["train"] == 5 * 7 * 100
    assert planned("trainer.min_steps=60")["images"]["train"] == 5 * 100


def test_online_detection_counts_in_each_epoch():
    frozen, trained = (planned("instances.online=true", f"detector.trainable={part}") for part in ("none", "box_head"))
    assert frozen["seconds"]["extract"] == 60 + 500
    assert trained["seconds"]["extract"] == 500 + 100 + 40
    assert trained["bytes"]["stores"] == 0


@pytest.mark.parametrize(
    "model",
    [
        ["model=gm_mlic_small"],
        ["model=mil_max"],
        ["model.prior=true", "model.linear=true", "model.class_words=true", "model.shrinkage=10"],
    ],
    ids=lambda model: model[0],
)
def test_plan_of_an_existing_dataset(model: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    overrides = ["experiment=scenes_smoke", *model, "dataset.sizes={train: 24, val: 8, test: 8}"]
    result = plan(compose("plan", [*overrides, "dataset.image_size=96"]))
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["bytes"]["memory"] > result["bytes"]["checkpoints"] / 2
    assert not list(tmp_path.iterdir()), "a plan writes nothing"
    out = capsys.readouterr().out
    assert "24 train, 8 val, 8 test" in out
    assert "Measured in" in out

    # The estimate equals the size of real stores.
    config = compose("train", [*overrides, "dataset.image_size=96", f"instances.root={tmp_path}/stores"])
    for split in ("train", "val", "test"):
        build.build_store(config, build.build_dataset(config, split), build.build_detector(config))
    arrays = sum(file.stat().st_size for file in (tmp_path / "stores").rglob("*.safetensors"))
    assert result["bytes"]["stores"] == pytest.approx(arrays, rel=0.05)


def test_unreadable_images_are_skipped(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(6):
        Image.new("RGB", (64, 48)).save(tmp_path / f"{n}.jpg")
    for n in (0, 2):
        (tmp_path / f"{n}.jpg").write_bytes(b"")
    (tmp_path / "labels.csv").write_text(
        "file,labels,split\n" + "".join(f"{n}.jpg,cat,{s}\n" for n, s in enumerate(["train"] * 4 + ["val", "test"]))
    )
    own = ["dataset=custom", f"dataset.root={tmp_path}", "dataset.annotations=labels.csv", "model.widths=[8,8]"]
    own += ["detector=scenes_tiny", "detector.weights=scenes"]
    assert plan(compose("plan", [*own, "trainer.batch_size=2"]))["images"]["extract"] == 6


def test_layout_and_precision_of_the_run(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["dataset.sizes={train: 8, val: 4, test: 4}", "dataset.image_size=96", "model.widths=[8,8]"]
    for change in ("graph.layout=sparse", "trainer.precision=bf16-mixed", "optimizer=paper"):
        assert plan(compose("plan", [*small, "trainer.batch_size=2", change]))["seconds"]["train"] > 0


def test_plan_of_a_missing_published_dataset(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["detector=scenes_tiny", "detector.weights=scenes", "model=gm_mlic_small", "instances.num_augmentations=1"]
    assert run(["plan", "experiment=nuswide", *small, "devices=8", "trainer.batch_size=2"]) == 0
    out = capsys.readouterr().out
    assert "14,561,000 images in 100 epochs" in out
    assert "time on 8 devices" in out
    assert "nuswide not found" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["devices=0"], "devices=0: expected an integer of at least 1"),
        (["dataset=custom", "dataset.root=nowhere", "dataset.annotations=x.csv"], "nowhere"),
        (["graph.m=500"], "graph.m=500"),
    ],
)
def test_invalid_settings(arguments: list[str], message: str, capsys):
    assert run(["plan", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_published_sizes_equal_the_label_files(shared_data: Path):
    for name, keys in {"voc2007": ("trainval", "test"), "coco2014": ("train", "val")}.items():
        with np.load(shared_data / "labels" / f"{name}.npz") as content:
            train, test = (content[key] for key in keys)
            assert (len(train), len(test), len(content["labels"])) == PUBLISHED[name]
    train, test, labels = PUBLISHED["nuswide"]
    with np.load(shared_data / "labels" / "nuswide81.npz") as content:
        assert (len(content["rows"]), len(content["labels"])) == (train + test, labels)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (45, "45 s"), (600, "10 min"), (5 * 3600, "5.0 h"), (3 * 86400, "3.0 days")],
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text
