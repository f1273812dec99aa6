"""Logging to W&B, tested with a fake module and with real offline runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig
from PIL import Image

from gm_mlic import training
from gm_mlic.errors import ConfigError
from gm_mlic.training import run

Config = Callable[..., DictConfig]


class FakeRun:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.id = arguments["id"] or "abc123"
        self.url = "https://wandb.invalid/run"
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.defined: dict[str, dict[str, Any]] = {}
        self.artifacts: list[Any] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, **options: Any) -> None:
        self.defined[name] = options

    def log(self, values: dict[str, Any]) -> None:
        assert self.exit_code is None
        self.logged.append(values)

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.artifacts.append((artifact, aliases))

    def finish(self, exit_code: int) -> None:
        assert self.exit_code is None
        self.exit_code = exit_code


class FakeWandb:
    """Fake ``wandb`` module that records calls."""

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []
        self.fails: Exception | None = None
        Error = type("Error", (Exception,), {})
        kinds = {name: type(name, (Error,), {}) for name in ("UsageError", "AuthenticationError")}
        self.errors = SimpleNamespace(Error=Error, **kinds)
        self.saw_terminal: bool | None = None

    def init(self, **arguments: Any) -> FakeRun:
        self.saw_terminal = sys.stdin.isatty()
        if self.fails is not None:
            raise self.fails
        assert all(run.exit_code is not None for run in self.runs), "a run was left open"
        self.runs.append(FakeRun(arguments))
        return self.runs[-1]

    Settings = staticmethod(lambda **options: options)
    Table = staticmethod(lambda columns, data: SimpleNamespace(columns=columns, data=data))
    Image = staticmethod(lambda image, boxes: SimpleNamespace(image=image, boxes=boxes))

    @staticmethod
    def Artifact(name: str, type: str, metadata: dict[str, Any]) -> Any:  # noqa: N802 - W&B's names
        files: list[str] = []
        return SimpleNamespace(name=name, type=type, metadata=metadata, files=files, add_file=files.append)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_logged_values_and_names(run_config: Config, wandb: FakeWandb) -> None:
    config = run_config("logger=wandb", "logger.tags=[mine]", "model.k=2")
    result = run.train(config, sweep="runs/multirun/today")
    (logged,) = wandb.runs
    arguments = logged.arguments
    assert (arguments["project"], arguments["group"], arguments["job_type"]) == ("gm-mlic", "today", "train")
    assert arguments["tags"] == ["scenes", "gm_mlic", "mine"]
    assert arguments["mode"] == "online"
    assert arguments["config"]["model"]["k"] == 2
    assert arguments["config"]["revision"] == result["revision"]
    assert logged.defined["val/mAP"] == {"step_metric": "epoch", "summary": "max"}
    assert logged.defined["val/top3/OF1"]["summary"] == "max"
    assert logged.defined["train/loss"]["summary"] == "min"
    epochs, (tables,) = logged.logged[:2], logged.logged[2:]
    assert [values["epoch"] for values in epochs] == [1, 2]
    for values in epochs:
        assert {"train/loss", "val/loss", "val/mAP", "val/CF1", "val/top3/CF1", "lr"} <= set(values)
    assert logged.summary["test/mAP"] == result["test"]["mAP"]
    assert logged.summary["test/top3/CF1"] == result["test"]["top3/CF1"]
    assert tables["test/AP"].columns == ["label", "AP"]
    assert dict(tables["test/AP"].data) == result["test"]["AP"]
    assert len(tables["test/photos"].data) == 12
    _, photo, _, _ = tables["test/photos"].data[0]
    assert isinstance(photo.image, Image.Image)
    (boxes,) = photo.boxes.values()
    assert all(0 <= v <= 1 for box in boxes["box_data"] for v in box["position"].values())
    assert {box["class_id"] for box in boxes["box_data"]} <= set(boxes["class_labels"])
    ((artifact, aliases),) = logged.artifacts
    assert (artifact.type, aliases) == ("model", ["best"])
    assert artifact.files == [f"{config.run_dir}/checkpoints/best.ckpt"]
    assert logged.exit_code == 0
    assert (Path(config.run_dir) / "metrics.csv").is_file()


def test_a_crash_closes_the_run_as_failed_and_the_next_call_resumes_it(
    run_config: Config, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config("logger=wandb")

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(run, "_test", broken)
        with pytest.raises(RuntimeError, match="broken"):
            run.train(config)
    run.train(config)
    first, second = wandb.runs
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.arguments["id"] is None
    assert second.arguments["id"] == first.id
    assert {r.arguments["resume"] for r in wandb.runs} == {"allow"}


def test_consecutive_runs(run_config: Config, wandb: FakeWandb, tmp_path: Path) -> None:
    for seed in (0, 1):
        run.train(run_config("logger=wandb", f"seed={seed}", f"run_dir={tmp_path}/{seed}"))
    assert [Path(r.arguments["dir"]).name for r in wandb.runs] == ["0", "1"]


def test_a_finished_run_is_not_opened_again(run_config: Config, wandb: FakeWandb) -> None:
    for _ in range(2):
        run.train(run_config("logger=wandb"))
    assert len(wandb.runs) == 1
    run.train(run_config("logger=wandb", "overwrite=true", "trainer.max_epochs=1"))
    assert [logged.arguments["id"] for logged in wandb.runs] == [None, None]


def test_the_logger_does_not_change_the_run_identity(run_config: Config, wandb: FakeWandb, finished_copy: Path) -> None:
    without = json.loads((finished_copy / "metrics.json").read_text())
    assert run.train(run_config("logger=wandb")) == without


@pytest.mark.parametrize(
    ("variable", "setting", "mode"),
    [("offline", "false", "offline"), ("disabled", "false", "disabled"), (None, "true", "offline")],
)
def test_wandb_modes(
    run_config: Config, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, variable: str, setting: str, mode: str
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    run.train(run_config("logger=wandb", f"logger.offline={setting}", "logger.log_model=false"))
    assert wandb.runs[0].arguments["mode"] == mode
    assert wandb.runs[0].artifacts == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "UsageError",
            "No API key configured: set WANDB_API_KEY or run `wandb login`, or set logger.offline=true",
        ),
        ("Error", r"no connection to W&B \(No API key configured\): check the network"),
    ],
)
def test_missing_login_and_network_are_reported(run_config: Config, wandb: FakeWandb, kind: str, message: str) -> None:
    wandb.fails = getattr(wandb.errors, kind)("No API key configured.\nmore")
    with pytest.raises(ConfigError, match=message):
        run.train(run_config("logger=wandb"))
    assert wandb.saw_terminal is False


def test_an_unknown_mode_is_rejected(run_config: Config, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(ConfigError, match="WANDB_MODE=sometimes: expected one of online, offline, disabled"):
        run.train(run_config("logger=wandb"))
    assert wandb.runs == []


@pytest.mark.parametrize("broken", ["log", "log_artifact", "finish"])
def test_later_wandb_errors_do_not_stop_the_run(
    run_config: Config,
    wandb: FakeWandb,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("the service is gone\nmore")

    monkeypatch.setattr(FakeRun, broken, gone)
    config = run_config("logger=wandb")
    result = run.train(config)
    assert json.loads((Path(config.run_dir) / "metrics.json").read_text()) == result
    assert json.loads((Path(config.run_dir) / "state.json").read_text())["state"] == "finished"
    assert "failed (the service is gone); the run folder has the data." in caplog.text


def test_missing_package_is_reported(run_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"W&B is not installed: pip install 'gm-mlic\[wandb\]'"):
        run.train(run_config("logger=wandb"))


#: The command line, with a shorter timeout of the first connection.
MAIN = """
import sys
from gm_mlic.cli.main import run
from gm_mlic.training import tracking
tracking._TIMEOUT_S = 5
sys.exit(run(sys.argv[1:]))
"""
SMALL = [
    "experiment=scenes_smoke", "dataset.sizes={train: 16, val: 8, test: 8}", "dataset.image_size=96",
    "trainer.max_epochs=1", "model.widths=[8,8]", "trainer.accelerator=cpu", "logger=wandb", "run_dir=run",
]  # fmt: skip


def gm_mlic(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(folder), **variables}
    return subprocess.run(
        [sys.executable, "-c", MAIN, "train", *SMALL, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_offline_run_with_real_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    done = gm_mlic(tmp_path, "logger.offline=true")
    assert done.returncode == 0, done.stderr
    assert "W&B: in run/wandb" in done.stdout + done.stderr
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    (record,) = offline.glob("*.wandb")
    assert record.stat().st_size > 1000
    assert (tmp_path / "run" / "wandb_id").read_text().strip() in record.name
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["epochs"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [{}, {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}],
    ids=["no login", "no server"],
)
def test_missing_login_and_network_with_real_wandb(tmp_path: Path, variables: dict[str, str]) -> None:
    pytest.importorskip("wandb")
    done = gm_mlic(tmp_path, **variables)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("gm-mlic: error: logger=wandb: ")
    assert last.endswith("set logger.offline=true to write to the run folder only.")
    assert "Traceback" not in done.stderr
    state = tmp_path / "run" / "state.json"
    assert not state.exists() or json.loads(state.read_text())["state"] == "failed"


def test_wandb_is_imported_lazily() -> None:
    """No module imports it at its top level."""
    for path in Path(training.__file__).parents[1].rglob("*.py"):
        lines = path.read_text().splitlines()
        assert not [line for line in lines if line.startswith(("import wandb", "from wandb"))], path
