"""Detector training: convergence, exact resumption, and error messages."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from gm_mlic.datasets import BoxAnnotations, MultiLabelDataset, Scenes
from gm_mlic.detection import build_extractor, training
from gm_mlic.detection.checkpoints import save_checkpoint
from gm_mlic.detection.torchvision_detector import build_detector
from gm_mlic.detection.training import average_precision, train_detector
from gm_mlic.errors import ConfigError, DataError, UnreadableImage, WeightsError
from gm_mlic.optim import one_cycle


class Squares(MultiLabelDataset):
    """Gray images with one white or black square each; rows in ``broken`` are unreadable."""

    name, labels = "squares", ("white", "black")

    def __init__(self, size: int = 6, split: str = "train", broken: tuple[int, ...] = (), boxes: bool = True) -> None:
        self.split, self.broken, self._boxes = split, broken, boxes
        self.ids = tuple(f"{split}-{i}" for i in range(size))
        self.targets = (np.arange(size)[:, None] % 2 == np.arange(2)).astype(np.int8)

    def image(self, i: int) -> Image.Image:
        if i in self.broken:
            raise UnreadableImage(f"{self.ids[i]} is truncated.")
        image = Image.new("RGB", (64, 48), (128, 128, 128))
        image.paste((255, 255, 255) if i % 2 == 0 else (0, 0, 0), self._place(i))
        return image

    def boxes(self, i: int) -> BoxAnnotations | None:
        if not self._boxes:
            return None
        # The second box has no area, as some in COCO.
        boxes = torch.tensor([self._place(i), (3, 5, 3, 30)], dtype=torch.float32)
        return BoxAnnotations(boxes, torch.tensor([i % 2, 0]))

    @staticmethod
    def _place(i: int) -> tuple[int, int, int, int]:
        return 4 + 3 * i, 10, 24 + 3 * i, 32


def _train(out, train=None, val=None, **settings):
    settings = {"epochs": 2, "batch_size": 3, "min_size": 48, "progress": False} | settings
    return train_detector(train or Squares(), val, "scenes_tiny", out, **settings)


def _tensors(path) -> dict[str, torch.Tensor]:
    return build_extractor("scenes_tiny", weights=path).detector.state_dict()


def test_training_lowers_the_loss_and_writes_the_record(tmp_path):
    out = tmp_path / "new" / "w.safetensors"
    record = train_detector(
        Scenes("train", size=16, seed=1),
        Scenes("val", size=4, seed=1),
        "scenes_tiny",
        out,
        epochs=3,
        batch_size=4,
        min_size=96,
        command="gm-mlic train-detector",
        progress=False,
    )
    assert len(record["loss"]) == len(record["val_ap50"]) == 3
    assert record["loss"][-1] < 0.9 * record["loss"][0]
    assert out.stat().st_size < 5_000_000
    assert json.loads(out.with_suffix(".json").read_text(encoding="utf-8")) == record
    assert record["command"] == "gm-mlic train-detector"
    assert sorted(p.name for p in out.parent.iterdir()) == ["w.json", "w.safetensors"]
    assert build_extractor("scenes_tiny", weights=out).labels == Scenes("train", size=1).labels


def test_trained_detector_finds_squares_and_shows_progress(tmp_path, caplog):
    with caplog.at_level("INFO"):
        _train(tmp_path / "w.safetensors", epochs=20, lr=4e-3, progress=True)
    assert re.search(r"epoch 20/20: (\d+) of \1 images, .* images/s, 0 s left, loss \d", caplog.text)
    extractor = build_extractor("scenes_tiny", weights=tmp_path / "w.safetensors")
    assert average_precision(extractor.detector, Squares(split="val"), progress=False) > 50


def test_resumed_run_gives_the_same_weights(tmp_path, monkeypatch):
    _train(tmp_path / "whole.safetensors", epochs=3)
    step, taken = training._step, []

    def killed_in_the_second_epoch(*arguments):
        taken.append(step(*arguments))
        if len(taken) == 3:
            raise KeyboardInterrupt
        return taken[-1]

    monkeypatch.setattr(training, "_step", killed_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "cut.safetensors", epochs=3)
    state = (tmp_path / "cut.resume.pt").read_bytes()
    assert not (tmp_path / "cut.safetensors").exists()
    monkeypatch.setattr(training, "_step", step)
    whole = _tensors(tmp_path / "whole.safetensors")
    for workers in (0, 2):
        (tmp_path / "cut.resume.pt").write_bytes(state)
        torch.manual_seed(1234)  # the global random state has no effect
        record = _train(tmp_path / "cut.safetensors", epochs=3, num_workers=workers)
        assert len(record["loss"]) == 3
        assert not (tmp_path / "cut.resume.pt").exists()
        cut = _tensors(tmp_path / "cut.safetensors")
        for key, tensor in whole.items():
            assert torch.equal(tensor, cut[key]), key


def test_state_of_another_run_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "w.safetensors"
    monkeypatch.setattr(training, "save_checkpoint", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        _train(out, epochs=1)
    with pytest.raises(ConfigError, match=r"w\.resume\.pt .* epochs=1, not 2"):
        _train(out, epochs=2)
    (tmp_path / "w.resume.pt").write_bytes(b"half")
    with pytest.raises(WeightsError, match=r"w\.resume\.pt"):
        _train(out, epochs=1)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_training_does_not_change_the_global_random_state(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _train(tmp_path / "w.safetensors", epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_unreadable_images_are_skipped_and_reported(tmp_path, caplog):
    train, val = Squares(broken=(1, 4)), Squares(split="val", broken=(0,))
    record = _train(tmp_path / "w.safetensors", train=train, val=val, batch_size=1)
    assert record["skipped"] == {"train-1": "train-1 is truncated.", "train-4": "train-4 is truncated."}
    assert "2 unreadable images" in caplog.text


def test_flips_apply_to_boxes():
    plain = training._LabeledImages(Squares(), range(6), None)
    flipped = training._LabeledImages(Squares(), range(6), [True] * 6)
    for i in range(6):
        (image, target), (mirror, mirrored) = plain[i], flipped[i]
        assert len(target["boxes"]) == 1  # the box without area is dropped
        assert target["labels"].tolist() == [i % 2 + 1]
        for picture, boxes in ((image, target["boxes"]), (mirror, mirrored["boxes"])):
            x1, y1, x2, y2 = boxes[0].int().tolist()
            assert (picture[:, y1:y2, x1:x2] == float(i % 2 == 0)).all()
            assert (picture != 0.5019608).sum() == 3 * 20 * 22


def test_other_labels_reinitialize_the_last_layer(tmp_path):
    start = build_detector("scenes_tiny", 4, seed=3)
    record = {"arch": "scenes_tiny", "labels": ["a", "b", "c"], "min_size": 64, "max_size": 100}
    save_checkpoint(tmp_path / "start.safetensors", start.state_dict(), record)
    _train(tmp_path / "w.safetensors", weights=tmp_path / "start.safetensors", min_size=None, epochs=1, lr=1e-9)
    before, after = start.state_dict(), _tensors(tmp_path / "w.safetensors")
    assert after["roi_heads.box_predictor.cls_score.weight"].shape[0] == 3
    for key, tensor in before.items():
        if not key.startswith("roi_heads.box_predictor"):
            # Given weights freeze batch norm statistics.
            torch.testing.assert_close(after[key], tensor, atol=1e-6, rtol=1e-6, msg=key)
    assert build_extractor("scenes_tiny", weights=tmp_path / "w.safetensors").detector.transform.min_size == (64,)


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"train": Squares(boxes=False)}, ConfigError, "squares .* no boxes"),
        ({"train": Squares(broken=tuple(range(6)))}, DataError, "No image of squares .* can be read"),
        ({"val": Scenes("val", size=1)}, ConfigError, "labels of scenes"),
        ({"epochs": 0}, ConfigError, "epochs must be an integer of at least 1; got 0"),
        ({"batch_size": -1}, ConfigError, "batch_size must be an integer of at least 1; got -1"),
        ({"lr": 1e12, "epochs": 9}, ConfigError, "lower the learning rate"),
    ],
)
def test_invalid_datasets_and_settings(tmp_path, settings, error, named):
    with pytest.raises(error, match=named) as caught:
        _train(tmp_path / "w.safetensors", **settings)
    assert "\n" not in str(caught.value)


def test_weights_file_must_be_safetensors(tmp_path):
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        _train(tmp_path / "w.pt")


@pytest.mark.parametrize("pct_start", [0.01, 0.1, 0.15, 0.5, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 20, 1000])
def test_one_cycle_of_any_length(steps, pct_start):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = one_cycle(optimizer, steps, pct_start)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(0 < rate <= 0.5 for rate in rates)
    if steps >= 10:
        assert max(rates) > 0.45
        assert rates[0] < 0.1
