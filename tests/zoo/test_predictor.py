from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gm_mlic import Predictor
from gm_mlic.cli.compose import compose
from gm_mlic.errors import ConfigError, DataError, UnreadableImage, WeightsError
from gm_mlic.metrics import read_scored_images
from gm_mlic.nn import GMMLIC
from gm_mlic.training import run


def predictor(folder: Path, name: str = "gm") -> Predictor:
    return Predictor.from_checkpoint(folder / name / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize("name", ["gm", "mil", "sparse", "candidates"])
def test_probabilities_equal_those_of_the_runs_test(folder: Path, photos: list[Path], name: str):
    """The run's test read 16-bit features from its store."""
    expected = read_scored_images([folder / name / "test.npz"], folder / name / "test.npz").scores[0].numpy()
    model = predictor(folder, name)
    for batch_size in (8, 1):
        found = np.stack([prediction.probabilities for prediction in model(photos, batch_size)])
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_prediction_shapes_and_argmax_boxes(folder: Path, photos: list[Path]):
    model = predictor(folder)
    prediction = next(model(photos[:1]))
    M = len(prediction.boxes)
    assert prediction.photo == photos[0]
    assert prediction.size == (96, 96)
    assert prediction.match_logits.shape == (M, 22)
    assert prediction.scores.shape == (M,)
    assert len(prediction.detected) == M
    np.testing.assert_allclose(
        1 / (1 + np.exp(-prediction.match_logits.max(axis=0))), prediction.probabilities, rtol=1e-5
    )
    top = prediction.top(5)
    assert [found.probability for found in top] == sorted(prediction.probabilities, reverse=True)[:5]
    for found in top:
        column = prediction.labels.index(found.label)
        assert found.instance == prediction.match_logits[:, column].argmax()
        assert found.box == tuple(prediction.boxes[found.instance].tolist())
        assert 0 <= found.box[0] < found.box[2] <= 96
    threshold = top[2].probability
    assert prediction.above(threshold) == top[:3]
    assert prediction.above(1.0) == []


def test_open_images_and_single_photos(folder: Path, photos: list[Path]):
    model = predictor(folder)
    with Image.open(photos[0]) as image:
        (from_image,) = model(image)
    assert from_image.photo is None
    (from_file,) = model(str(photos[0]))
    np.testing.assert_array_equal(from_image.probabilities, from_file.probabilities)
    (gray,) = model(Image.new("L", (40, 30)))
    assert gray.size == (40, 30)


def test_label_order_does_not_change_probabilities(folder: Path, photos: list[Path]):
    """The model has no per-label parameters."""
    model = predictor(folder)
    order = model.metadata.labels[::-1]
    a, b = next(model(photos[:1])), next(model.with_labels(order)(photos[:1]))
    np.testing.assert_allclose(a.probabilities[::-1], b.probabilities, rtol=1e-4)
    assert b.labels == order


def test_unseen_labels(folder: Path, photos: list[Path]):
    other = predictor(folder).with_labels(["mug", "zebra crossing"])
    prediction = next(other(photos[:1]))
    assert prediction.labels == ("mug", "zebra crossing")
    assert prediction.probabilities.shape == (2,)
    with pytest.raises(ConfigError, match="classifier for each label"):
        predictor(folder, "mil").with_labels(["mug"])
    with pytest.raises(DataError, match="labels must be unique"):
        other.with_labels(["mug", "mug"])
    with pytest.raises(DataError, match="does not exist"):
        other.with_labels(["mug"], name="glove", path="nowhere.npz")


def test_unreadable_photos(folder: Path, photos: list[Path], tmp_path: Path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"")
    model = predictor(folder)
    with pytest.raises(UnreadableImage, match=r"bad\.jpg"):
        list(model([photos[0], bad]))
    skipped: dict[str, str] = {}
    found = list(model([photos[0], bad, tmp_path / "missing.png", photos[1]], 2, skipped))
    assert [prediction.photo for prediction in found] == photos[:2]
    assert list(skipped) == [str(bad), str(tmp_path / "missing.png")]
    assert list(model([])) == []
    with pytest.raises(ConfigError, match="batch_size must be 1 or more, got 0"):
        list(model(photos, 0))


def test_another_detector_is_rejected(folder: Path):
    with pytest.raises(WeightsError, match="use the detector, weights and settings it was trained with"):
        Predictor.from_checkpoint(folder / "gm" / "checkpoints" / "best.ckpt", score_threshold=0.5)


def test_a_detector_trained_with_the_model(small: list[str], photos: list[Path], tmp_path: Path):
    online = ["instances.online=true", "detector.trainable=box_head", "model.widths=[8,8]", "trainer.max_epochs=1"]
    run.train(compose("train", [*small, *online, f"run_dir={tmp_path}/run"]))
    expected = read_scored_images([tmp_path / "run/test.npz"], tmp_path / "run/test.npz").scores[0].numpy()
    model = Predictor.from_checkpoint(tmp_path / "run/checkpoints/best.ckpt")
    found = np.stack([prediction.probabilities for prediction in model(photos)])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_labels_are_precomputed_once_per_call_with_the_current_weights(
    folder: Path, photos: list[Path], monkeypatch: pytest.MonkeyPatch
):
    model, fresh = predictor(folder), predictor(folder)
    computed = []
    precompute = GMMLIC.precompute_labels
    monkeypatch.setattr(GMMLIC, "precompute_labels", lambda *args: computed.append(1) or precompute(*args))
    before = [prediction.probabilities for prediction in model(photos, 4)]
    assert len(computed) == 1
    with torch.no_grad():
        for net in (model.model, fresh.model):
            for parameter in net.encoder.x["label"].parameters():
                parameter.mul_(-2)
    found, expected = ([prediction.probabilities for prediction in p(photos, 4)] for p in (model, fresh))
    assert len(computed) == 3
    np.testing.assert_array_equal(found, expected)
    assert not np.allclose(found, before, atol=1e-3)
