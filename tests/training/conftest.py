"""Config of small runs with a fast detector; all other stages are real."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_detector import GridExtractor
from omegaconf import DictConfig

from gm_mlic.cli.compose import compose
from gm_mlic.training import build, run


def small_config(stores: Path, run_dir: Path, *overrides: str) -> DictConfig:
    small = [
        "experiment=scenes_smoke", "dataset.sizes={train: 24, val: 12, test: 12}", "dataset.image_size=96",
        "trainer.batch_size=8", "trainer.max_epochs=2", "trainer.accelerator=cpu", "optimizer.lr=0.01",
        f"instances.root={stores}", f"run_dir={run_dir}",
    ]  # fmt: skip
    if not any(override.startswith("model=") for override in overrides):
        small.append("model.widths=[8,8]")
    return compose("train", [*small, *overrides])


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the instance stores that runs share."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, stores: Path) -> Path:
    """Folder of a finished run with the config ``run_config()``; tests do not change it."""
    path = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "build_detector", lambda config: GridExtractor())
        run.train(small_config(stores, path))
    return path


@pytest.fixture
def finished_copy(finished: Path, tmp_path: Path) -> Path:
    """Copy of the finished run, in the run folder of ``run_config()``."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def run_config(tmp_path: Path, stores: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """Function from overrides to the config of a short run, with its folder in ``tmp_path``."""
    monkeypatch.setattr(build, "build_detector", lambda config: GridExtractor())
    return lambda *overrides: small_config(stores, tmp_path / "run", *overrides)
