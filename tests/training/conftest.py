"""Config of small runs with a fast detector; all other stages are real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_detector import GridExtractor
from omegaconf import DictConfig

from gm_mlic.cli.compose import compose
from gm_mlic.training import build


@pytest.fixture
def run_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """Function from overrides to the config of a short run, with stores and run folder in ``tmp_path``."""
    monkeypatch.setattr(build, "build_detector", lambda config: GridExtractor())

    def config(*overrides: str) -> DictConfig:
        small = [
            "experiment=scenes_smoke", "dataset.sizes={train: 24, val: 12, test: 12}", "dataset.image_size=96",
            "trainer.batch_size=8", "trainer.max_epochs=2", "trainer.accelerator=cpu", "optimizer.lr=0.01",
            f"instances.root={tmp_path}/instances", f"run_dir={tmp_path}/run",
        ]  # fmt: skip
        if not any(override.startswith("model=") for override in overrides):
            small.append("model.widths=[8,8]")
        return compose("train", [*small, *overrides])

    return config
