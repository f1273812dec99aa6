from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler, TritonMissing

from gm_mlic.cli import commands
from gm_mlic.cli.compose import compose
from gm_mlic.cli.main import run
from gm_mlic.cli.settings import COMMANDS, summary
from gm_mlic.errors import DataError

DATASETS = ["coco2014", "custom", "nuswide", "scenes", "voc2007", "voc2012"]


@pytest.fixture(autouse=True)
def temporary_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gm-mlic"])


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.strip().splitlines()[-1]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert run(arguments) == 0
        printed = capsys.readouterr().out
        for name in COMMANDS:
            assert re.search(rf"^  {name} +{re.escape(summary(name))}$", printed, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]):
    assert run([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"gm-mlic {command}: ")
    assert "Examples:" in printed
    for line in re.findall(r"^ +(gm-mlic .*)$", printed, flags=re.MULTILINE):
        assert line.split()[1] in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_cfg_prints_the_config(command: str, capsys: pytest.CaptureFixture[str]):
    assert run([command, "--cfg", "job"]) == 0
    expected = {
        "runs": "folders:", "report": "folders:", "plan": "devices:", "dashboard": "project:", "serve": "port:",
        "export": "license:",
    }  # fmt: skip
    assert expected.get(command, "run_dir:") in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]):
    assert run(["--version"]) == 0
    assert re.fullmatch(r"gm-mlic \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["zzz"], f"unknown command 'zzz': choose from {', '.join(COMMANDS)}."),
        (
            ["train", "dataset=voc"],
            f"dataset=voc: unknown option; choose from {', '.join(DATASETS)}, or that of a plugin (plugins=[MODULE]).",
        ),
        (
            ["train", "graph.mm=3"],
            "graph.mm: unknown setting; did you mean graph.m? Settings of graph: labels_per_class, layout, m, num_l",
        ),
        (["train", "graph.m=3\r"], "'graph.m=3\\r': remove the carriage return; scripts need Unix line ends."),
        (["train", "grap.m=3"], "grap: unknown setting; did you mean graph?"),
        (["train", "seed"], "seed: settings are written as KEY=VALUE; gm-mlic train --help has examples."),
        (["predict", "a.ckpt", "a.jpg"], "a.ckpt: settings are written as KEY=VALUE; gm-mlic predict --help has exa"),
        (
            ["train", "dataset.root=a[b"],
            "Hydra cannot parse this value; if it is a text, write it in quotes: dataset.root='\"a[b\"'.",
        ),
        (
            ["train", "loss=focal loss.beta=1"],
            "loss=focal loss.beta=1: write settings as separate arguments, without q",
        ),
        (["predict", "checkpoint=x", "images=[]"], "images=[]: expected a string, or a non-empty list of strings."),
        (["train", "optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: expected a list of 2 numbers."),
        (
            ["train", "experiment=scenes", "model=ml_gcn", "ablation=no_semantic"],
            "model.edge_types: unknown setting. Settings of model (ml_gcn): p, tau, width. It is set by "
            "experiment=scenes or ablation=no_semantic: leave that out.",
        ),
        (
            ["train", "-m", "model=gm_mlic,ml_gcn", "model.k=2"],
            "model.k: unknown setting. Settings of model (ml_gcn): p, tau, width.",
        ),
        (["train-detector", "detector=onnx"], " train-detector is for Faster R-CNN of torchvision, e.g. detector=mob"),
        (["train", "-m", "seed=0,1", "graph.m=3,0"], "graph.m=0: expected an integer of at least 1."),
        (["train", "sweep=m", "model.k=0"], "model.k=0: expected an integer from 1 to 100."),
        (["train", "experimant=scenes"], "experimant: unknown setting; did you mean experiment? Settings: abl"),
        (
            ["train", "+graph.q=1"],
            "graph.q: unknown setting. Settings of graph: labels_per_class, layout, m, num_label_neighbors, num_neigh"
            "bors, views.",
        ),
        (["train", "+optimizer.momentum=0.9"], "optimizer.momentum: unknown setting"),
        (["train", "+extra=1"], "extra: unknown setting. Settings: dataset, detector, "),
        (["train", "~model.name"], "model.name is missing: set it"),
        (["train", "~model"], "model has no value: set it with model=OPTION."),
        (["serve", "checkpoint=x", "host=localhost"], "host=localhost: expected an IP address, e.g. 127.0.0.1."),
        (["export", "checkpoint=x", "out=y", "push=me"], "push=me: expected USER/NAME, or null."),
        (["dataset", "dataset=voc2007", "dataset.mirror=x.org"], "dataset.mirror=x.org: expected a URL, http://..."),
        (["train", "optimizer=adam"], "optimizer=adam: unknown option; choose from ASGD, "),
        (["train", "dataset.sizes=5"], "dataset.sizes=5: expected settings: train, val, test."),
        (["train", "dataset.sizes=null"], "dataset.sizes=null: expected settings: train, val, test."),
        (["train", "graph={q: 1}"], "graph.q: unknown setting. Settings of graph: "),
        (["train", "ablation=null"], "ablation=null: unknown option; choose from full, no_matches, "),
        (["train", "graph=5"], "graph=5: unknown option; choose from default."),
        (["train", "=5"], "=5: settings are written as KEY=VALUE."),
        (
            ["train", "graph.m=1,2"],
            "graph.m=1,2: add -m to run each of these values, or write graph.m=[1,2] for a list",
        ),
        (["train", "sweep=m,k"], "sweep=m,k: write sweep=[m,k] to run every combination of these."),
        (["train", "graph.m=${graph.q}"], "graph.m: ${graph.q} is no setting; gm-mlic train --help"),
        (["train", "graph.m=true"], "graph.m=true: expected an integer of at least 1."),
        (["train", "model.widths=[a,null]"], "model.widths=[a, null]: expected an integer of at least 1, or a list"),
        (["train", "dataset.context_pairs=9"], "dataset.context_pairs=9: expected an integer from 0 to 4."),
        (["train", "graph.m=-1"], "graph.m=-1: expected an integer of at least 1."),
        (["train", "model.k=0"], "model.k=0: expected an integer from 1 to 100."),
        (["train", "model.k=two"], "model.k=two: expected an integer from 1 to 100."),
        (
            ["train", "model.k=3", "model.widths=[8,8]"],
            "widths=[8, 8] has 2 widths, model.k=3: set one width per block.",
        ),
        (["train", "loss.beta=.nan"], "loss.beta=.nan: expected a number of at least 0."),
        (["train", "graph.m=40"], "graph.m=40 exceeds the instances per image in the store (detector.max_instances="),
        (
            ["train", "trainer.compile=true", "model.gradient_checkpointing=true"],
            "trainer.compile=true excludes model.gradient_check",
        ),
        (["train", "graph.m=0", "--cfg", "job"], "graph.m=0: expected an integer of at least 1"),
        (["train", "--cfg", "jobs"], "--cfg: expected one of job, hydra, all."),
        (["train", "graph.m=3", "--cfg"], "--cfg: expected one of job, hydra, all."),
        (["train", "-m", "--cfg", "job", "graph.m=1,2"], "-m excludes --cfg."),
        (["train", "seed=4294967296"], "seed=4294967296: expected an integer of at least 0 and below 4294967296."),
        (["train", "plugins=[../x]"], "plugins=../x: expected the name of a module, e.g. my_package.my_module."),
        (["train", "detector.trainable=all"], "detector.trainable=all excludes instances.online=false"),
        (["train", "embedding=glove"], "embedding.path has no value: set it with embedding.path=VALUE."),
        (["train", "instances.shard=4/4"], "instances.shard=4/4: expected i/n with 0 <= i < n"),
        (["eval"], "set either checkpoint=FILE, or scores=FILE and targets=FILE."),
        (["eval", "checkpoint=none.ckpt"], "none.ckpt: no such checkpoint"),
        (["demo", "dataset=coco2014"], "dataset.sizes: unknown setting. Settings of dataset (coco2014): "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_user_errors_are_reported_in_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert run(arguments) == 2
    line = last_line(capsys)
    assert line.startswith("gm-mlic: error: ")
    assert expected in line


def test_invalid_settings_write_no_files(tmp_path: Path):
    for wrong in ("graph.m=0", "+graph.q=1", "experiment=voc2007", "graph.m=40"):
        assert run(["train", wrong]) == 2
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_in_custom_configs_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_epoch: 3\n")
    assert run(["train", "--config-dir", "configs", "experiment=mine"]) == 2
    assert "trainer.max_epoch: unknown setting; did you mean trainer.max_epochs?" in last_line(capsys)


def raising(error: BaseException):
    def task(config):
        raise error

    return task


def test_errors_of_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(commands._TASKS, "train", raising(DataError("x.json:\n  broken. Fix it.")))
    assert run(["train"]) == 2
    assert last_line(capsys) == "gm-mlic: error: x.json: broken. Fix it."


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(commands._TASKS, "train", raising(OSError(28, "No space left on device", "runs/x")))
    assert run(["train"]) == 2
    assert "runs/x: the disk is full; free some space, then run the same command again" in last_line(capsys)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        MemoryError("Unable to allocate 8 TiB"),
    ],
)
def test_out_of_memory(error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(commands._TASKS, "train", raising(error))
    assert run(["train"]) == 2
    assert "out of memory: lower trainer.batch_size" in last_line(capsys)


def test_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(commands._TASKS, "train", raising(KeyboardInterrupt()))
    assert run(["train"]) == 130
    assert "run the same command again to resume" in last_line(capsys)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            InvalidCxxCompiler("g++"),
            "(InvalidCxxCompiler: Compiler: g++ is not found.): install a C++ compiler, or set",
        ),
        (InductorError(InvalidCxxCompiler(), None), "install a C++ compiler, or set"),
        (
            CppCompileError(["g++"], "no Python.h"),
            "(CppCompileError: C++ compile error): install a C++ compiler, or set",
        ),
        (InductorError(RuntimeError("Failed to find C compiler."), None), "install a C++ compiler, or set"),
        (Unsupported("Unsupported function call\n  Explanation: ..."), "(Unsupported: Unsupported function call): set"),
        (
            BackendCompilerFailed("inductor", AssertionError("wrong stride"), None),
            "torch.compile failed (AssertionError: wrong stride): set",
        ),
    ],
)
def test_compile_errors(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Only errors of the compiler advise to install one."""
    monkeypatch.setitem(commands._TASKS, "train", raising(error))
    assert run(["train"]) == 2
    assert last_line(capsys).endswith(f"{message} trainer.compile=false.")


def test_compile_errors_of_other_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(commands._TASKS, "bench", raising(TritonMissing(None)))
    assert run(["bench"]) == 2
    assert last_line(capsys).endswith(": remove compiled from bench.executions.")
    monkeypatch.setitem(commands._TASKS, "export", raising(Unsupported("Data-dependent branching")))
    assert run(["export", "checkpoint=x", "out=y"]) == 1  # export does not call torch.compile
    assert "internal error: Unsupported: Data-dependent branching" in last_line(capsys)


def test_internal_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(commands._TASKS, "train", raising(ZeroDivisionError("division by zero")))
    assert run(["train"]) == 1
    line = last_line(capsys)
    assert "internal error: ZeroDivisionError: division by zero" in line
    assert "--verbose" in line
    assert run(["train", "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_multirun_continues_after_a_failed_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    jobs = []

    def task(config):
        jobs.append((config.seed, config.run_dir))
        if config.seed == 1:
            raise DataError("seed 1 fails.")

    monkeypatch.setitem(commands._TASKS, "train", task)
    assert run(["train", "-m", "seed=0,1,2"]) == 2
    assert [seed for seed, _ in jobs] == [0, 1, 2]
    assert len({folder for _, folder in jobs}) == 3
    err = capsys.readouterr().err
    assert "job 1 (seed=1) failed: seed 1 fails." in err
    assert err.strip().splitlines()[-1] == "gm-mlic: error: seed 1 fails."


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("[dataset.root=/elsewhere,metrics.threshold=0.3]", ["dataset.root=/elsewhere", "metrics.threshold=0.3"]),
        ("[dataset.sizes={train: 1, val: 2}, model.k=1]", ["dataset.sizes={train: 1, val: 2}", "model.k=1"]),
        ("[model.widths=[8,8]]", ["model.widths=[8,8]"]),
        ("['seed=1']", ["seed=1"]),
        (r"[dataset.root=a\b]", [r"dataset.root=a\b"]),
        ("[]", []),
    ],
)  # fmt: skip
def test_lists_of_overrides_are_quoted(typed: str, parsed: list[str]):
    arguments = ["checkpoint=x/checkpoints/best.ckpt", commands._with_quotes(f"overrides={typed}", True)]
    assert list(compose("eval", arguments).overrides) == parsed


@pytest.mark.parametrize(
    ("typed", "one_run", "quoted"),
    [
        ("images=IMG (1).jpg", True, "images='IMG (1).jpg'"),
        ("labels=cat,dog's", True, r"labels='cat,dog\'s'"),
        ("images=a.jpg,b.jpg", False, "images=a.jpg,b.jpg"),  # a sweep
        ("label=7", True, "label='7'"),
        *((same, True, same) for same in ("images=a/*.jpg", "labels=[a,b c]", "labels='a,b'", "labels=null", "top=3")),
        ("seed=1,2", True, "seed=1,2"),
        ("labels=[猫,'a, b',zèbre]", True, "labels=['猫','a, b','zèbre']"),
        ("labels=[moon (full (big), round),mug]", True, "labels=['moon (full (big), round)','mug']"),
        ("dataset.root=Käse", True, "dataset.root='Käse'"),
        ("dataset.root=ä,b", False, "dataset.root=ä,b"),  # a sweep
        *((same, True, same) for same in ("dataset.root='Käse'", "model.k=(1", "--config-dir=ä", "images=")),
    ],
)  # fmt: skip
def test_names_are_quoted_if_hydra_needs_it(typed: str, one_run: bool, quoted: str):
    assert commands._with_quotes(typed, one_run) == quoted


@pytest.mark.parametrize("folders", [["runs/a"], ["a b", "c,d"], ["it's", "[x]", "back\\slash"]])
def test_positional_folders(folders: list[str]):
    arguments = commands._folders_as_setting([*folders, "--verbose", "out=x"])
    assert arguments[1:] == ["--verbose", "out=x"]
    assert list(compose("report", arguments[:1]).folders) == folders
