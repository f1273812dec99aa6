from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import gm_mlic.io
from gm_mlic.errors import DataError
from gm_mlic.metrics import (
    CONVENTIONS,
    MultiLabelMetrics,
    ScoredImages,
    bootstrap_map,
    evaluate_files,
    evaluate_scores,
    fit_thresholds,
    write_scored_images,
)

LABELS = ("cat", "dog", "unicorn")


def scored(seed: int, models: int = 1, labels: tuple[str, ...] | None = LABELS, N: int = 60) -> ScoredImages:
    rng = np.random.default_rng(seed)
    targets = rng.choice([-1, -1, 0, 1], (N, 3))
    targets[:, 2] = -1
    scores = [torch.sigmoid(torch.from_numpy(rng.normal(size=(N, 3)) + targets)).float() for _ in range(models)]
    present, difficult = torch.from_numpy(targets == 1), torch.from_numpy(targets == 0)
    return ScoredImages(tuple(scores), present, difficult, None, labels)


def test_results_equal_the_underlying_functions() -> None:
    images, val = scored(0, models=2), scored(1)
    result = evaluate_scores(images, val=val, bootstrap=30, seed=5)
    assert json.loads(json.dumps(result)) == result
    assert result["excluded_labels"] == ["unicorn"]
    drawn = bootstrap_map(
        images.scores, images.targets, list(CONVENTIONS.values()), 30, seed=5, difficult=images.difficult
    )
    for m, convention in enumerate(CONVENTIONS):
        for key, scores, options in (
            ("metrics", images.scores[0], {}),
            ("against", images.scores[1], {}),
            ("calibrated", images.scores[0],
             {"threshold": fit_thresholds(
                 val.scores[0], val.targets, CONVENTIONS[convention], difficult=val.difficult)}),
        ):  # fmt: skip
            metric = MultiLabelMetrics(3, convention, **options)
            metric.update(scores, images.targets, images.difficult)
            expected = metric.compute()
            got = result[key][convention]
            assert list(got["AP"]) == list(LABELS)
            assert got["AP"]["unicorn"] is None
            for name, value in expected.items():
                if name != "AP":
                    assert got[name] == value.item()
        assert result["calibrated"][convention]["mAP"] == result["metrics"][convention]["mAP"]
        low, high = np.quantile(drawn[0, m], [0.025, 0.975])
        assert result["intervals"][convention] == pytest.approx([low, high])
        difference = drawn[0, m] - drawn[1, m]
        assert result["difference"][convention]["interval"] == pytest.approx(np.quantile(difference, [0.025, 0.975]))
        assert list(result["thresholds"][convention]) == list(LABELS)


def test_model_against_itself() -> None:
    images = scored(0)
    twice = ScoredImages((images.scores[0],) * 2, images.targets, images.difficult)
    result = evaluate_scores(twice, bootstrap=20)
    for found in result["difference"].values():
        assert found == {"interval": [0.0, 0.0], "p": 1.0}
    assert list(result["metrics"]["asl"]["AP"]) == ["0", "1", "2"]


def test_no_intervals_without_bootstrap() -> None:
    result = evaluate_scores(scored(0, models=2), bootstrap=0)
    assert not {"intervals", "difference", "bootstrap"} & set(result)
    assert "against" in result


def test_different_validation_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"val_scores: the order .* from scores \(label 0 is 'dog', expected 'cat'\)"):
        evaluate_scores(scored(0), val=scored(1, labels=("dog", "cat", "unicorn")), bootstrap=0)
    fewer = ScoredImages((scored(1).scores[0][:, :2],), scored(1).targets[:, :2])
    with pytest.raises(DataError, match="val_scores have 2 labels, scores 3"):
        evaluate_scores(scored(0), val=fewer, bootstrap=0)


def test_progress_without_terminal_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(gm_mlic.io, "LOG_S", -1.0)
    with caplog.at_level("INFO", logger="gm_mlic"):
        evaluate_scores(scored(0), bootstrap=130)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"bootstrap: {done} of 130 resamples" for done in (64, 128, 130)
    ]


def test_progress_is_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(gm_mlic.io, "LOG_S", -1.0)
    evaluate_scores(scored(0), bootstrap=130)
    captured = capsys.readouterr()
    assert "130 of 130" in captured.err
    assert captured.out == ""
    assert not caplog.records


def test_files(tmp_path: Path) -> None:
    images = scored(0)
    path = tmp_path / "mine.npz"
    write_scored_images(path, images.scores[0], images.targets, [str(i) for i in range(60)], LABELS, images.difficult)
    result = evaluate_files(path, path, bootstrap=10, out=tmp_path / "out")
    assert json.loads((tmp_path / "out/mine.json").read_text()) == result
    assert {k: v for k, v in result.items() if not k.endswith("_file")} == evaluate_scores(images, bootstrap=10)


@pytest.mark.shared
def test_perfect_scores_on_voc_2007(shared_data: Path) -> None:
    content = np.load(shared_data / "labels" / "voc2007.npz")
    targets = torch.from_numpy(content["test"])
    labels = tuple(content["labels"].tolist())
    images = ScoredImages(((targets + 1).float() / 2,), targets == 1, targets == 0, None, labels)
    result = evaluate_scores(images, bootstrap=3)
    for convention, values in result["metrics"].items():
        assert values["mAP"] == pytest.approx(100), convention
        assert result["intervals"][convention] == pytest.approx([100, 100])
    # A difficult label has score 0.5: predicted, and a false positive if counted as negative.
    assert result["metrics"]["mlgcn"]["OP"] < 100 == result["metrics"]["mmpretrain"]["OP"]
