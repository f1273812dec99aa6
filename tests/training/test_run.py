from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from omegaconf import DictConfig
from PIL import Image
from torch_geometric.data import Batch

from gm_mlic.cli.compose import compose
from gm_mlic.datasets import Scenes
from gm_mlic.errors import ConfigError, StoreError, Terminated, UnreadableImage, WeightsError
from gm_mlic.graphs import AssignmentBatch, AssignmentGraphDataset
from gm_mlic.instances import InstanceStore
from gm_mlic.metrics import MultiLabelMetrics, evaluate_scores, get_convention, read_scored_images
from gm_mlic.nn import GMMLIC
from gm_mlic.runs import read_run
from gm_mlic.training import build, callbacks, run
from gm_mlic.training.data import EpochSampler
from gm_mlic.training.module import MLICModule
from gm_mlic.training.preemption import position
from gm_mlic.zoo import load_weights, read_checkpoint

Config = Callable[..., DictConfig]


class StopError(Exception):
    pass


class StopAt(Callback):
    """Callback that ends a run within an epoch without saving, like a kill."""

    def __init__(self, epoch: int, step: int) -> None:
        self.at = (epoch, step)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int) -> None:
        if (trainer.current_epoch, i) == self.at:
            raise StopError


class SendAt(Callback):
    """Callback that sends a signal to this process, within an epoch or its validation."""

    def __init__(self, number: signal.Signals, epoch: int, *, validating: bool = False) -> None:
        self.number, self.epoch, self.validating = number, epoch, validating

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
        if (trainer.current_epoch, i) == (self.epoch, 1) and not self.validating:
            os.kill(os.getpid(), self.number)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == self.epoch and self.validating:
            os.kill(os.getpid(), self.number)


def stop_and_resume(config: DictConfig, monkeypatch: pytest.MonkeyPatch, epoch: int) -> dict[str, Any]:
    """Train, stop within ``epoch`` (from 0), and resume."""
    callbacks = run.training_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(run, "training_callbacks", lambda c, d: [*callbacks(c, d), StopAt(epoch, 1)])
        with pytest.raises(StopError):
            run.train(config)
    return run.train(config)


def checkpoint(run_dir: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def result_of(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return content


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def test_contents_of_the_run_folder(run_config: Config, tmp_path: Path):
    result = run.train(run_config())
    folder = tmp_path / "run"
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "metrics.csv", "metrics.json", "config.yaml"):
        assert (folder / name).is_file()
    assert json.loads((folder / "metrics.json").read_text()) == result
    assert [row["epoch"] for row in rows(folder)] == ["1", "2"]
    assert {"train/loss", "val/loss", "val/mAP", "val/CF1", "val/top3/CF1", "lr"} <= set(rows(folder)[0])
    best = max(rows(folder), key=lambda row: float(row["val/mAP"]))
    assert result["best_epoch"] == int(best["epoch"])
    # provenance
    assert result["command"]
    assert {"gm-mlic", "python", "torch"} <= set(result["versions"])
    for split in ("train", "val", "test"):
        store = InstanceStore.open(result["stores"][split]["path"])
        manifest = (store.path / "manifest.json").read_bytes()
        assert result["stores"][split]["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
        assert result["dataset"]["fingerprints"][split] == store.manifest.dataset_fingerprint
    assert result["val"]["mAP"] == float(best["val/mAP"])
    assert checkpoint(folder, "best")["epoch"] + 1 == result["best_epoch"]
    assert set(result["test"]["AP"]) == set(checkpoint(folder)["gm_mlic"]["labels"])
    assert result["dataset"]["sizes"] == {"train": 24, "val": 12, "test": 12}


def test_a_finished_run_is_only_repeated_with_overwrite(run_config: Config, finished_copy: Path):
    first, last = result_of(finished_copy), finished_copy / "checkpoints/last.ckpt"
    written = last.stat().st_mtime_ns
    assert run.train(run_config()) == first
    assert last.stat().st_mtime_ns == written
    (finished_copy / "diverged.json").write_text("of the earlier run")
    second = run.train(run_config("overwrite=true"))
    assert not (finished_copy / "diverged.json").exists()
    assert last.stat().st_mtime_ns > written
    assert second["test"] == first["test"]


def test_a_folder_with_another_run_is_rejected(run_config: Config, finished_copy: Path):
    with pytest.raises(ConfigError, match=r"holds a run with other settings \(graph.m=6 -> 4, seed=0 -> 3\)"):
        run.train(run_config("seed=3", "graph.m=4"))
    run.train(run_config("instances.num_workers=1"))  # not part of the run identity
    assert run.train(run_config("trainer.max_epochs=1", "seed=3", "overwrite=true"))["seed"] == 3


@pytest.mark.parametrize("overrides", [[], ["overwrite=true"]])
def test_a_folder_with_other_files_is_rejected(run_config: Config, tmp_path: Path, overrides: list[str]):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("mine: 1\n")
    with pytest.raises(ConfigError, match=r"has a file config\.yaml that is not of a run: choose another run_dir"):
        run.train(run_config(*overrides))
    assert (tmp_path / "run/config.yaml").read_text() == "mine: 1\n"


@pytest.mark.usefixtures("run_config")  # a detector without weights
def test_one_label(tmp_path: Path):
    for i in range(12):
        Image.new("RGB", (64, 48), (20 * i, 90, 200 - 10 * i)).save(tmp_path / f"{i}.jpg")
    rows = [f"{i}.jpg,{'moon' if i % 2 else ''},{('train', 'val', 'test')[i % 3]}" for i in range(12)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,labels,split", *rows]) + "\n")
    data = ["dataset=custom", f"dataset.root={tmp_path}", "detector=scenes_tiny", "embedding=hashed"]
    small = ["model.widths=[8,8]", "trainer.accelerator=cpu", "trainer.max_epochs=1", f"run_dir={tmp_path}/run"]
    result = run.train(compose("train", [*data, *small, f"instances.root={tmp_path}/stores"]))
    assert result["test"]["AP"]["moon"] == pytest.approx(result["test"]["mAP"])


def test_an_example_that_is_lost_after_extraction(
    run_config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    """The instances are in the store, so only its picture is missing."""
    image = Scenes.image

    def lost(scenes: Scenes, row: int) -> Image.Image:
        if scenes.split == "test" and row == 1:
            raise UnreadableImage("1.jpg does not exist")
        return image(scenes, row)

    monkeypatch.setattr(Scenes, "image", lost)
    run.train(run_config("trainer.max_epochs=1"))
    assert "left out of examples: 1.jpg does not exist" in caplog.text
    of = [[example["file"] for example in json.loads((path / "examples/examples.json").read_text())]
          for path in (finished, tmp_path / "run")]  # fmt: skip
    assert of[1] == [name for name in of[0] if name != "01.jpg"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adamw"],
        ["optimizer=paper", "scheduler=paper", "scheduler.step_size=1", "model=mil_max", "model.width=8"],
        ["instances.num_augmentations=3", "instances.view_size=96", "trainer.ema_decay=0.8"],
        ["graph.layout=sparse", "trainer.early_stopping=1"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_a_resumed_run_ends_with_the_same_weights(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
):
    overrides = [*overrides, "trainer.max_epochs=3"]
    whole = run.train(run_config(*overrides))
    other = tmp_path / "other"
    parts = stop_and_resume(run_config(*overrides, f"run_dir={other}"), monkeypatch, epoch=1)
    a, b = checkpoint(tmp_path / "run"), checkpoint(other)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(a[key], b[key], key)
    assert parts["test"] == whole["test"]
    assert rows(tmp_path / "run") == rows(other)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adamw"],
        ["instances.num_augmentations=3", "instances.view_size=96", "trainer.ema_decay=0.8"],
        ["graph.layout=sparse"],
        ["trainer.num_workers=1"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_killed_run_resumes_within_the_epoch(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
):
    overrides = [*overrides, "trainer.max_epochs=3", "trainer.batch_size=5"]
    other, steps = tmp_path / "other", []
    step = MLICModule.training_step

    def counted(module: MLICModule, batch: Any, i: int) -> Any:
        steps.append((module.current_epoch, i))
        return step(module, batch, i)

    monkeypatch.setattr(MLICModule, "training_step", counted)
    clock = SimpleNamespace(monotonic=lambda: 1000.0 + len(steps))  # one second for each step
    monkeypatch.setattr(callbacks, "time", clock)
    run.train(run_config(*overrides))
    steps.clear()
    stop_and_resume(
        run_config(*overrides, f"run_dir={other}", "trainer.checkpoint_every_n_minutes=0"), monkeypatch, epoch=1
    )
    assert steps == [(epoch, i) for epoch in range(3) for i in range(5)]  # no step is repeated
    a, b = checkpoint(tmp_path / "run"), checkpoint(other)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(a[key], b[key], key)
    assert rows(tmp_path / "run") == rows(other)
    with (other / "metrics.csv").open(newline="") as file:
        assert [row["seconds"] for row in csv.DictReader(file)] == ["5.000"] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("validating", [False, True])
def test_signals_save_and_stop_a_run(
    run_config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals,
    validating: bool,
):  # fmt: skip
    handler = signal.getsignal(number)
    config = run_config()
    callbacks = run.training_callbacks
    with monkeypatch.context() as patch:
        sender = SendAt(number, 1, validating=validating)
        patch.setattr(run, "training_callbacks", lambda c, d: [*callbacks(c, d), sender])
        with pytest.raises(Terminated if number == signal.SIGTERM else KeyboardInterrupt):
            run.train(config)
    assert read_run(tmp_path / "run").state == "interrupted"
    assert position(checkpoint(tmp_path / "run")) == ((2, 0) if validating else (1, 2))
    assert signal.getsignal(number) == handler
    run.train(config)
    assert_same(checkpoint(finished)["state_dict"], checkpoint(tmp_path / "run")["state_dict"])
    assert rows(finished) == rows(tmp_path / "run")


@pytest.mark.slow
def test_a_resumed_run_with_workers_sees_the_same_views(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Workers start to read before Lightning sets the sampler's epoch."""
    overrides = [
        "instances.num_augmentations=3",
        "instances.view_size=96",
        "trainer.num_workers=1",
        "trainer.max_epochs=4",
    ]
    run.train(run_config(*overrides))
    other = tmp_path / "other"
    stop_and_resume(run_config(*overrides, f"run_dir={other}"), monkeypatch, epoch=2)
    assert_same(checkpoint(tmp_path / "run")["state_dict"], checkpoint(other)["state_dict"])


def test_run_killed_before_testing_resumes_with_the_test(
    run_config: Config, finished_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = result_of(finished_copy)
    (finished_copy / "metrics.json").unlink()
    monkeypatch.setattr(MLICModule, "training_step", lambda *_: pytest.fail("trained again"))
    assert run.train(run_config()) == whole


def test_equal_seeds_give_identical_weights(run_config: Config, tmp_path: Path):
    losses = []
    for i, seed in enumerate((0, 1, 0)):
        run.train(run_config(f"seed={seed}", "trainer.max_epochs=1", f"run_dir={tmp_path}/{i}"))
        losses.append(rows(tmp_path / str(i))[0]["train/loss"])
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("overrides", [[], ["trainer.ema_decay=0.5"], ["graph.layout=sparse"]], ids=str)
def test_eval_equals_the_test_of_the_run(run_config: Config, finished: Path, tmp_path: Path, overrides: list[str]):
    result = run.train(run_config(*overrides)) if overrides else result_of(finished)
    path = (tmp_path / "run" if overrides else finished) / "checkpoints/best.ckpt"
    again = run.evaluate(path, out=tmp_path / "out", bootstrap=20)
    assert again["metrics"] == result["test"]
    assert json.loads((tmp_path / "out/test.json").read_text()) == again
    val = run.evaluate(path, split="val", bootstrap=0)
    assert val["metrics"]["mAP"] == pytest.approx(result["val"]["mAP"], abs=1e-3)


@pytest.mark.usefixtures("run_config")
def test_eval_with_thresholds_and_intervals(finished: Path):
    """The same numbers as those of the run's scores."""
    path = finished / "checkpoints/best.ckpt"
    result = run.evaluate(path, calibrate=True, bootstrap=30, seed=5)
    run_scores = read_scored_images([finished / "test.npz"], finished / "test.npz")
    expected = evaluate_scores(run_scores, conventions={"mlgcn": get_convention()}, bootstrap=30, seed=5)
    for key in ("metrics", "intervals"):
        assert result[key] == (expected[key]["mlgcn"] if key == "metrics" else expected[key])
    thresholds = torch.tensor(list(result["thresholds"].values()), dtype=torch.float64)
    metrics = MultiLabelMetrics(len(thresholds), threshold=thresholds)
    metrics.update(run_scores.scores[0], run_scores.targets)
    assert result["calibrated"]["CF1"] == float(metrics.compute()["CF1"])
    assert result["calibrated"]["mAP"] == result["metrics"]["mAP"]


@pytest.mark.usefixtures("run_config")
def test_eval_with_other_settings(finished: Path):
    path = finished / "checkpoints/best.ckpt"
    strict = run.evaluate(path, overrides=["metrics.threshold=1.0"], bootstrap=0)
    assert strict["metrics"]["CR"] == 0
    with pytest.raises(ConfigError, match=r"metrics\.treshold"):
        run.evaluate(path, overrides=["metrics.treshold=0.3"])
    with pytest.raises(ConfigError, match="split=trial"):
        run.evaluate(path, split="trial")


@pytest.mark.usefixtures("run_config")
def test_a_checkpoint_for_other_labels_is_rejected(finished_copy: Path):
    path = finished_copy / "checkpoints/best.ckpt"
    content = torch.load(path, weights_only=True)
    content["gm_mlic"]["labels"][3] = "zebra"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="its label 3 is 'zebra', the dataset's is"):
        run.evaluate(path)
    content["gm_mlic"]["labels"].pop()
    torch.save(content, path)
    with pytest.raises(WeightsError, match=r"it has \d+ labels, the dataset \d+"):
        run.evaluate(path)


def test_a_checkpoint_for_another_detector_is_rejected(
    run_config: Config, finished: Path, monkeypatch: pytest.MonkeyPatch
):
    other = build.build_detector(run_config())
    other.fingerprint = "0123456789abcdef"
    monkeypatch.setattr(build, "build_detector", lambda config: other)
    with pytest.raises(WeightsError, match=r"trained with detector grid \(\w{8}\), got grid \(01234567\)"):
        run.evaluate(finished / "checkpoints/best.ckpt")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 half a zip"], ids=["empty", "text", "broken"])
def test_other_files_are_rejected_as_checkpoints(tmp_path: Path, content: bytes):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="not a checkpoint of gm-mlic train"):
        run.evaluate(path)
    with pytest.raises(WeightsError, match="no such checkpoint"):
        run.evaluate(tmp_path / "y.ckpt")


def test_non_finite_loss_stops_the_run(run_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Bad(torch.nn.Module):
        calls = 0

        def forward(self, logits: torch.Tensor, *_: object) -> torch.Tensor:
            Bad.calls += 1
            return logits.sum() * (float("nan") if Bad.calls == 2 else 1.0)

    monkeypatch.setattr(build, "loss_of", lambda *_: Bad())
    with pytest.raises(ConfigError.__mro__[1], match=r"not finite at epoch 1, step 1: lower optimizer\.lr"):
        run.train(run_config())
    assert not (tmp_path / "run/checkpoints/last.ckpt").exists()
    record = json.loads((tmp_path / "run/diverged.json").read_text())
    order = EpochSampler(range(24), seed=0)  # type: ignore[arg-type]
    assert record["images"] == [f"train-{row:05d}" for row in list(order)[8:16]]
    assert (record["epoch"], record["step"]) == (1, 1)


def damage(path: Path, at: float) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
def test_resume_from_best_if_last_is_damaged(
    run_config: Config, finished: Path, finished_copy: Path, at: float, caplog: Any
):
    """The run resumes from the best checkpoint and ends with the same weights."""
    (finished_copy / "metrics.json").unlink()
    damage(finished_copy / "checkpoints" / "last.ckpt", at)
    assert run.train(run_config())["test"] == result_of(finished)["test"]
    assert "damaged" in caplog.text
    assert "Resuming from" in caplog.text
    assert_same(checkpoint(finished_copy)["state_dict"], checkpoint(finished)["state_dict"])


@pytest.mark.parametrize(
    "text", ["run_dir: ${oc.env:HOME}\n", "- a list\n", "a: [", "a: {b: !!python/name:os.system }"]
)
def test_a_config_that_reads_the_environment_is_refused(finished_copy: Path, text: str):
    (finished_copy / "config.yaml").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.yaml"):
        run.evaluate(finished_copy / "checkpoints/best.ckpt")


def test_a_damaged_best_checkpoint_is_rejected(finished_copy: Path):
    damage(finished_copy / "checkpoints/best.ckpt", 0.5)
    with pytest.raises(WeightsError, match=r"best\.ckpt: .*damaged"):
        run.evaluate(finished_copy / "checkpoints/best.ckpt")


def test_a_damaged_store_is_rejected(run_config: Config, tmp_path: Path):
    stores = f"instances.path={tmp_path}/stores"
    run.train(run_config(stores, "trainer.max_epochs=1"))
    damage(tmp_path / "stores/val/block-00000.safetensors", 0.7)
    with pytest.raises(StoreError, match=r"block-00000\.safetensors is damaged .*instances\.overwrite=true"):
        run.train(run_config(stores, "overwrite=true"))


def test_a_store_for_another_dataset_or_detector_is_rejected(run_config: Config, tmp_path: Path):
    stores = f"instances.path={tmp_path}/stores"
    run.train(run_config(stores, "trainer.max_epochs=1"))
    with pytest.raises(StoreError, match="m"):
        run.train(run_config(stores, f"run_dir={tmp_path}/b", "detector.max_instances=7"))
    with pytest.raises(StoreError):
        run.train(run_config(stores, f"run_dir={tmp_path}/b", "dataset.seed=5"))


def test_store_is_used_for_smaller_m(run_config: Config, tmp_path: Path):
    root = f"instances.root={tmp_path}/instances"
    run.train(run_config("graph.m=2", "trainer.max_epochs=1", root))
    stores = sorted(p.name for p in (tmp_path / "instances/scenes").iterdir())
    run.train(run_config("graph.m=6", "trainer.max_epochs=1", root, f"run_dir={tmp_path}/b"))
    assert sorted(p.name for p in (tmp_path / "instances/scenes").iterdir()) == stores


@pytest.mark.parametrize("trainable", ["none", "box_head"])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_online_detection(
    run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainable: str, layout: str
):
    monkeypatch.undo()  # the real detector
    overrides = [
        "instances.online=true", "instances.view_size=96", "detector.min_size=96", "optimizer.detector_lr=0.01",
        f"detector.trainable={trainable}", f"graph.layout={layout}",
        "dataset.sizes={train: 6, val: 3, test: 3}", "trainer.batch_size=3",
    ]  # fmt: skip
    whole = run.train(run_config(*overrides))
    again = run.evaluate(tmp_path / "run/checkpoints/best.ckpt", bootstrap=0)
    assert again["metrics"] == whole["test"]
    other = tmp_path / "other"
    stop_and_resume(run_config(*overrides, f"run_dir={other}"), monkeypatch, epoch=1)
    state = checkpoint(tmp_path / "run")["state_dict"]
    assert_same(state, checkpoint(other)["state_dict"])
    head = {k: v for k, v in state.items() if k.startswith("online.detector.") and "box_head" in k}
    fresh = build.build_detector(run_config(*overrides)).state_dict()
    changed = [k for k, v in head.items() if not torch.equal(v, fresh[k.removeprefix("online.detector.")])]
    assert bool(changed) == (trainable == "box_head")


class Weights(Callback):
    """Callback that records the weights before training and after each epoch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if not self.states:
            self.on_train_epoch_end(trainer, module)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.states.append({name: value.detach().clone() for name, value in module.model.state_dict().items()})


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_instance_graph_warmup(run_config: Config, monkeypatch: pytest.MonkeyPatch, layout: str):
    """Parameters that read the edges of the instance graph are not updated during the warmup."""
    weights, callbacks = Weights(), run.training_callbacks
    monkeypatch.setattr(run, "training_callbacks", lambda c, d: [*callbacks(c, d), weights])
    overrides = [f"graph.layout={layout}", "optimizer.weight_decay=0", "trainer.max_epochs=3"]
    run.train(run_config(*overrides, "trainer.instance_graph_warmup_epochs=2"))
    before, *after = weights.states
    spatial = {name for name in before if "spatial" in name}
    moved = [{name for name in before if not torch.equal(before[name], state[name])} for state in after]
    assert [bool(names & spatial) for names in moved] == [False, False, True]
    assert all(names - spatial for names in moved)


def test_several_nodes_need_a_launcher(run_config: Config):
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes=2: .* with torchrun or srun"):
        run.train(run_config("trainer.num_nodes=2"))


def test_more_processes_than_cores(run_config: Config):
    with pytest.raises(ConfigError, match=r"trainer\.devices=999 starts as many processes on \d+ CPU cores: set "):
        run.train(run_config("trainer.devices=999", "trainer.accelerator=cpu"))


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="MPS is available")
def test_a_missing_accelerator_is_reported(run_config: Config):
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=mps.* is not available"):
        run.train(run_config("trainer.accelerator=mps"))


@pytest.mark.slow
def test_compiled_run_gives_identical_results(run_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The eager backend of the compiler gives bit-identical results."""
    compiled = []

    def compile_(self: GMMLIC, **options: Any) -> None:
        compiled.append(self)
        torch.nn.Module.compile(self, backend="eager", **options)

    monkeypatch.setattr(GMMLIC, "compile", compile_)
    small = ["model.k=1", "model.widths=[8]", "trainer.max_epochs=1"]
    plain = run.train(run_config(*small, f"run_dir={tmp_path}/plain"))
    assert not compiled
    result = run.train(run_config(*small, "trainer.compile=true"))
    assert len(compiled) == 1
    assert_same(result["test"], plain["test"])
    assert_same(checkpoint(tmp_path / "run")["state_dict"], checkpoint(tmp_path / "plain")["state_dict"])


@pytest.mark.parametrize("tested", ["best", "last"])
def test_metrics_are_those_of_the_tested_checkpoint(tested: str, run_config: Config, finished: Path, tmp_path: Path):
    folder = tmp_path / "run" if tested == "last" else finished
    result = run.train(run_config("trainer.checkpoint=last")) if tested == "last" else result_of(finished)
    of_epochs = [float(row["val/mAP"]) for row in rows(folder)]
    assert result["val"]["mAP"] == (max(of_epochs) if tested == "best" else of_epochs[-1])
    path = folder / f"checkpoints/{tested}.ckpt"
    assert run.evaluate(path, "test", bootstrap=0)["metrics"] == result["test"]


def test_gradient_checkpointing_does_not_change_results(run_config: Config, finished: Path):
    result = run.train(run_config("model.gradient_checkpointing=true"))
    assert_same(result["test"], result_of(finished)["test"])


def test_labels_are_precomputed_once_for_each_evaluation(run_config: Config, monkeypatch: pytest.MonkeyPatch):
    computed = []
    precompute = GMMLIC.precompute_labels
    monkeypatch.setattr(GMMLIC, "precompute_labels", lambda *args: computed.append(1) or precompute(*args))
    run.train(run_config("trainer.batch_size=4"))
    # Two validations and one test, each with three batches.
    assert len(computed) == 3


def with_difficult(monkeypatch: pytest.MonkeyPatch, *, marked: bool = True) -> None:
    """Make every seventh (image, label) pair difficult, or absent without ``marked``."""
    build_plain = build.build_dataset

    def build_dataset(config: DictConfig, split: str) -> Any:
        dataset = build_plain(config, split)
        difficult = np.arange(dataset.targets.size).reshape(dataset.targets.shape) % 7 == 0
        dataset.targets = dataset.targets * ~difficult
        dataset.difficult = difficult if marked else None
        return dataset

    monkeypatch.setattr(build, "build_dataset", build_dataset)


@pytest.mark.parametrize("mode", ["graph.layout=dense", "graph.layout=sparse", "instances.online=true"])
def test_difficult_labels_reach_loss_and_metrics(
    run_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
):
    results = {}
    for name, marked in (("positive", True), ("ignore", True), ("negative", True), ("unmarked", False)):
        policy = "negative" if name == "unmarked" else name
        with monkeypatch.context() as patch:
            with_difficult(patch, marked=marked)
            config = run_config(mode, f"loss.difficult={policy}", f"run_dir={tmp_path}/{name}", "trainer.max_epochs=1")
            results[name] = run.train(config)
            dataset = build.build_dataset(config, "test")
        scored = read_scored_images([tmp_path / name / "test.npz"], tmp_path / name / "test.npz")
        np.testing.assert_array_equal(scored.targets, dataset.targets == 1)
        assert (scored.difficult is None) == (dataset.difficult is None)
        if marked:
            np.testing.assert_array_equal(scored.difficult, dataset.difficult)
        metrics = MultiLabelMetrics(len(dataset.labels))
        metrics.update(scored.scores[0], scored.targets, scored.difficult)
        assert float(metrics.compute()["mAP"]) == pytest.approx(results[name]["test"]["mAP"])
    weights = {name: checkpoint(tmp_path / name, "last")["state_dict"] for name in results}
    assert_same(weights["negative"], weights["unmarked"])
    key = next(key for key in weights["negative"] if key.endswith("weight"))
    assert not torch.equal(weights["positive"][key], weights["negative"][key])
    assert not torch.equal(weights["ignore"][key], weights["negative"][key])
    assert results["negative"]["test"]["mAP"] != results["unmarked"]["test"]["mAP"]  # AP ignores difficult pairs


def test_training_does_not_check_targets_at_every_step(run_config: Config):
    loss = build.loss_of(run_config(), torch.full((22,), 0.1))
    assert not loss.validate_args


# Artifacts


def test_state_scores_examples_and_label_states_are_saved(run_config: Config):
    config = run_config()
    result = run.train(config, sweep="a-sweep")
    path = Path(config.run_dir)
    state = json.loads((path / "state.json").read_text())
    assert (state["state"], state["sweep"], state["error"]) == ("finished", "a-sweep", None)

    scored = read_scored_images([path / "test.npz"], path / "test.npz")
    scores_of_all = scored.scores[0]
    assert scores_of_all.shape == (12, result["dataset"]["labels"])
    again = MultiLabelMetrics(scores_of_all.shape[1])
    again.update(scores_of_all, scored.targets)
    assert float(again.compute()["mAP"]) == pytest.approx(result["test"]["mAP"])

    dataset = build.build_dataset(config, "test")
    examples = json.loads((path / "examples" / "examples.json").read_text())
    assert [example["id"] for example in examples] == list(dataset.ids)
    for row, example in enumerate(examples):
        with Image.open(path / "examples" / example["file"]) as image:
            assert image.size == (example["width"], example["height"]) == (96, 96)
        present = {dataset.labels[c] for c in range(len(dataset.labels)) if dataset.targets[row, c] == 1}
        assert set(example["targets"]) == present <= {label["label"] for label in example["top"]}
        scores = [label["score"] for label in example["top"]]
        assert scores == sorted(scores, reverse=True)
        best_three = {dataset.labels[int(c)] for c in scores_of_all[row].topk(3).indices}
        assert {label["label"] for label in example["top"][:3]} == best_three
        for rank, label in enumerate(example["top"]):
            predicted = rank < 3 or label["score"] >= 0.5
            assert label["kind"] == ("missed" if not predicted else "right" if label["label"] in present else "wrong")
            # The extractor's boxes are the cells of a 3 x 3 grid.
            assert all(round(v * 3, 2) in (0, 1, 2, 3) for v in label["box"])

    with np.load(path / "label_states.npz") as states:
        assert list(states["labels"]) == list(dataset.labels)
        assert states["states"].shape == (len(dataset.labels), 8)
        assert np.isfinite(states["states"]).all()


@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_examples_are_the_same_in_both_layouts(run_config: Config, finished: Path, layout: str):
    config = run_config(f"graph.layout={layout}")
    if layout == "sparse":
        run.train(config)
    else:
        config.run_dir = str(finished)
    dataset = build.build_dataset(config, "test")
    store = build.build_store(config, dataset, build.build_detector(config))
    metadata, content = read_checkpoint(Path(config.run_dir) / "checkpoints" / "best.ckpt")
    model = metadata.build_model().eval()
    load_weights(model, content, Path("best.ckpt"))
    graph = metadata.build_graph()
    with torch.no_grad():  # single graphs in the other layout
        graphs = [Batch.from_data_list([data]) for data in AssignmentGraphDataset(store, graph)]
        if layout == "sparse":
            graphs = [AssignmentBatch.from_hetero_data(data) for data in graphs]
        outputs = [model(data) for data in graphs]
    examples = json.loads((Path(config.run_dir) / "examples" / "examples.json").read_text())
    for row, example in enumerate(examples):
        for label in example["top"]:
            c = dataset.labels.index(label["label"])
            assert label["score"] == pytest.approx(float(outputs[row].logits.sigmoid()[0, c]), abs=2e-4)
            box = store.boxes[row, 0, outputs[row].argmax_instance[0, c]]
            assert label["box"] == pytest.approx(box.tolist(), abs=1e-3)
    states = torch.cat([output.label_states for output in outputs]).mean(dim=0)
    with np.load(Path(config.run_dir) / "label_states.npz") as kept:
        assert torch.allclose(torch.from_numpy(kept["states"]), states, atol=1e-4)


def test_a_model_without_label_nodes_writes_no_label_states(run_config: Config):
    config = run_config("model=mil_max")
    run.train(config)
    assert (Path(config.run_dir) / "examples" / "examples.json").is_file()
    assert not (Path(config.run_dir) / "label_states.npz").exists()
