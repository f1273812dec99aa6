"""Multiruns as subprocesses: finished, failed and repeated jobs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from test_process import SMALL, command, environment

from gm_mlic.cli.compose import check_jobs
from gm_mlic.cli.main import run
from gm_mlic.runs import find_runs, read_jobs, read_run

SETTINGS = [*SMALL, "trainer.max_epochs=1"]


def multirun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("train", *SETTINGS, *arguments, "hydra.sweep.dir=sweep"),
        env=environment(), cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_a_failed_job_does_not_stop_the_others_and_is_run_again(tmp_path: Path):
    """Three jobs, two at a time; a file in place of its checkpoint folder makes one fail."""
    jobs = ["-m", "seed=0,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "run_dir=run-${seed}"]
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "checkpoints").write_text("in the way")
    first = multirun(tmp_path, *jobs)
    assert first.returncode != 0
    assert {run.path.name: run.state for run in find_runs([tmp_path / "sweep"])} == {
        "run-0": "finished", "run-1": "failed", "run-2": "finished"
    }  # fmt: skip
    assert read_run(tmp_path / "run-1").error
    assert "failed" in first.stdout
    assert "FutureWarning" not in first.stderr  # including the processes of the launcher
    assert len(read_jobs(tmp_path / "sweep")) == 3
    # One store per split: the first job extracts it, the others wait.
    stores = list((tmp_path / "data" / "instances" / "scenes").glob("*/manifest.json"))
    assert len(stores) == 3

    (tmp_path / "run-1" / "checkpoints").unlink()
    before = {n: (tmp_path / f"run-{n}" / "metrics.json").stat().st_mtime_ns for n in (0, 2)}
    again = multirun(tmp_path, *jobs)
    assert again.returncode == 0, again.stderr
    assert {run.state for run in find_runs([tmp_path / "sweep"])} == {"finished"}
    assert {n: (tmp_path / f"run-{n}" / "metrics.json").stat().st_mtime_ns for n in (0, 2)} == before
    assert json.loads((tmp_path / "run-1" / "state.json").read_text())["sweep"] == str(tmp_path / "sweep")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["graph.m=3,0", "run_dir=runs/${hydra:job.num}"], "graph.m=0: expected an integer of at least 1."),
        (["graph.q=1,2"], "graph.q: unknown setting. Settings of graph: "),
    ],
)
def test_invalid_jobs_are_found_before_the_first_job_starts(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(["train", *SETTINGS, "-m", *arguments, "hydra.sweep.dir=sweep"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gm-mlic: error: {message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_runs_lists_the_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    assert multirun(tmp_path, "-m", "model.k=1,2", "model.widths=null").returncode == 0
    monkeypatch.chdir(tmp_path)
    assert run(["runs"]) == 0
    listed = capsys.readouterr().out
    head, first, second = (line for line in listed.splitlines() if "model.k" in line or "finished" in line)
    assert "val mAP" in head
    assert " 1/1 " in first
    assert [line.count("│") for line in (first, second)] == [7, 7]
    assert run(["runs", "sweep"]) == 0
    (tmp_path / "nothing").mkdir()
    assert run(["runs", "nothing"]) == 2
    assert capsys.readouterr().err == "gm-mlic: error: nothing contains no runs: create one with gm-mlic train.\n"


@pytest.mark.slow
def test_jobs_through_submitit(tmp_path: Path):
    done = multirun(tmp_path, "-m", "seed=0,1", "hydra/launcher=submitit_local")
    assert done.returncode == 0, done.stderr
    assert [run.state for run in find_runs([tmp_path / "sweep"])] == ["finished", "finished"]


@pytest.mark.slow
def test_a_search_continues_its_study(tmp_path: Path):
    import optuna

    storage = f"sqlite:///{tmp_path}/runs/optuna.db"
    for trials in (2, 3):
        new = trials - (trials - 2) * 2
        done = multirun(tmp_path, "sweep=optuna", f"hydra.sweeper.n_trials={new}", "model.widths=null")
        assert done.returncode == 0, done.stderr
        (summary,) = optuna.get_all_study_summaries(storage)
        assert summary.study_name.startswith("scenes-gm_mlic-")
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        assert len(study.trials) == trials
    maps = [run.result["val"]["mAP"] for run in find_runs([tmp_path / "runs"]) if run.result]
    assert study.best_value == pytest.approx(max(maps))
    # The recorded command of a trial starts a single run.
    assert all("sweep=optuna" not in run.result["command"] for run in find_runs([tmp_path / "runs"]) if run.result)


@pytest.mark.slow
def test_a_failed_trial_does_not_stop_the_search(tmp_path: Path):
    search = ["sweep=optuna", "hydra.sweeper.n_trials=5", "hydra.sweeper.sampler.seed=0", "model.widths=null"]
    done = multirun(tmp_path, *search, "graph.m=choice(3,0)")
    errors = [job["error"] for job in read_jobs(tmp_path / "sweep")]
    failed = sum(error is not None for error in errors)
    assert (len(errors), 0 < failed < 5, done.returncode) == (5, True, 2)
    assert f"gm-mlic: error: {failed} of 5 jobs failed; the first: graph.m=0" in done.stderr.strip().splitlines()[-1]
    assert [run.state for run in find_runs([tmp_path / "sweep"])] == ["finished"] * (5 - failed)


@pytest.mark.parametrize(
    ("swept", "line"),
    [
        ("model.kk=choice(1,2)", "model.kk: unknown setting; did you mean model.k?"),
        ("graph.m=choice(0,3)", "graph.m=0: expected an integer of at least 1"),
        ("model.k=interval(1,3)", "model.k=1.0: expected an integer"),
        ("optimizer.lr=interval(-1,1)", "optimizer.lr=-1.0: expected a number"),
    ],
)
def test_a_search_is_checked_before_it_starts(
    swept: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run(["train", "sweep=optuna", swept]) == 2
    assert line in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_search_with_valid_values_is_accepted():
    check_jobs("train", ["sweep=optuna", "model.k=int(interval(1,3))", "graph.m=choice(3,5)", "seed=range(2,4)"])
