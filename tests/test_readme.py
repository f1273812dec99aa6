"""README examples and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gm_mlic import Scenes
from gm_mlic.cli.compose import compose
from gm_mlic.cli.main import COMMANDS
from gm_mlic.training.run import train

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()

EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_python_example():
    code, _ = EXAMPLES
    names: dict = {}
    exec(code, names)
    assert names["output"].logits.shape == (8, 22)
    assert names["loss"].isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in names["model"].parameters())


def test_prediction_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    small = ["dataset.sizes={train: 16, val: 8, test: 8}", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    train(compose("train", ["experiment=scenes_smoke", *small, "run_dir=runs/NAME"]))
    for i, name in enumerate(("a.jpg", "b.jpg")):
        Scenes("test", size=2).image(i).save(name)
    _, code = EXAMPLES
    exec(code, {})
    assert capsys.readouterr().out.splitlines()[-1].startswith("b.jpg [LabelPrediction(label=")


def test_every_command_is_listed():
    for command in COMMANDS:
        assert f"`gm-mlic {command}" in README


def test_links_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (Path(__file__).resolve().parents[1] / link).exists(), link
