"""The installed command as a process: what only a process can show."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gm_mlic.cli.compose import compose
from gm_mlic.runs import read_run
from gm_mlic.training import run

SMALL = [
    "experiment=scenes_smoke", "dataset.sizes={train: 32, val: 8, test: 8}", "dataset.image_size=96",
    "model.widths=[8,8]", "trainer.batch_size=2", "trainer.accelerator=cpu",
]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("gm-mlic")), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def epochs(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row["epoch"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_train_killed_and_started_again(tmp_path: Path, number: signal.Signals):
    """Ended in the middle of training, then the same command: the weights are those of a run that was left alone."""
    folder = tmp_path / "run"
    arguments = ["train", *SMALL, "trainer.max_epochs=12", f"instances.root={tmp_path}/instances"]
    process = subprocess.Popen(
        command(*arguments, f"run_dir={folder}"), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while len(epochs(folder)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    if number != signal.SIGKILL:
        assert "continues where it stopped" in err.decode().splitlines()[-1]
        assert read_run(folder).state == "interrupted"
    done = epochs(folder)
    assert 2 <= len(done) < 12
    assert not (folder / "metrics.json").exists()

    again = subprocess.run(
        command(*arguments, f"run_dir={folder}"), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert "continuing" in again.stderr
    assert "epoch   1/12" not in again.stderr
    assert "train:" not in again.stderr  # the stores were there
    assert epochs(folder) == [str(n) for n in range(1, 13)]
    assert "mAP" in again.stdout

    torch.set_num_threads(1)
    whole = run.train(compose("train", [*arguments[1:], f"run_dir={tmp_path}/whole"]))
    assert json.loads((folder / "metrics.json").read_text())["test"] == whole["test"]
    a, b = (torch.load(p / "checkpoints/last.ckpt", weights_only=True) for p in (folder, tmp_path / "whole"))
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in b["state_dict"])


def test_exit_codes_reach_the_shell(tmp_path: Path):
    bad = subprocess.run(
        command("train", "graph.m=-1"), cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert bad.returncode == 2
    assert bad.stderr.splitlines() == ["gm-mlic: error: graph.m=-1: expected a whole number, at least 1."]


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path):
    """DDP on the CPU: one log, one table, one checkpoint, and metrics of each image counted once."""
    arguments = ["train", *SMALL, "trainer.max_epochs=2", "trainer.devices=2", "trainer.strategy=ddp", "run_dir=run"]
    done = subprocess.run(
        command(*arguments), env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test split of scenes") == 1
    assert epochs(tmp_path / "run") == ["1", "2"]
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    alone = subprocess.run(
        command("eval", "checkpoint=run/checkpoints/best.ckpt", "overrides=[trainer.devices=1,trainer.strategy=auto]"),
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    again = json.loads((tmp_path / "run" / "eval" / "test.json").read_text())
    assert again["metrics"]["mAP"] == pytest.approx(result["test"]["mAP"], abs=1e-6)
    assert again["metrics"]["CF1"] == pytest.approx(result["test"]["CF1"], abs=1e-6)
