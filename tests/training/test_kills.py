"""Repeated SIGKILL at random times: the result equals that of an uninterrupted run."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_detector import GridExtractor
from omegaconf import DictConfig, OmegaConf

from gm_mlic.instances import manifest
from gm_mlic.training import build, run

Config = Callable[..., DictConfig]
KILLS = 25


def extract(config: dict[str, Any]) -> None:
    manifest.BLOCK_IMAGES = 4  # twelve blocks
    c = OmegaConf.create(config)
    build.build_store(c, build.build_dataset(c, "train"), GridExtractor())


def train(config: dict[str, Any]) -> None:
    build.build_detector = lambda config: GridExtractor()  # type: ignore[assignment, return-value]
    run.train(OmegaConf.create(config))


@pytest.fixture(scope="module")
def clean() -> ForkServerContext:
    """Fork server that has only imported the package: processes inherit no locks, threads or signal handlers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gm_mlic.training.run"])
    return context


def killed_until_done(
    context: ForkServerContext,
    work: Callable[[dict[str, Any]], None],
    config: DictConfig,
    rng: random.Random,
    seconds: float,
) -> Iterator[int]:
    """Run ``work`` in processes killed after up to ``seconds``, until one completes; yields after each kill."""
    kills = 0
    while True:
        process = context.Process(target=work, args=(OmegaConf.to_container(config, resolve=True),))
        process.start()
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            return
        kills += 1
        if kills % 10 == 0:  # ensures termination on slow machines
            seconds *= 1.5
        yield kills


def undisturbed(context: ForkServerContext, work: Callable[[dict[str, Any]], None], config: DictConfig) -> float:
    """Run ``work`` in another process; returns its duration in seconds."""
    begin = time.perf_counter()
    process = context.Process(target=work, args=(OmegaConf.to_container(config, resolve=True),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - begin


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_extraction_killed_at_random_moments(run_config: Config, tmp_path: Path, clean: ForkServerContext):
    """All files of the store are equal byte by byte."""

    def config(name: str) -> DictConfig:
        overrides = (
            "dataset.sizes.train=48",
            "instances.num_augmentations=2",
            "instances.view_size=96",
            "instances.batch_size=4",
        )
        return run_config(*overrides, f"instances.path={tmp_path / name}")

    seconds = undisturbed(clean, extract, config("whole"))
    rng, kills, stores = random.Random(0), 0, 0
    while kills < KILLS:
        stores += 1
        for _ in killed_until_done(clean, extract, config(f"store-{stores}"), rng, seconds):
            kills += 1
        assert content(tmp_path / f"store-{stores}") == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every_n_minutes", ["0", "null"], ids=["every-step-saved", "every-epoch-saved"])
def test_training_killed_at_random_moments(
    run_config: Config, tmp_path: Path, checkpoint_every_n_minutes: str, clean: ForkServerContext
):
    """Weights are equal bit by bit."""

    def config(name: str) -> DictConfig:
        overrides = (
            "trainer.max_epochs=6",
            "trainer.batch_size=5",
            f"trainer.checkpoint_every_n_minutes={checkpoint_every_n_minutes}",
        )
        return run_config(*overrides, f"run_dir={tmp_path / name}")

    def weights(name: str) -> dict[str, torch.Tensor]:
        loaded = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        return dict(loaded["state_dict"])

    undisturbed(clean, train, config("first"))  # extracts the stores
    seconds = undisturbed(clean, train, config("whole"))
    rng, kills, runs = random.Random(1), 0, 0
    while kills < KILLS:
        runs += 1
        for _ in killed_until_done(clean, train, config(f"run-{runs}"), rng, seconds):
            kills += 1
        ours, whole = weights(f"run-{runs}"), weights("whole")
        assert all(torch.equal(ours[name], whole[name]) for name in whole)
        result = [(tmp_path / name / "metrics.json").read_text() for name in (f"run-{runs}", "whole")]
        a, b = (text[: text.index('"best_epoch"')] for text in result)
        assert a == b
