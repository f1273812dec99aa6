from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gm_mlic.cli.demo import detector_scores, example_labels
from gm_mlic.cli.main import run


def test_detector_scores_against_a_loop():
    rng = np.random.default_rng(0)
    labels, detector_labels = ("cat", "dog", "bird"), ("dog", "lamp", "cat")
    detected = rng.integers(-1, 3, (5, 2, 4))
    confidences = rng.random((5, 2, 4)).astype(np.float32)
    manifest = SimpleNamespace(labels=labels, detector_labels=detector_labels)
    arrays = {"detected_labels": detected, "scores": confidences, "counts": np.full((5, 2), 4)}
    store = SimpleNamespace(manifest=manifest, **arrays)
    found = detector_scores(store)
    for i in range(5):
        for c, name in enumerate(labels):
            matching = [
                confidences[i, 0, k]
                for k in range(4)
                if detected[i, 0, k] >= 0 and detector_labels[detected[i, 0, k]] == name
            ]
            assert found[i, c] == (max(matching) if matching else 0)


def test_labels_of_the_picture():
    box = [0.0, 0.0, 0.5, 0.5]
    scores = {"bird": 0.9, "dog": 0.5, "cat": 0.4, "fish": 0.1}
    top = [{"label": name, "score": score, "box": box, "kind": "wrong"} for name, score in scores.items()]
    found = example_labels({"top": top, "targets": ["cat", "dog"]}, dict.fromkeys(scores, 0.5))
    assert [(x.name, x.kind) for x in found] == [("bird", "wrong"), ("dog", "right"), ("cat", "missed")]


def test_a_small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gm-mlic"])
    small = [
        "dataset.sizes={train: 24, val: 8, test: 10}", "trainer.max_epochs=1", "trainer.batch_size=8",
        "model.widths=[8,8]", "trainer.accelerator=cpu", "run_dir=demo",
    ]  # fmt: skip
    assert run(["demo", *small]) == 0
    printed = capsys.readouterr().out
    rows = ["upper bound", "detector's own labels", "max-pooled, no graphs", "GM-MLIC, concat", "GM-MLIC, product"]
    results = json.loads((tmp_path / "demo/results.json").read_text())
    assert list(results) == rows
    for name in rows:
        assert name in printed
        assert 0 <= results[name]["mAP"] <= 100
    assert results["upper bound"]["mAP"] >= results["max-pooled, no graphs"]["mAP"]
    assert (tmp_path / "demo/scenes.png").read_bytes().startswith(b"\x89PNG")
    assert "run folder: demo" in printed
    assert "demo/scenes.png" in printed
    kinds = [json.loads((tmp_path / f"demo/{row}/metrics.json").read_text())["model"] for row in ("concat", "product")]
    assert [model["fusion"] for model in kinds] == ["concat", "product"]

    assert run(["demo", *small]) == 0  # nothing is trained again
    again = capsys.readouterr()
    assert again.err.count("already finished") == 3
    assert json.loads((tmp_path / "demo/results.json").read_text()) == results
