"""Custom configs cannot run code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gm_mlic.cli.compose import compose
from gm_mlic.cli.config_security import LOGGING, TARGETS, check_arguments
from gm_mlic.cli.main import run
from gm_mlic.errors import ConfigError

HOSTILE = {
    "a callback": "hydra:\n  callbacks:\n    x:\n      _target_: os.mkdir\n      path: {pwned}\n",
    "a launcher": "hydra:\n  launcher:\n    _target_: subprocess.run\n    args: [touch, {pwned}]\n",
    "a dotted key": "hydra.launcher._target_: os.system\n",
    "a name put together": "a: os.\nhydra:\n  callbacks:\n    x: {{_target_: '${{a}}mkdir', path: {pwned}}}\n",
    "an escaped key": 'hydra: {{callbacks: {{x: {{"_targ\\x65t_": os.mkdir, path: {pwned}}}}}}}\n',
    "a mapping in a text": 'hydra:\n  callbacks: ${{oc.create:"{{x: {{_target_: os.mkdir}}}}"}}\n',
    "a log handler": "hydra:\n  job_logging:\n    handlers:\n      x: {{class: os.mkdir, path: {pwned}}}\n",
    "a log factory": "hydra:\n  job_logging:\n    handlers:\n      x: {{(): os.mkdir, path: {pwned}}}\n",
    "a log stream": "hydra:\n  job_logging:\n    handlers:\n      console: {{stream: ext://antigravity}}\n",
    "a log file": "hydra:\n  job_logging:\n    handlers:\n      file: {{filename: {pwned}}}\n",
    "the environment": "hydra:\n  job:\n    env_set: {{LD_PRELOAD: {pwned}}}\n",
    "a shell script": "hydra:\n  launcher:\n    setup: [touch {pwned}]\n",
    "a Python object": "x: !!python/object/apply:os.mkdir [{pwned}]\n",
    "a target that is a list": "hydra:\n  callbacks:\n    x: {{_target_: [os.mkdir]}}\n",
    "an alias of itself": "a: &a [*a]\n",
    "aliases of aliases": "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{y}: &{y} [" + ",".join([f"*{x}"] * 10) + "]\n" for x, y in zip("abcdef", "bcdefg", strict=True)),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_untrusted_config_is_refused_before_running(attack, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pwned = tmp_path / "pwned"
    folder = tmp_path / "configs" / "experiment"
    folder.mkdir(parents=True)
    (folder / "nice.yaml").write_text("# @package _global_\n" + HOSTILE[attack].format(pwned=pwned))
    assert run(["train", "--config-dir", "configs", "+experiment=nice", "trainer.max_epochs=1"]) == 2
    assert not pwned.exists()
    assert not (tmp_path / "runs").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("gm-mlic: error: configs/experiment/nice.yaml: ")


@pytest.mark.parametrize("flag", [["--config-dir", "configs"], ["--config-dir=configs"], ["-cd", "configs"]])
def test_a_custom_experiment(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: gm_mlic_small\ngraph:\n  m: 7\n"
    )
    assert run(["train", *flag, "experiment=mine", "--cfg", "job"]) == 0
    assert re.search(r"^  m: 7$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        ["hydra.callbacks.sweep_folder._target_=os.system"],
        ["+hydra.callbacks.x={_target_: os.mkdir, path: pwned}"],
        ["+hydra.callbacks.x={'_target_': 'os.mkdir'}"],
        ["hydra.job_logging.handlers.console.class=os.system"],
        ["hydra.searchpath=[file://elsewhere]"],
        ["--experimental-rerun", "config.pickle"],
        ["--experimental-r=config.pickle"],
        ["--config-name", "other"],
        ["--config-path", "elsewhere"],
        ["--config-d", "elsewhere"],
        ["--config-dir", "no/such/folder"],
    ],
)
def test_forbidden_settings_and_flags(arguments, capsys):
    assert run(["train", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_all_launchers_and_samplers_are_allowed():
    for launcher in ("basic", "joblib", "submitit_local", "submitit_slurm"):
        config = compose("train", [f"hydra/launcher={launcher}"], return_hydra_config=True)
        assert config.hydra.launcher._target_ in TARGETS
        assert config.hydra.callbacks.sweep_folder._target_ in TARGETS
        for handler in config.hydra.job_logging.handlers.values():
            assert handler["class"] in LOGGING
    for sampler in ("cmaes", "grid", "motpe", "nsgaii", "random", "tpe"):
        config = compose("train", ["sweep=optuna", f"hydra/sweeper/sampler={sampler}"], return_hydra_config=True)
        assert {config.hydra.sweeper._target_, config.hydra.sweeper.sampler._target_} <= TARGETS


def test_ordinary_command_lines_are_allowed():
    check_arguments([])
    check_arguments(["-m", "seed=0,1", "model.widths=[8,8]", "+x='a=b'", "~experiment", "--cfg", "job"])
    check_arguments(["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load cuda]"])


def test_invalid_yaml_is_reported(tmp_path: Path):
    (tmp_path / "bad.yaml").write_bytes(b"a: [\xff\x00")
    with pytest.raises(ConfigError, match=r"bad.yaml: not readable YAML"):
        check_arguments(["--config-dir", str(tmp_path)])
