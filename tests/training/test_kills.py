"""SIGKILL at random moments, again and again: what comes out in the end is what an undisturbed run gives."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from gm_mlic.training import build, run

Config = Callable[..., DictConfig]
KILLS = 25


def killed_until_done(work: Callable[[], object], rng: random.Random, seconds: float) -> Iterator[int]:
    """Do ``work`` in another process, killed after up to ``seconds``, until it gets to its end; yields at each kill."""
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return
        yield child


def duration(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_extraction_killed_at_random_moments(run_config: Config, tmp_path: Path):
    """Every file of the store, byte for byte."""

    def extract(name: str) -> None:
        overrides = ("dataset.sizes.train=96", "instances.views=2", "instances.view_size=96", "instances.batch_size=4")
        config = run_config(*overrides, f"instances.path={tmp_path / name}")
        build.build_store(config, build.build_dataset(config, "train"), build.build_detector(config))

    seconds = duration(lambda: extract("whole"))
    rng, kills, stores = random.Random(0), 0, 0
    while kills < KILLS:
        stores += 1
        for _ in killed_until_done(lambda: extract(f"store-{stores}"), rng, seconds):  # noqa: B023 - done with it here
            kills += 1
        assert content(tmp_path / f"store-{stores}") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("save_minutes", ["0", "null"], ids=["every-step-saved", "every-epoch-saved"])
def test_training_killed_at_random_moments(run_config: Config, tmp_path: Path, save_minutes: str):
    """The weights, to the last bit."""

    def train(name: str) -> None:
        overrides = ("trainer.max_epochs=6", "trainer.batch_size=5", f"trainer.save_minutes={save_minutes}")
        run.train(run_config(*overrides, f"run_dir={tmp_path / name}"))

    def weights(name: str) -> dict[str, torch.Tensor]:
        loaded = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        return dict(loaded["state_dict"])

    train("first")  # makes the stores
    seconds = duration(lambda: train("whole"))
    rng, kills, runs = random.Random(1), 0, 0
    while kills < KILLS:
        runs += 1
        for _ in killed_until_done(lambda: train(f"run-{runs}"), rng, seconds):  # noqa: B023 - done with it here
            kills += 1
        ours, whole = weights(f"run-{runs}"), weights("whole")
        assert all(torch.equal(ours[name], whole[name]) for name in whole)
        result = [(tmp_path / name / "metrics.json").read_text() for name in (f"run-{runs}", "whole")]
        a, b = (text[: text.index('"best_epoch"')] for text in result)
        assert a == b
