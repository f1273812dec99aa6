"""Runs on full and read-only disks, with real file systems."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gm_mlic.runs import read_run

ARGUMENTS = [
    "train", "experiment=scenes_smoke", "dataset.sizes={train: 32, val: 8, test: 8}", "dataset.image_size=96",
    "model.widths=[16,16]", "trainer.batch_size=8", "trainer.max_epochs=3", "trainer.accelerator=cpu",
]  # fmt: skip


def gm_mlic(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("gm-mlic")), *ARGUMENTS, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Function that mounts a file system at a path. Skips the test without permission to mount."""
    mounted: list[Path] = []

    def mount(*arguments: str, at: Path) -> Path:
        at.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *arguments, str(at)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount: {done.stderr.strip()}")
        mounted.append(at)
        return at

    yield mount
    for path in mounted[::-1]:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.slow
def test_full_disk_keeps_finished_epochs(tmp_path: Path, disk: Callable[..., Path]):
    whole = gm_mlic("run_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    size = (tmp_path / "whole" / "checkpoints" / "last.ckpt").stat().st_size
    # Space for two checkpoints, but not for a third, temporary one.
    small = disk("-t", "tmpfs", "-o", f"size={int(2.6 * size)}", "tmpfs", at=tmp_path / "small")
    full = gm_mlic("run_dir=small/run", cwd=tmp_path)
    assert full.returncode == 2
    assert full.stderr.splitlines()[-1].startswith(f"gm-mlic: error: {tmp_path}/small/run/checkpoints/")
    assert "the disk is full; free some space" in full.stderr
    assert read_run(small / "run").state in ("failed", "stopped")
    kept = torch.load(small / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert not list(small.rglob("*.ckpt.part"))

    subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
    again = gm_mlic("run_dir=small/run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming small/run after epoch 1" in again.stderr
    files = (folder / "checkpoints" / "last.ckpt" for folder in (small / "run", tmp_path / "whole"))
    a, b = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.slow
def test_a_read_only_disk(tmp_path: Path, disk: Callable[..., Path]):
    """Stores can be read from it; writing to it is reported in one line."""
    first = gm_mlic("run_dir=first", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    disk("--bind", "-o", "ro", str(tmp_path / "data"), at=tmp_path / "data")

    used = gm_mlic("run_dir=second", "optimizer.lr=0.002", cwd=tmp_path)
    assert used.returncode == 0, used.stderr
    assert "images/s" not in used.stderr  # nothing was extracted

    for change in ("dataset.seed=5", "instances.overwrite=true"):
        refused = gm_mlic("run_dir=third", change, cwd=tmp_path)
        assert refused.returncode == 2
        assert "read-only" in refused.stderr.splitlines()[-1].lower()
        assert refused.stderr.splitlines()[-1].startswith("gm-mlic: error: ")
    run = gm_mlic("run_dir=data/run", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("gm-mlic: error: ")
    assert "read-only" in run.stderr.splitlines()[-1]
