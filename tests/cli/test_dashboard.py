from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gm_mlic.cli.compose import compose
from gm_mlic.training.tracking import _ablation

pytest.importorskip("wandb_workspaces")


def dashboard(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    return subprocess.run(
        [str(Path(sys.executable).with_name("gm-mlic")), "dashboard", *arguments],
        cwd=folder, env={**environment, "HOME": str(folder), **variables}, capture_output=True, text=True, timeout=120,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def strings(tree: Any) -> set[str]:
    """All strings in a JSON tree."""
    if isinstance(tree, dict):
        return set().union(*map(strings, tree.values()), tree.keys())
    if isinstance(tree, list):
        return set().union(*map(strings, tree))
    return {tree} if isinstance(tree, str) else set()


def test_without_a_login_the_definition_is_written(tmp_path: Path) -> None:
    done = dashboard(tmp_path, "project=mine", "out=made/here.json")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "made" / "here.json").read_text())
    assert content["project"] == "mine"
    sections = content["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == ["Training", "Sweeps", "Ablation", "Labels and photos"]
    assert [len(section["panels"]) for section in sections] == [3, 3, 2, 2]
    # The names under which training logs.
    found = strings(sections)
    for name in ("val/mAP", "train/loss", "val/loss", "val/CF1", "epoch", "test/AP", "test/photos"):
        assert name in found, name
    text = json.dumps(sections)
    for name in ("graph.value.m", "model.value.k", "model.value.fusion", "ablation.value", "test/mAP", "test/CF1"):
        assert name in text, name


@pytest.mark.slow
def test_an_unreachable_server_is_reported(tmp_path: Path) -> None:
    done = dashboard(tmp_path, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 2
    assert done.stderr.startswith("gm-mlic: error: saving the workspace at W&B failed (")
    assert len(done.stderr.strip().splitlines()) == 1


def test_offline_mode_ignores_the_login(tmp_path: Path) -> None:
    done = dashboard(tmp_path, WANDB_API_KEY="a" * 40, WANDB_MODE="offline", WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "dashboard.json").is_file()


@pytest.mark.parametrize("ablation", ["full", "no_semantic", "no_spatial", "no_matches"])
def test_runs_are_grouped_by_the_name_of_their_ablation(ablation: str) -> None:
    assert _ablation(compose("train", [f"ablation={ablation}"])) == ablation
