"""Custom configs cannot run code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gm_mlic.cli.compose import compose
from gm_mlic.cli.config_security import check_arguments
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
    "a variable of the environment": "trainer:\n  strategy: ${{oc.env:HOME}}\n",
    "a resolver with a computed name": "a: env\ntrainer:\n  strategy: ${{oc.${{a}}:HOME}}\n",
    "a plugin": "plugins: [antigravity]\n",
    "a logging option": "defaults:\n  - override /hydra/job_logging: colorlog\n",
    "a launcher by name": "defaults:\n  - override /hydra/launcher: joblib\n",
    "a part of Hydra's section": "defaults:\n  - /sweep@hydra: k\n",
    "a part of Hydra's section as text": "defaults:\n  - /sweep/k@hydra.job\n",
    "a search path": "hydra:\n  searchpath: [file://{pwned}]\n",
    "Hydra's section as a value": "hydra: null\n",
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


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("defaults:\n  - mine\n", "a file of --config-dir includes itself"),
        ("defaults: override\n", "defaults must be a list (got str)"),
        ("seed: 1\nseed: 2\n", "found duplicate key seed"),
        ("- seed\n", "experiment/mine.yaml: expected settings, as KEY: VALUE."),
        ("trainer:\n", "trainer has no value: set it with trainer=OPTION."),
    ],
)
def test_a_damaged_config(
    content: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}")
    assert run(["train", "--config-dir", "configs", "experiment=mine"]) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


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


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("hydra/env/mine.yaml", "LD_PRELOAD: x\n"),
        ("experiment/hydra.yaml", "# @package _name_\njob: {env_set: {LD_PRELOAD: x}}\n"),
        ("experiment/mine.yaml", "# @package hydra.job\nenv_set: {LD_PRELOAD: x}\n"),
        ("experiment/mine.yaml", "# @package _global_.hydra\njob: {env_set: {LD_PRELOAD: x}}\n"),
    ],
)
def test_files_that_belong_to_hydra_are_refused(name: str, content: str, tmp_path: Path):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"{re.escape(name)}: changes Hydra, which custom configs may not"):
        check_arguments(["--config-dir", str(tmp_path)])


def test_custom_configs_may_describe_sweeps(tmp_path: Path):
    """Also in a folder called hydra."""
    folder = tmp_path / "hydra" / "sweep"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper: {params: {graph.m: '3,4', run_dir: 'x-${seed}'}}\n"
    )
    assert check_arguments(["--config-dir", str(tmp_path / "hydra")]) == [tmp_path / "hydra"]
    config = compose("train", ["sweep=mine"], [tmp_path / "hydra"], return_hydra_config=True)
    assert config.hydra.sweeper.params["graph.m"] == "3,4"


def test_launchers_and_samplers_are_chosen_by_name():
    for launcher in ("basic", "joblib", "submitit_local", "submitit_slurm"):
        config = compose("train", [f"hydra/launcher={launcher}"], return_hydra_config=True)
        assert config.hydra.launcher._target_.startswith("hydra")
    for sampler in ("cmaes", "grid", "motpe", "nsgaii", "random", "tpe"):
        config = compose("train", ["sweep=optuna", f"hydra/sweeper/sampler={sampler}"], return_hydra_config=True)
        assert config.hydra.sweeper.sampler._target_.startswith("optuna.")


def test_ordinary_command_lines_are_allowed():
    check_arguments([])
    check_arguments(["-m", "seed=0,1", "model.widths=[8,8]", "+x='a=b'", "~experiment"])
    check_arguments(["seed=0", "--cfg", "job", "--resolve"])
    check_arguments(["-m", "hydra/launcher=submitit_slurm", "hydra.launcher.setup=[module load cuda]"])


def test_invalid_yaml_is_reported(tmp_path: Path):
    (tmp_path / "bad.yaml").write_bytes(b"a: [\xff\x00")
    with pytest.raises(ConfigError, match=r"bad.yaml: not readable YAML"):
        check_arguments(["--config-dir", str(tmp_path)])
