from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gm_mlic.errors import ConfigError
from gm_mlic.runs import RunFolderError, RunState, find_runs, flat_settings, read_run, varying, write_job

MakeRun = Callable[..., Path]


def test_read_run(tmp_path: Path, make_run: MakeRun):
    run = read_run(make_run(tmp_path / "a"))
    assert run.state == "finished"
    assert run.setting("graph.m") == 10
    assert run.setting("graph.nothing", 3) == 3
    assert run.setting("seed.m", 3) == 3
    assert [row["val/mAP"] for row in run.epochs] == [20, 30.5]
    assert run.result is not None
    assert run.result["test"]["mAP"] == 31


@pytest.mark.parametrize(
    ("file", "text"), [("config.yaml", "a: ["), ("config.yaml", "- 1"), ("metrics.json", "{"), ("state.json", "[]")]
)
def test_damaged_file_is_named(tmp_path: Path, make_run: MakeRun, file: str, text: str):
    path = make_run(tmp_path / "a")
    (path / file).write_text(text)
    with pytest.raises(RunFolderError, match=f"{file} is damaged: delete"):
        read_run(path)


def test_damaged_runs_are_listed_with_the_others(tmp_path: Path, make_run: MakeRun):
    for name in ("a", "b"):
        make_run(tmp_path / name)
    (tmp_path / "a" / "metrics.json").write_text("{")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "0.json").write_text("{")
    a, b = find_runs([tmp_path])
    assert (a.state, b.state) == ("damaged", "finished")
    assert "metrics.json is damaged" in str(a.error)


def test_truncated_metrics_table_is_read(tmp_path: Path, make_run: MakeRun):
    path = make_run(tmp_path / "a")
    (path / "metrics.csv").write_text("epoch,val/mAP\n1,20\n2\n")
    assert read_run(path).epochs == ({"epoch": 1, "val/mAP": 20}, {"epoch": 2})


def test_states(tmp_path: Path, make_run: MakeRun):
    path = make_run(tmp_path / "a", finished=False)
    assert read_run(path).state == "stopped"
    with RunState(path, "gm-mlic train", "sweep") as state:
        assert not (path / "state.json").exists()
        state.begin()
        assert read_run(path).state == "running"
    content = json.loads((path / "state.json").read_text())
    assert content["state"] == "finished"
    assert (content["pid"], content["command"], content["sweep"]) == (os.getpid(), "gm-mlic train", "sweep")


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ConfigError("too much\nof it"), "failed"), (KeyboardInterrupt(), "interrupted"), (ValueError(), "failed")],
)
def test_final_states(tmp_path: Path, make_run: MakeRun, error: BaseException, expected: str):
    path = make_run(tmp_path / "a", finished=False)

    def work() -> None:
        with RunState(path, "gm-mlic train") as state:
            state.begin()
            raise error

    with pytest.raises(type(error)):
        work()
    run = read_run(path)
    assert run.state == expected
    assert run.error == {"ConfigError": "too much", "ValueError": "ValueError"}.get(type(error).__name__)


def test_failure_before_begin_keeps_the_state(tmp_path: Path, make_run: MakeRun):
    path = make_run(tmp_path / "a")
    with pytest.raises(ConfigError), RunState(path, "gm-mlic train"):
        raise ConfigError("other settings")
    assert read_run(path).state == "finished"
    assert not (path / "state.json").exists()


HOLD = """
import sys, time
from pathlib import Path
from gm_mlic.runs import RunState
with RunState(Path(sys.argv[1]), "gm-mlic train") as state:
    state.begin()
    print("held", flush=True)
    time.sleep(60)
"""


def test_run_lock_and_killed_process(tmp_path: Path, make_run: MakeRun):
    path = make_run(tmp_path / "a", finished=False)
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert read_run(path).state == "running"
        with pytest.raises(RunFolderError, match=f"is in use by process {other.pid} on "):
            RunState(path, "gm-mlic train").__enter__()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert read_run(path).state == "stopped"
    with RunState(path, "gm-mlic train") as state:
        state.begin()


def test_find_runs_by_folder_and_multirun(tmp_path: Path, make_run: MakeRun):
    a, b = make_run(tmp_path / "runs" / "a"), make_run(tmp_path / "runs" / "deep" / "b")
    elsewhere = make_run(tmp_path / "elsewhere" / "c")
    (a / ".hydra").mkdir()
    (a / ".hydra" / "config.yaml").write_text("{}")
    sweep = tmp_path / "runs" / "multirun" / "now"
    write_job(sweep, 0, elsewhere, ["graph.m=5"])
    write_job(sweep, 1, tmp_path / "never-begun", ["graph.m=6"])

    def names(*paths: Path) -> list[str]:
        return [run.path.name for run in find_runs(paths)]

    assert names(a) == ["a"]
    assert sorted(names(tmp_path / "runs")) == ["a", "b", "c"]
    assert names(sweep) == ["c"]
    assert sorted(names(b, b, sweep)) == ["b", "c"]


def test_folders_without_runs_are_refused(tmp_path: Path):
    with pytest.raises(RunFolderError, match="is not a folder"):
        find_runs([tmp_path / "none"])
    with pytest.raises(RunFolderError, match="contains no runs"):
        find_runs([tmp_path])
    with pytest.raises(RunFolderError, match="is not a run folder"):
        read_run(tmp_path)


def test_varying_settings(tmp_path: Path, make_run: MakeRun):
    a = make_run(tmp_path / "a", seed=0, graph={"m": 5})
    b = make_run(tmp_path / "b", seed=1, graph={"m": 10}, trainer={"num_workers": 2})
    assert varying([read_run(a), read_run(b)]) == ["graph.m", "seed"]
    assert flat_settings(read_run(a).config) == {"seed": 0, "graph.m": 5}


def test_silent_process_writes_nothing(tmp_path: Path):
    with RunState(tmp_path, "gm-mlic train") as first, RunState(tmp_path, "gm-mlic train", silent=True) as other:
        first.begin()
        other.begin()
        state = (tmp_path / "state.json").read_text()
    assert '"running"' in state
    assert json.loads((tmp_path / "state.json").read_text())["state"] == "finished"
