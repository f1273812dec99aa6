from __future__ import annotations

from pathlib import Path

import pytest

from gm_mlic.cli.compose import compose
from gm_mlic.training import run as training


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a short run on a few scenes."""
    root = tmp_path_factory.mktemp("run")
    settings = [
        "experiment=scenes_smoke", "dataset.sizes={train: 16, val: 8, test: 8}", "dataset.image_size=96",
        "trainer.max_epochs=1", "model.widths=[8,8]", "trainer.accelerator=cpu", f"instances.root={root}/stores",
    ]  # fmt: skip
    training.train(compose("train", [*settings, f"run_dir={root}/run"]))
    return root / "run" / "checkpoints" / "best.ckpt"
