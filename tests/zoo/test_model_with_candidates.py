"""Models with label candidates: checkpoint, prediction, explanation, export and serving."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from gm_mlic import Predictor
from gm_mlic.cli import explain as cli_explain
from gm_mlic.errors import WeightsError
from gm_mlic.graphs import MATCHES
from gm_mlic.instances import InstanceStore
from gm_mlic.reporting.explanation import explanation_picture
from gm_mlic.serving import app
from gm_mlic.training import build
from gm_mlic.zoo import explain
from gm_mlic.zoo.export import export


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.load(folder / "candidates/checkpoints/best.ckpt")


def test_candidates_are_those_of_the_training_images(folder: Path, predictor: Predictor):
    """Each class has two candidates: its own label, and the label with the highest lift."""
    (path,) = (folder / "stores/scenes").glob("train-*")
    store = InstanceStore.open(path)
    present = store.targets > 0
    lists = predictor.metadata.graph["candidates"]
    assert len(lists) == len(predictor.extractor.labels)
    for d, candidates in enumerate(lists):
        strength = np.zeros(len(store.targets))
        for i in range(len(strength)):
            for j in range(min(int(store.counts[i, 0]), predictor.graph.m or 0)):
                if store.detected_labels[i, 0, j] == d:
                    strength[i] = max(strength[i], store.scores[i, 0, j])
        if not strength.any():
            assert len(candidates) == 22
            continue
        share = np.maximum(present.mean(axis=0), 1 / (2 * len(present)))
        raised = (strength @ present + share) / (strength.sum() + 1) / share
        own = store.manifest.labels.index(store.manifest.detector_labels[d])
        assert own in candidates
        raised[own] = np.inf
        assert len(candidates) == 2
        assert min(raised[candidates]) >= max(np.delete(raised, candidates)) - 1e-9


def test_match_logits_are_finite_on_edges_only(predictor: Predictor, photos: list[Path]):
    table = predictor.graph.candidates
    assert table is not None
    for photo, prediction in zip(photos, predictor(photos), strict=True):
        edges = predictor.assignment_graph(photo)["instance", "matches", "label"].edge_index
        mask = np.zeros(prediction.match_logits.shape, dtype=bool)
        mask[edges[0], edges[1]] = True
        assert not mask.all()
        np.testing.assert_array_equal(np.isfinite(prediction.match_logits), mask)
        best = prediction.match_logits.max(axis=0)
        np.testing.assert_allclose(1 / (1 + np.exp(-best)), prediction.probabilities, rtol=1e-5)


def test_sparse_and_dense_graphs_give_equal_predictions(predictor: Predictor, photos: list[Path]):
    metadata = replace(predictor.metadata, graph={**predictor.metadata.graph, "layout": "sparse"})
    model = metadata.build_model()
    model.load_state_dict(predictor.model.state_dict())
    sparse = Predictor(model, metadata, predictor.extractor)
    for ours, theirs in zip(predictor(photos), sparse(photos), strict=True):
        np.testing.assert_allclose(ours.match_logits, theirs.match_logits, atol=1e-4)
        np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-5)


def test_unseen_labels_are_candidates_of_every_class(predictor: Predictor, photos: list[Path]):
    names = predictor.metadata.labels
    other = predictor.with_labels([names[3], "zebra", names[0]])
    before, after = predictor.graph.candidates, other.graph.candidates
    assert before is not None
    assert after is not None
    assert torch.equal(after[:, [0, 2]], before[:, [3, 0]])
    assert after[:, 1].all()
    for prediction in other(photos):
        assert np.isfinite(prediction.match_logits[:, 1]).all()


def test_an_explanation_removes_existing_edges_only(predictor: Predictor, photos: list[Path]):
    for photo in photos[:4]:
        found = explain(predictor, photo)
        c = found.prediction.labels.index(found.label)
        edges = np.isfinite(found.prediction.match_logits)
        matching = [influence for influence in found.influences if influence.edge_type == MATCHES]
        assert [influence.target for influence in matching].count("label") == edges[:, c].sum() - 1
        others = edges[found.instance] & (edges.sum(axis=0) > 1)
        others[c] = False
        named = [influence.neighbor for influence in matching if influence.target == "instance"]
        assert sorted(named) == sorted(np.array(found.prediction.labels)[others])


@pytest.mark.slow
def test_network_export(predictor: Predictor, tmp_path: Path):
    """ONNX files are made from the program of ``torch.export``."""
    assert export(predictor, tmp_path / "network", "onnx") <= 1e-4


def test_invalid_candidates_are_rejected(predictor: Predictor, tmp_path: Path):
    saved = predictor.save_pretrained(tmp_path / "model")
    config = json.loads((saved / "config.json").read_text())
    for wrong in ([[22]], [["mug"]], [3], "all", [[-1]], [{}], [], {}, "", [[True]]):
        config["graph"]["candidates"] = wrong
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match="cannot be built"):
            Predictor.load(saved)
    config["graph"]["candidates"] = [[0, 1]]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="tables are for 1 classes, its detector scenes_tiny has 22"):
        Predictor.load(saved)


def test_difficult_objects_count_as_present_for_candidates():
    store = SimpleNamespace(
        rows=np.array([0, 2, 3]),  # image 1 is unreadable
        detected_labels=np.array([[[0]], [[-1]], [[0]], [[1]]], dtype=np.int32),
        scores=np.full((4, 1, 1), 0.9, dtype=np.float32),
        targets=np.array([[0, 0, 1], [1, 1, 1], [0, 0, 1], [0, 0, 1]], dtype=np.int8),
        difficult=np.array([[0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=bool),
        manifest=SimpleNamespace(detector_labels=("thing", "other"), labels=("a", "b", "c")),
    )
    assert build.learn_candidates(store, 1, 1)[0] == [1]  # type: ignore[arg-type]


def test_absent_edges_are_null_in_json(predictor: Predictor, photos: list[Path], tmp_path: Path):
    """Outputs of ``gm-mlic serve`` and ``gm-mlic explain`` are valid JSON with null for absent edges."""
    (prediction,) = predictor(photos[:1])
    edges = np.isfinite(prediction.match_logits)
    served = json.loads(json.dumps(app.as_dict(prediction), allow_nan=False))
    order = [prediction.labels.index(label) for label in served["labels"]]
    assert [[p is not None for p in row] for row in served["match_probabilities"]] == edges[:, order].tolist()
    found = explain(predictor, photos[0])
    written = json.loads(json.dumps(cli_explain.as_dict(found, "0.png"), allow_nan=False))
    assert [[v is not None for v in row] for row in written["match_logits"]] == edges.tolist()
    explanation_picture(found, Image.open(photos[0]), tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").width > 1000
