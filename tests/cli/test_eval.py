"""``gm-mlic eval`` of score files: output, results and rejected input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gm_mlic.cli.main import run
from gm_mlic.metrics import CONVENTIONS

LABELS = ("cat", "dog", "red bird")
N = 40


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scores of two models in VOC format: test.npz and val.npz, and other.npz with rows in another order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gm-mlic"])
    monkeypatch.setenv("COLUMNS", "80")
    rng = np.random.default_rng(0)
    for name in ("test", "val"):
        targets = rng.choice([-1, -1, 0, 1], (N, 3))
        save(name, scores=sigmoid(rng.normal(size=(N, 3)) + 2 * targets), targets=targets)
    content = np.load("test.npz")
    save("other", scores=sigmoid(rng.normal(size=(N, 3))), targets=content["targets"], order=rng.permutation(N))
    return tmp_path


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)), dtype=np.float32)


def save(name: str, order: Any = slice(None), **entries: Any) -> None:
    ids = np.array([f"{i:03}.jpg" for i in range(N)])
    content = {"ids": ids, "labels": np.array(LABELS), **entries}
    np.savez(f"{name}.npz", **{k: v if k == "labels" else np.asarray(v)[order] for k, v in content.items()})


def change(name: str, **entries: Any) -> None:
    with np.load(f"{name}.npz") as file:
        content = {key: file[key] for key in file.files}
    np.savez(f"{name}.npz", **{key: value for key, value in (content | entries).items() if value is not None})


def evaluate(*arguments: str) -> int:
    return run(["eval", "scores=test.npz", "targets=test.npz", "bootstrap=50", "target_format=voc", *arguments])


def test_all_conventions_side_by_side(capsys: pytest.CaptureFixture[str]):
    assert evaluate() == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].strip() == "test.npz: 40 images, 3 labels"
    assert next(line for line in lines if "mlgcn" in line).split() == ["%", *CONVENTIONS]
    assert "Targets are read as voc." in printed
    result = json.loads(Path("runs/eval-test/test.json").read_text())
    for row, key in (("mAP", "mAP"), ("OF1", "OF1"), ("top-3 CF1", "top3/CF1")):
        cells = next(line for line in lines if line.strip().startswith(row)).split()[-len(CONVENTIONS) :]
        assert cells == [f"{result['metrics'][convention][key]:.1f}" for convention in CONVENTIONS]
    first, last = (next(line for line in lines if end in line).split()[-6:] for end in ("95 % from", "95 % to"))
    mAP = [result["metrics"][convention]["mAP"] for convention in CONVENTIONS]
    assert all(float(a) <= value <= float(b) for a, value, b in zip(first, mAP, last, strict=True))


def test_against_another_model_and_with_fitted_thresholds(capsys: pytest.CaptureFixture[str]):
    assert evaluate("against=other.npz", "calibrate=true", "val_scores=val.npz", "val_targets=val.npz") == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for words in ("other mAP", "gain", "p  ", "fitted", "best F1 on 40 validation", "mAP over other.npz"):
        assert words in printed
    result = json.loads(Path("runs/eval-test/test.json").read_text())
    for convention in CONVENTIONS:
        assert result["difference"][convention]["interval"][0] > 0
        assert result["difference"][convention]["p"] == pytest.approx(2 / 51)
    # Reordering the rows of the other model does not change its mAP.
    assert run(["eval", "scores=other.npz", "targets=test.npz", "target_format=voc", "bootstrap=0"]) == 0
    alone = json.loads(Path("runs/eval-other/other.json").read_text())
    assert alone["metrics"] == result["against"]
    assert "95 %" not in capsys.readouterr().out


def test_labels_without_a_positive_are_named(capsys: pytest.CaptureFixture[str]):
    targets = np.load("test.npz")["targets"].copy()
    targets[:, 1] = -1
    change("test", targets=targets)
    assert evaluate() == 0
    assert "Labels without a positive, excluded from means over labels: dog (1)." in capsys.readouterr().out


def with_value(name: str, value: float) -> Any:
    values = np.load("test.npz")[name].astype(np.float32)
    values[5, 2] = value
    return values


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (lambda: {"scores": with_value("scores", np.nan)}, "bad.npz: scores contain NaN (first at row 5, label 2)"),
        (lambda: {"scores": with_value("scores", 1.25)}, "1.25], expected [0, 1]: apply a sigmoid"),
        (lambda: {"scores": with_value("scores", -1)}, "[-1, "),
        (lambda: {"scores": np.ones((N - 1, 3), np.float32), "ids": None}, "differ in shape"),
        (lambda: {"scores": np.ones((N, 2), np.float32), "labels": None}, "differ in shape"),
        (lambda: {"ids": np.array(["same.jpg"] * N)}, "the image id 'same.jpg' occurs more than once"),
        (lambda: {"labels": np.array(LABELS[::-1])}, "the order of the labels differs from test.npz (label 0 is"),
        (lambda: {"labels": np.array(["cat", "dog", "lion"])}, "label 2 is 'lion', expected 'red bird'"),
        (lambda: {"scores": None}, "bad.npz: has no 'scores' (only 'ids'"),
    ],
)
def test_bad_scores(entries: Any, expected: str, capsys: pytest.CaptureFixture[str]):
    change_to = entries()
    Path("bad.npz").write_bytes(Path("test.npz").read_bytes())
    change("bad", **change_to)
    assert run(["eval", "scores=bad.npz", "targets=test.npz", "target_format=voc"]) == 2
    assert expected in refused(capsys)
    assert evaluate("against=bad.npz") == 2
    assert expected in refused(capsys)


def test_bad_targets(capsys: pytest.CaptureFixture[str]):
    change("other", targets=with_value("targets", 3))
    assert run(["eval", "scores=test.npz", "targets=other.npz", "target_format=voc"]) == 2
    assert "other.npz: targets contain 3" in refused(capsys)
    assert evaluate("target_format=binary") == 2
    assert "test.npz: targets contain -1: pass target_format='voc'" in refused(capsys)
    change("test", targets=np.zeros((N, 3)))
    assert evaluate() == 2
    assert "test.npz: targets contain no -1" in refused(capsys)


def test_both_target_formats_give_the_same_metrics(capsys: pytest.CaptureFixture[str]):
    assert evaluate() == 0
    voc = json.loads(Path("runs/eval-test/test.json").read_text())
    targets = np.load("test.npz")["targets"]
    change("test", targets=targets == 1, difficult=targets == 0)
    assert run(["eval", "scores=test.npz", "targets=test.npz", "bootstrap=50"]) == 0
    assert "Targets are read as binary." in capsys.readouterr().out
    assert json.loads(Path("runs/eval-test/test.json").read_text()) == voc | {"target_format": "binary"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["checkpoint=best.ckpt"], "set either checkpoint=FILE, or scores=FILE and targets=FILE."),
        (["targets=null"], "targets has no value: set it with targets=FILE"),
        (["calibrate=true"], "set val_scores=FILE"),
        (["calibrate=true", "val_scores=val.npz"], "set val_targets=FILE"),
        (["val_scores=val.npz"], "val_scores=val.npz needs calibrate=true"),
        (["scores=null", "checkpoint=x.ckpt"], "targets=test.npz needs scores=FILE instead of checkpoint"),
        (["scores=nowhere.npz"], "nowhere.npz: no such file"),
        (["targets=scores.xlsx"], "scores.xlsx: unknown suffix; save targets as .npz, .csv, .pt"),
        (["bootstrap=-1"], "bootstrap=-1: expected an integer of at least 0"),
        (["bootstrap=many"], "bootstrap=many: expected an integer of at least 0"),
        (["calibrate=2"], "calibrate=2: expected true or false"),
        (["target_format=pm1"], "target_format=pm1: expected one of binary, voc"),
        (["score=x.npz"], "score: unknown setting; did you mean scores?"),
    ],
)
def test_invalid_settings(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert evaluate(*arguments) == 2
    assert expected in refused(capsys)


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The error line."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("gm-mlic: error: ")
    return lines[0]
