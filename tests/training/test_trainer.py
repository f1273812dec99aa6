"""Processes that Lightning starts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "code"), [(0, -signal.SIGKILL), (3600, 7)])
def test_other_processes_have_time_to_report_a_process_that_has_ended(grace: int, code: int):
    script = textwrap.dedent(f"""
        import os, subprocess, sys, threading, time, types
        from lightning.pytorch.strategies.launchers import subprocess_script
        from gm_mlic.training import trainer

        def sleep(seconds):
            observed.set()
            time.sleep(seconds)

        observed, trainer._GRACE, trainer.time = threading.Event(), {grace}, types.SimpleNamespace(sleep=sleep)
        ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
        subprocess_script._launch_process_observer([ended])
        observed.wait()
        time.sleep(3600 - {grace})
        os._exit(7)
    """)
    assert subprocess.run([sys.executable, "-c", script]).returncode == code


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path: Path):
    """Each image counts once, also with fitted thresholds, and one process writes and prints."""

    def gm_mlic(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "gm_mlic", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    gm_mlic(
        "train", "experiment=scenes_smoke", "dataset.sizes={train: 16, val: 31, test: 31}", "dataset.image_size=96",
        "model.widths=[8,8]", "trainer.max_epochs=1", "trainer.accelerator=cpu", "run_dir=run",
    )  # fmt: skip
    results = []
    for out, overrides in (("one", ""), ("two", "trainer.devices=2,trainer.strategy=ddp")):
        settings = ["checkpoint=run/checkpoints/best.ckpt", "calibrate=true", "bootstrap=20", f"run_dir={out}"]
        assert gm_mlic("eval", *settings, f"overrides=[{overrides}]").count("test split of scenes") == 1
        results.append(json.loads((tmp_path / out / "test.json").read_text()))
    one, two = results
    for key in ("metrics", "calibrated"):
        for name in ("mAP", "CF1", "OF1"):
            assert two[key][name] == pytest.approx(one[key][name], abs=1e-6)
    assert two["intervals"]["mlgcn"] == pytest.approx(one["intervals"]["mlgcn"], abs=1e-6)
