from __future__ import annotations

from pathlib import Path

import pytest

from gm_mlic import Scenes
from gm_mlic.cli.compose import compose
from gm_mlic.training import run

SMALL = [
    "experiment=scenes_smoke", "dataset.sizes={train: 32, val: 8, test: 12}", "dataset.image_size=96",
    "trainer.batch_size=8", "trainer.max_epochs=2", "trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short runs on scenes: GM-MLIC (dense, sparse, with candidates) and the baseline ``mil_max``."""
    root = tmp_path_factory.mktemp("runs")
    for name, model in {"gm": ["model.widths=[8,8]"], "mil": ["model=mil_max"]}.items():
        run.train(compose("train", [*SMALL, *model, f"instances.root={root}/stores", f"run_dir={root}/{name}"]))
    candidates = [*SMALL, "model.widths=[8,8]", "graph.labels_per_class=2", "trainer.instance_graph_warmup_epochs=1"]
    run.train(compose("train", [*candidates, f"instances.root={root}/stores", f"run_dir={root}/candidates"]))
    sparse = [*SMALL, "model.widths=[8,8]", "graph.layout=sparse", "graph.m=4"]
    run.train(compose("train", [*sparse, f"instances.root={root}/stores", f"run_dir={root}/sparse"]))
    return root


@pytest.fixture(scope="session")
def photos(folder: Path) -> list[Path]:
    """Files of the test scenes."""
    scenes = Scenes("test", size=12, image_size=96)
    paths = [folder / f"{i:02d}.png" for i in range(12)]
    for i, path in enumerate(paths):
        scenes.image(i).save(path)
    return paths


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Settings of a run of about a second."""
    return SMALL
