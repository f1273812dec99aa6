"""A model that starts from the detector's labels: run, checkpoint, prediction, explanation, export, other labels."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gm_mlic import Predictor, Scenes
from gm_mlic.cli.compose import compose
from gm_mlic.datasets.images import read_image, to_tensor
from gm_mlic.detection import MultiViewExtractor
from gm_mlic.errors import ConfigError, WeightsError
from gm_mlic.graphs import MATCHES, collate_instances
from gm_mlic.instances import InstanceStore
from gm_mlic.metrics import read_scored_images
from gm_mlic.nn import GMMLIC
from gm_mlic.training import run
from gm_mlic.zoo import ModelMetadata, explain
from gm_mlic.zoo.export import export

SETTINGS = [
    "model.widths=[8,8]", "model.prior=true", "model.linear=true", "model.class_words=true", "model.pooling=logsumexp",
    "model.components=32", "model.shrinkage=10", "graph.views=2", "graph.m=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def result(folder: Path, small: list[str]) -> dict[str, Any]:
    overrides = [*small, *SETTINGS, f"instances.root={folder}/stores", f"run_dir={folder}/prior"]
    return run.train(compose("train", overrides))


@pytest.fixture(scope="module")
def checkpoint(folder: Path, result: dict[str, Any]) -> Path:
    return folder / "prior/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor.load(checkpoint)


def test_run_stores_its_tables(predictor: Predictor) -> None:
    """Scenes have a class for each label; counts are those of the training images."""
    graph, labels = predictor.metadata.graph, predictor.metadata.labels
    train = Scenes("train", size=32, image_size=96)
    assert tuple(train.labels) == labels
    assert graph["label_counts"] == (train.targets == 1).sum(axis=0).tolist()
    assert [[labels[c] for c in numbers] for numbers in graph["class_labels"]] == [
        [name] for name in predictor.detector.labels
    ]
    assert (graph["views"], graph["m"]) == (2, 4)


def test_statistics_are_those_of_the_training_instances(folder: Path, checkpoint: Path, predictor: Predictor) -> None:
    model = predictor.model
    assert isinstance(model, GMMLIC)
    assert model.head.standardize is not None
    assert model.head.standardize.axes is not None
    (path,) = (folder / "stores/scenes").glob("train-*")
    store = InstanceStore.open(path)
    rows = [
        store.features[i, 0, j].astype(np.float64) for i in store.rows for j in range(min(4, int(store.counts[i, 0])))
    ]
    x = np.stack(rows)
    np.testing.assert_allclose(model.head.standardize.mean.numpy(), x.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(1 / model.head.standardize.scale.numpy(), x.std(axis=0).clip(1e-6), rtol=1e-3, atol=1e-5)
    assert model.head.standardize.axes.shape == (32, 256)
    np.testing.assert_allclose(model.head.center.numpy(), predictor.metadata.label_vectors.mean(dim=0), atol=1e-6)
    names = predictor.detector.labels
    for d, name in enumerate(names):
        vector = predictor.metadata.label_vectors[predictor.metadata.labels.index(name)]
        torch.testing.assert_close(model.class_vectors[d].cpu(), vector)
    assert not model.class_vectors[len(names)].any()


def test_stores_of_evaluation_have_instances_of_all_views(folder: Path, result: dict[str, Any]) -> None:
    stores = {split: InstanceStore.open(result["stores"][split]["path"]) for split in ("train", "val", "test")}
    m = stores["train"].manifest.m
    assert [store.manifest.m for store in stores.values()] == [m, 2 * m, 2 * m]
    assert stores["test"].manifest.detector.endswith("-2_views")
    assert "views" not in stores["train"].manifest.detector


def test_predictions_are_the_scores_of_evaluation(
    folder: Path, predictor: Predictor, photos: list[Path], checkpoint: Path
) -> None:
    path = folder / "prior/test.npz"
    scored = read_scored_images([path], path)
    predictions = list(predictor(photos))
    probabilities = np.stack([p.probabilities for p in predictions])
    # Stores keep features in float16.
    np.testing.assert_allclose(probabilities, scored.scores[0], atol=5e-3)
    evaluated = run.evaluate(checkpoint, "test", bootstrap=0)
    assert evaluated["metrics"] == json.loads((folder / "prior/metrics.json").read_text())["test"]
    assert max(len(p.boxes) for p in predictions) > 4
    assert max(len(p.boxes) for p in predictions) <= 8


def test_probabilities_are_pooled_match_logits(predictor: Predictor, photos: list[Path]) -> None:
    for prediction in predictor(photos):
        # The mean over two views of the sum over instances.
        logits = np.log(np.exp(prediction.match_logits.astype(np.float64)).sum(axis=0) / 2)
        np.testing.assert_allclose(prediction.probabilities, 1 / (1 + np.exp(-logits)), rtol=1e-4)


def test_instances_are_those_of_two_views(predictor: Predictor, photos: list[Path]) -> None:
    assert isinstance(predictor.extractor, MultiViewExtractor)
    image = to_tensor(read_image(photos[0]))
    (photo,), (mirrored,) = (predictor.detector([view], 8) for view in (image, image.flip(-1)))
    scores = torch.cat([photo.scores, mirrored.scores]).sort(descending=True).values[:8]
    (found,) = predictor.extractor([image], 8)
    torch.testing.assert_close(found.scores, scores, rtol=1e-4, atol=1e-5)


def test_sparse_and_dense_graphs_give_equal_predictions(predictor: Predictor, photos: list[Path]) -> None:
    metadata = replace(predictor.metadata, graph={**predictor.metadata.graph, "layout": "sparse"})
    model = metadata.build_model()
    model.load_state_dict(predictor.model.state_dict())
    sparse = Predictor(model, metadata, predictor.detector)
    for ours, theirs in zip(predictor(photos), sparse(photos), strict=True):
        np.testing.assert_allclose(ours.match_logits, theirs.match_logits, atol=1e-4)


def test_explanation_is_the_change_without_an_edge(predictor: Predictor, photos: list[Path]) -> None:
    found = explain(predictor, photos[0])
    data = predictor.assignment_graph(photos[0])
    c = found.prediction.labels.index(found.label)
    assert found.logit == pytest.approx(float(torch.logit(torch.tensor(found.prediction.probabilities[c]))), abs=1e-3)
    influence = next(i for i in found.influences if i.edge_type == MATCHES and i.target == "label")
    source, target = data[MATCHES].edge_index
    kept = ~((source == influence.neighbor) & (target == c))
    data[MATCHES].edge_index, data[MATCHES].confidence = (
        data[MATCHES].edge_index[:, kept],
        data[MATCHES].confidence[kept],
    )
    with torch.no_grad():
        without = float(predictor.model(data).logits[0, c])
    assert influence.change == pytest.approx(found.logit - without, abs=1e-4)


@pytest.mark.slow
def test_exported_network_reads_classes_and_scores(predictor: Predictor, photos: list[Path], tmp_path: Path) -> None:
    """ONNX files are made from the program of ``torch.export``."""
    assert export(predictor, tmp_path / "network", "onnx") <= 1e-4
    images = [to_tensor(read_image(photo)) for photo in photos]
    assert predictor.graph.m is not None
    batch = collate_instances(predictor.extractor(images, predictor.graph.m), predictor.graph)
    assert batch.x.shape[1] >= 6
    inputs = {
        "features": batch.x,
        "boxes": batch.box,
        "mask": batch.mask,
        "detected_labels": batch.detected_label,
        "scores": batch.score,
    }
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(tmp_path / "network", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == list(inputs)
    logits = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    probabilities = [prediction.probabilities for prediction in predictor(photos)]
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), probabilities, atol=1e-4)


@pytest.mark.slow
def test_detector_and_network_of_several_views_are_exported_separately(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="uses 2 views of a photo"):
        export(predictor, tmp_path / "all", "torch", "all", (96, 96))
    assert export(predictor, tmp_path / "detector", "torch", "detector", (96, 96)) <= 1e-4


def test_pretrained_folder(predictor: Predictor, photos: list[Path], tmp_path: Path) -> None:
    predictor.save_pretrained(tmp_path / "model")
    loaded = Predictor.from_pretrained(tmp_path / "model")
    assert loaded.metadata.graph == predictor.metadata.graph
    for ours, theirs in zip(predictor(photos), loaded(photos), strict=True):
        np.testing.assert_allclose(ours.match_logits, theirs.match_logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("class_labels", [[22]]), ("class_labels", [3]), ("class_labels", []), ("class_labels", [[True]]),
        ("label_counts", ["1"] * 22), ("label_counts", [1] * 21), ("label_counts", [-1] * 22), ("label_counts", 3),
        ("label_counts", [True] * 22), ("views", 7), ("views", "two"),
    ],
)  # fmt: skip
def test_damaged_tables_are_rejected(predictor: Predictor, tmp_path: Path, name: str, wrong: Any) -> None:
    saved = predictor.save_pretrained(tmp_path / "model")
    config = json.loads((saved / "config.json").read_text())
    config["graph"][name] = wrong
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError):
        Predictor.load(saved)


def test_tables_of_another_detector_are_rejected(predictor: Predictor) -> None:
    graph = {**predictor.metadata.graph, "class_labels": [[0], [1]]}
    with pytest.raises(WeightsError, match="tables are for 2 classes, its detector scenes_tiny has 22"):
        Predictor(predictor.model, replace(predictor.metadata, graph=graph), predictor.detector)


def test_other_labels(predictor: Predictor, photos: list[Path]) -> None:
    """A trained label keeps its class and its count; an unseen one has no training images."""
    names, counts = predictor.metadata.labels, predictor.metadata.graph["label_counts"]
    other = predictor.with_labels([names[3], "zebra", names[0]])
    lists, detector = other.metadata.graph["class_labels"], list(predictor.detector.labels)
    assert [detector[d] for d, numbers in enumerate(lists) if 0 in numbers] == [names[3]]
    assert [detector[d] for d, numbers in enumerate(lists) if 2 in numbers] == [names[0]]
    assert other.metadata.graph["label_counts"] == [counts[3], 0, counts[0]]
    assert other.graph.label_counts is not None
    assert other.graph.label_counts.tolist() == [counts[3], np.inf, counts[0]]
    for prediction in other(photos[:2]):
        assert np.isfinite(prediction.match_logits).all()
        assert prediction.labels == (names[3], "zebra", names[0])
    same = predictor.with_labels(names)
    for ours, theirs in zip(predictor(photos[:2]), same(photos[:2]), strict=True):
        np.testing.assert_allclose(ours.match_logits, theirs.match_logits, atol=1e-6)


def test_unseen_labels_have_classes_by_word_vectors() -> None:
    """An unseen label that is a class of the detector has no training images, so it is left to the prior."""
    labels = ("dog", "car")
    metadata = ModelMetadata(
        labels=labels,
        label_vectors=torch.eye(2),
        label_source="test",
        model={"name": "gm_mlic", "prior": True},
        graph={"m": 3, "class_labels": [[0], [1]], "label_counts": [40, 10]},
        detector="d",
        detector_fingerprint="0",
        detector_settings={},
        embedding={},
    )
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, -1.0]])
    other = metadata.with_labels(("dog", "bus", "sky"), vectors, "test", [[0], [1]])
    assert other.graph["class_labels"] == [[0], [1]]
    assert other.graph["label_counts"] == [40, 0, 0]
    assert other.build_graph().label_counts.tolist() == [40, 0, np.inf]  # type: ignore[union-attr]
    none = metadata.with_labels(("sky",), vectors[:1], "test")
    assert none.graph["class_labels"] == [[], []]
    assert none.build_graph().class_labels.tolist() == [[False], [False]]  # type: ignore[union-attr]


# Detectors without classes of the labels


@pytest.mark.parametrize("settings", [["detector.grid_size=3", "detector.max_instances=9"]])
def test_prior_is_off_without_classes(
    folder: Path,
    photos: list[Path],
    small: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: list[str],
) -> None:
    """A grid of cells: one line in the log, and logits that the linear classifier and the bias alone make."""
    overrides = [*small, *SETTINGS, *settings, "graph.m=9", "model.components=8", "trainer.max_epochs=1"]
    paths = [f"instances.root={tmp_path}/stores", f"run_dir={tmp_path}/run"]
    with caplog.at_level(logging.INFO):
        run.train(compose("train", [*overrides, *paths]))
    lines = [record.getMessage() for record in caplog.records if "prior is off" in record.getMessage()]
    assert len(lines) == 1
    assert "it has no classes" in lines[0]
    predictor = Predictor.load(tmp_path / "run/checkpoints/best.ckpt")
    assert predictor.metadata.graph["class_labels"] == [[]]
    assert isinstance(predictor.model, GMMLIC)
    assert predictor.model.class_words == 0
    (prediction,) = predictor(photos[:1])
    assert np.isfinite(prediction.match_logits).all()
    graph = predictor.assignment_graph(photos[0])
    assert not graph[MATCHES].confidence.any()
    (other,) = predictor.with_labels(["zebra"])(photos[:1])
    assert other.match_logits.shape[1] == 1
    assert export(predictor, tmp_path / "network", "torch") <= 1e-4
