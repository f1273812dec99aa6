"""Settings of models that start from the detector's labels, and runs with a custom detector."""

from __future__ import annotations

import csv
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from gm_mlic import Predictor, Scenes
from gm_mlic.cli.compose import compose
from gm_mlic.datasets.images import to_tensor
from gm_mlic.detection import Instances
from gm_mlic.errors import ConfigError, WeightsError
from gm_mlic.graphs import AssignmentGraph, collate_instances
from gm_mlic.nn import GMMLIC, MILMax
from gm_mlic.training import build, run
from gm_mlic.training.run import build_module
from gm_mlic.zoo import read_checkpoint

Config = Callable[..., DictConfig]


class Quadrants:
    """A custom detector: the four quarters of an image, as classes of which two have names of labels."""

    name, feature_dim = "quadrants", 6
    labels = ("mug", "cheese", "nothing", "lemon")

    def __init__(self, version: int = 1) -> None:
        self.fingerprint = hashlib.sha256(f"quadrants {version}".encode()).hexdigest()

    def __call__(self, images: Sequence[Tensor], m: int) -> list[Instances]:
        return [self._one(image).top(m) for image in images]

    def _one(self, image: Tensor) -> Instances:
        boxes = torch.tensor([[x, y, x + 1, y + 1] for y in (0, 1) for x in (0, 1)]) / 2
        parts = [part for rows in image.tensor_split(2, dim=1) for part in rows.tensor_split(2, dim=2)]
        features = torch.stack([torch.cat([p.mean(dim=(1, 2)), p.std(dim=(1, 2))]) for p in parts])
        scores, order = features[:, 3:].mean(dim=1).clamp(0, 1).sort(descending=True, stable=True)
        return Instances(boxes[order], scores, order, features[order])


PRIOR = ["model.prior=true", "model.linear=true", "model.class_words=true", "model.shrinkage=10"]


# A custom detector


def test_run_with_a_custom_detector(run_config: Config, tmp_path: Path) -> None:
    config = run_config(*PRIOR, "model.components=4", "graph.views=2", "graph.m=4", "detector.max_instances=4")
    result = run.train(config, extractor=Quadrants())
    path = tmp_path / "run/checkpoints/best.ckpt"
    metadata, _ = read_checkpoint(path)
    assert (metadata.detector, metadata.detector_settings) == ("quadrants", {})
    names = [[metadata.labels[c] for c in numbers] for numbers in metadata.graph["class_labels"]]
    assert names == [["mug"], ["cheese"], [], ["lemon"]]

    with pytest.raises(WeightsError, match=r"its detector, quadrants, is a custom one: pass it as extractor="):
        Predictor.from_checkpoint(path)
    with pytest.raises(WeightsError, match="trained with detector quadrants"):
        Predictor.from_checkpoint(path, extractor=Quadrants(2))
    predictor = Predictor.from_checkpoint(path, extractor=Quadrants())
    scenes = Scenes("test", size=12, image_size=96)
    predictions = list(predictor([scenes.image(i) for i in range(12)]))
    assert {len(p.boxes) for p in predictions} == {8}

    evaluated = run.evaluate(path, "test", bootstrap=0, out=tmp_path / "out", extractor=Quadrants())
    assert evaluated["metrics"] == result["test"]
    with pytest.raises(WeightsError, match="trained with detector quadrants"):
        run.evaluate(path, "test", bootstrap=0)
    with np.load(tmp_path / "out/test.npz") as file:
        np.testing.assert_allclose(file["scores"], np.stack([p.probabilities for p in predictions]), atol=5e-3)

    folder = predictor.save_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match="is a custom one"):
        Predictor.from_pretrained(folder)
    again = Predictor.from_pretrained(folder, extractor=Quadrants())
    ours, theirs = (next(iter(p([to_image(scenes)]))).probabilities for p in (predictor, again))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def to_image(scenes: Scenes) -> Any:
    return scenes.image(0)


def test_custom_detector_replaces_that_of_the_config(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_detector", lambda config: pytest.fail("it must not be built"))
    config = run_config("graph.m=4", "detector.max_instances=4", "trainer.max_epochs=1")
    assert run.train(config, extractor=Quadrants())["test"]["mAP"] > 0


# The tables of the prior


@pytest.mark.parametrize("model", [["model.prior=true"], ["model=mil_max", "model.prior=true", "model.width=null"]])
def test_prior_is_off_where_no_name_is_shared(run_config: Config, caplog: pytest.LogCaptureFixture, model: list[str]):
    """The fake detector's class is ``cell``, which is no label and has no similar word."""
    with caplog.at_level(logging.INFO):
        run.train(run_config(*model, "trainer.max_epochs=1"))
    lines = [record.getMessage() for record in caplog.records if "prior is off" in record.getMessage()]
    assert lines == [
        "The prior is off: no label has the name of a class of the detector grid (cell), or a similar one."
    ]


def test_paper_settings_compute_no_tables(run_config: Config, caplog: pytest.LogCaptureFixture) -> None:
    config = run_config()
    module, graph, words = build_module(config, build.build_dataset(config, "train"), Quadrants())
    assert graph.class_labels is graph.label_counts is words is None
    assert "class_labels" not in module.metadata.graph
    assert "prior" not in caplog.text


def test_counts_include_difficult_labels() -> None:
    class Dataset:
        labels = ("mug", "lemon", "sky")
        targets = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
        difficult = np.array([[0, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=bool)

    vectors = torch.eye(3)
    tables = build.prior_tables(Dataset(), Quadrants(), vectors, None)  # type: ignore[arg-type]
    assert tables == {"class_labels": [[0], [], [], [1]], "label_counts": [2, 3, 0]}
    words = torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]])
    by_words = build.prior_tables(Dataset(), Quadrants(), vectors, words)  # type: ignore[arg-type]
    assert by_words["class_labels"] == [[0], [], [2], [1]]


def test_repeated_and_unknown_classes_have_vectors(run_config: Config) -> None:
    config = run_config()
    vectors = build.class_vectors(config, ["mug", "lemon", "mug"])
    assert vectors is not None
    assert vectors.shape == (3, 300)
    assert torch.equal(vectors[0], vectors[2])
    assert build.class_vectors(config, []) is None


# Training


def test_statistics_of_the_features_are_in_checkpoints(run_config: Config, tmp_path: Path) -> None:
    run.train(run_config("model.components=4", "trainer.max_epochs=1"))
    _, content = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    mean = content["state_dict"]["model.head.standardize.mean"]
    assert mean.shape == (9,)
    assert mean.any()
    assert content["state_dict"]["model.head.standardize.axes"].shape == (4, 9)


def test_penalty_is_added_to_the_loss(run_config: Config) -> None:
    """Divided by images and labels, and not to the logged loss."""
    config = run_config("model.linear=true", "model.ridge=500")
    dataset = build.build_dataset(config, "train")
    module, _, _ = build_module(config, dataset, Quadrants())
    assert module.num_images == 24
    linear = module.model.head.linear  # type: ignore[union-attr]
    with torch.no_grad():
        linear.instance.weight.fill_(0.5)
    graph = AssignmentGraph(
        torch.randn(22, 300), class_labels=torch.zeros(4, 22).bool(), label_counts=torch.zeros(22), m=4
    )

    batch = collate_instances(
        Quadrants()([to_tensor(dataset.image(i)) for i in range(3)], 4), graph, y=torch.zeros(3, 22).long()
    )
    module.log = lambda *args, **options: None  # type: ignore[method-assign]
    module._watch = lambda *args: None  # type: ignore[method-assign]
    loss = module.training_step(batch, 0)
    squares = linear.SCALE**2 * 0.25 * linear.instance.weight.numel()
    assert float(loss.detach()) == pytest.approx(
        float(module.train_loss.compute()) + 250 * squares / (24 * 22), rel=1e-5
    )


@pytest.mark.parametrize(
    ("images", "batch_size", "world_size", "min_steps", "expected"),
    [
        (24, 8, 1, 0, 1), (24, 8, 1, 6, 1), (24, 8, 1, 7, 2), (24, 8, 1, 100, 17), (25, 8, 1, 8, 1), (25, 8, 1, 9, 2),
        (3, 8, 1, 5, 6), (25, 8, 2, 9, 3), (24, 8, 4, 10, 6),
    ],
)  # fmt: skip
def test_passes_of_the_smallest_number_of_steps(
    run_config: Config, images: int, batch_size: int, world_size: int, min_steps: int, expected: int
) -> None:
    """In each of 2 epochs, images are repeated until there are ``min_steps`` steps."""
    config = run_config(f"trainer.min_steps={min_steps}", f"trainer.batch_size={batch_size}")
    passes = build.passes(config, images, world_size)
    steps = [math.ceil(math.ceil(n * images / world_size) / batch_size) for n in (passes - 1, passes)]
    assert passes == expected
    assert 2 * steps[1] >= min_steps
    assert passes == 1 or 2 * steps[0] < min_steps


def test_run_has_the_smallest_number_of_steps(run_config: Config, tmp_path: Path) -> None:
    config = run_config("trainer.min_steps=7")
    run.train(config)
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        assert [(row["epoch"], row["step"]) for row in csv.DictReader(file)] == [("1", "6"), ("2", "12")]
    (tmp_path / "run/metrics.json").unlink()
    run.train(config)  # finished, so nothing is trained
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_on_line_runs_fit_features_on_validation(run_config: Config, tmp_path: Path) -> None:
    run.train(run_config("instances.online=true", "model.components=4", "trainer.max_epochs=1", *PRIOR))
    _, content = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert content["state_dict"]["model.head.standardize.mean"].any()


@pytest.mark.parametrize("model", ["gm_mlic", "mil_max"])
def test_features_are_fitted_on_the_instances_that_are_trained(model: str) -> None:
    """The first m of each image; padding and unreadable images do not count."""
    rng = np.random.default_rng(0)

    class Store:
        features = rng.normal(size=(6, 2, 5, 3)).astype(np.float16)
        counts = np.array([[5, 1], [2, 5], [1, 1], [0, 0], [4, 2], [3, 3]])
        rows = np.array([0, 1, 2, 4, 5])

    net: Any = GMMLIC(3, 2, components=2) if model == "gm_mlic" else MILMax(3, 2, components=2)
    build.fit_features(net, Store(), 3, torch.eye(2), None)  # type: ignore[arg-type]
    x = np.concatenate([Store.features[row, 0, : min(3, Store.counts[row, 0])] for row in Store.rows]).astype(float)
    np.testing.assert_allclose(net.head.standardize.mean, x.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(1 / net.head.standardize.scale, x.std(axis=0), rtol=1e-5)


# Invalid settings


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["graph.views=7"], r"graph.views=7"),
        (["graph.views=0"], r"graph.views=0"),
        (["model.pooling=mean"], r"model.pooling=mean"),
        (["model.components=0"], r"model.components=0"),
        (["model.shrinkage=-1"], r"model.shrinkage=-1"),
        (["trainer.min_steps=-1"], r"trainer.min_steps=-1"),
        (
            ["detector.trainable=box_head", "instances.online=true", "model.components=8"],
            r"detector.trainable=box_head excludes model.components=8: .* Set model.components=null",
        ),
        (
            ["detector.trainable=box_head", "instances.online=true", "graph.views=2"],
            r"detector.trainable=box_head excludes graph.views=2: .* Set graph.views=1",
        ),
    ],
)
def test_invalid_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose("train", ["experiment=scenes_smoke", *overrides])
