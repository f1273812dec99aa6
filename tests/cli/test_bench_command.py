"""``gm-mlic bench`` with small sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gm_mlic.bench import runtime
from gm_mlic.cli.main import run


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "INSTANCE_DIM", 16)
    monkeypatch.setattr(runtime, "LABEL_DIM", 8)
    monkeypatch.setitem(runtime.CURVES, "k", (1, 2))


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["cases=[voc2007]", "batch=1", "executions=[sparse,dense]", "repeats=[1,1]", "curves=[k]"]
    assert run(["bench", *(f"bench.{s}" for s in settings), "bench.growth_batch=1", "detector=scenes_tiny"]) == 0
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert {"forward_ratio", "train_ratio", "memory_ratio", "roofline_fraction"} <= set(last)
    assert "voc2007, concat (m=10, C=20, k=2, batch 1, norm all, float32)" in out
    content = json.loads(Path("runs/bench/results.json").read_text())
    assert set(content) == {"machine", "results", "summary", "curves", "shares"}
    assert round(content["summary"]["forward_ratio"], 3) == last["forward_ratio"]
    for name in ("executions.png", "growth.png", "results.md", "bench.log"):
        assert (Path("runs/bench") / name).stat().st_size > 0


@pytest.mark.parametrize(
    "setting", ["bench.cases=[imagenet]", "bench.batch=0", "bench.repeats=[3]", "bench.executions=[]", "bench=huge"]
)
def test_invalid_settings(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", setting]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gm-mlic: error: bench")
    assert error.count("\n") == 1
