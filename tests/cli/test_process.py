"""The installed command as a process: signals, exit codes, distributed runs, memory limits."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gm_mlic.cli.compose import compose
from gm_mlic.runs import read_run
from gm_mlic.training import run

SMALL = [
    "experiment=scenes_smoke", "dataset.sizes={train: 32, val: 8, test: 8}", "dataset.image_size=96",
    "model.widths=[8,8]", "trainer.batch_size=2", "trainer.accelerator=cpu",
]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("gm-mlic")), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def epochs(run_dir: Path) -> list[str]:
    path = run_dir / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row["epoch"] for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    settings = [*SMALL, "trainer.max_epochs=12", f"instances.root={folder}/instances", f"run_dir={folder}/run"]
    run.train(compose("train", settings))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_training_resumes(tmp_path: Path, number: signal.Signals, whole: Path):
    """A run that is interrupted and resumed ends with the weights of an uninterrupted run."""
    folder = tmp_path / "run"
    arguments = ["train", *SMALL, "trainer.max_epochs=12", f"instances.root={tmp_path}/instances"]
    process = subprocess.Popen(
        command(*arguments, f"run_dir={folder}"), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 400
    while len(epochs(folder)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    if number != signal.SIGKILL:
        assert "run the same command again to resume" in err.decode().splitlines()[-1]
        assert read_run(folder).state == "interrupted"
    done = epochs(folder)
    assert 2 <= len(done) < 12
    assert not (folder / "metrics.json").exists()

    again = subprocess.run(
        command(*arguments, f"run_dir={folder}"), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr
    assert "epoch   1/12" not in again.stderr
    assert "train:" not in again.stderr  # the stores are not extracted again
    assert epochs(folder) == [str(n) for n in range(1, 13)]
    assert "mAP" in again.stdout

    result, expected = (json.loads((path / "metrics.json").read_text()) for path in (folder, whole))
    assert result["test"] == expected["test"]
    a, b = (torch.load(p / "checkpoints/last.ckpt", weights_only=True) for p in (folder, whole))
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in b["state_dict"])


def test_exit_codes_reach_the_shell(tmp_path: Path):
    bad = subprocess.run(
        command("train", "graph.m=-1"), cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert bad.returncode == 2
    assert bad.stderr.splitlines() == ["gm-mlic: error: graph.m=-1: expected an integer of at least 1."]


def test_python_without_assertions(tmp_path: Path):
    done = subprocess.run(
        command("train", "-m", "graph.m=range(3,5)"),
        cwd=tmp_path, capture_output=True, text=True, env={**environment(), "PYTHONOPTIMIZE": "1"},
    )  # fmt: skip
    line = "gm-mlic: error: Hydra's parser needs assertions: unset PYTHONOPTIMIZE, or run Python without -O."
    assert (done.returncode, done.stderr.splitlines()) == (2, [line])


def finish(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a process and check its exit code."""
    done = subprocess.run(
        arguments, env=environment(), cwd=cwd, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def torchrun(*arguments: str) -> list[str]:
    program = Path(sys.executable).with_name("torchrun")
    return [str(program), "--standalone", "--nproc-per-node=2", "-m", "gm_mlic", *arguments]


def as_srun(arguments: list[str], cwd: Path) -> tuple[str, str]:
    """Run two processes with the environment variables of SLURM's srun; returns their joined stdout and stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
           "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    tasks = [
        subprocess.Popen(
            arguments,
            env={**environment(), **job, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for task in range(2)
    ]
    outputs = [task.communicate(timeout=240) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    return "".join(out for out, _ in outputs), "".join(err for _, err in outputs)


# 31 and 7 images are not divisible by two processes. SGD, because Adam amplifies rounding errors of small gradients.
TWO = [
    "train", "experiment=scenes_smoke", "dataset.sizes={train: 32, val: 31, test: 7}", "dataset.image_size=96",
    "model.widths=[8,8]", "trainer.accelerator=cpu", "trainer.max_epochs=3", "optimizer=paper", "scheduler=paper",
    "optimizer.lr=0.05", "instances.batch_size=2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["lightning", "torchrun", "srun"])
def test_two_processes_give_the_results_of_one(tmp_path: Path, launcher: str):
    """DDP on the CPU writes one log, table and checkpoint, with the losses, weights and metrics of one process."""
    ddp = [*TWO, "trainer.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp", "run_dir=two"]
    if launcher == "srun":
        out, err = as_srun(command(*ddp), tmp_path)
    else:
        two = finish(*(torchrun(*ddp) if launcher == "torchrun" else command(*ddp)), cwd=tmp_path)
        out, err = two.stdout, two.stderr
    assert out.count("test split of scenes") == 1
    assert err.count("epoch   1/3") == 1
    stores = content(tmp_path / "data/instances/scenes")
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]

    (tmp_path / "data").rename(tmp_path / "divided")
    finish(*command(*TWO, "trainer.batch_size=8", "run_dir=one"), cwd=tmp_path)
    assert stores == content(tmp_path / "data/instances/scenes")
    a, b = (read_run(tmp_path / name) for name in ("two", "one"))
    assert len(a.epochs) == len(b.epochs) == 3
    for ours, theirs in zip(a.epochs, b.epochs, strict=True):
        for name in ("train/loss", "val/loss", "val/mAP", "val/OF1"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    x, y = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, weight in y.items():
        torch.testing.assert_close(x[name], weight, rtol=1e-4, atol=1e-6)

    # Evaluation in one process gives the same metrics: no image was counted twice.
    alone = ["checkpoint=two/checkpoints/best.ckpt", "overrides=[trainer.devices=1,trainer.strategy=auto]"]
    finish(*command("eval", *alone), cwd=tmp_path)
    again = json.loads((tmp_path / "two" / "eval" / "test.json").read_text())["metrics"]
    assert a.result is not None
    for name in ("mAP", "CF1", "OF1"):
        assert again[name] == pytest.approx(a.result["test"][name], abs=1e-6)


DETECTOR = """
import hashlib
import os
import time
from pathlib import Path

import torch

from gm_mlic import Instances, register_detector


@register_detector("logged")
class Logged:
    '''The whole image. It logs each image, and starts when two processes detect.'''

    name, labels, feature_dim, fingerprint = "logged", (), 3, "0"

    def __call__(self, images, m):
        Path(f"{os.getpid()}.process").touch()
        while len(list(Path().glob("*.process"))) < 2:
            time.sleep(0.05)
        with open("images.txt", "a") as file:
            for image in images:
                file.write(f"{os.getpid()} {hashlib.sha256(image.numpy().tobytes()).hexdigest()}\\n")
        box, label = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([-1])
        return [Instances(box, torch.ones(1), label, image.mean(dim=(1, 2))[None]) for image in images]
"""


@pytest.mark.slow
def test_two_processes_share_the_extraction(tmp_path: Path):
    """Both detect, and each image is detected once."""
    (tmp_path / "logged.py").write_text(DETECTOR)
    ddp = [*TWO, "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=1", "run_dir=two"]
    finish(*torchrun(*ddp, "plugins=[logged]", "detector=logged"), cwd=tmp_path)
    lines = [line.split() for line in (tmp_path / "images.txt").read_text().splitlines()]
    assert len({process for process, _ in lines}) == 2
    assert len(lines) == len({image for _, image in lines}) == 32 + 31 + 7


@pytest.mark.slow
def test_a_mismatch_of_processes_and_devices_is_rejected(tmp_path: Path):
    done = finish(*torchrun(*TWO, "run_dir=run"), cwd=tmp_path, code=1)  # exit code of torchrun
    assert "error: torchrun started 2 processes, but trainer.devices=1" in done.stderr
    assert done.stderr.count("gm-mlic: error") == 1
    assert "set trainer.devices to the processes per node" in done.stderr


@pytest.mark.slow
def test_one_of_two_processes_is_killed(tmp_path: Path):
    """The other process reports it and ends; the same command resumes from the last epoch."""
    ddp = [*TWO, "trainer.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=30"]
    process = subprocess.Popen(
        command(*ddp, "run_dir=run"), env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while len(epochs(tmp_path / "run")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    (other,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(other), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.decode().splitlines()[-1].startswith("gm-mlic: error: another process of this run has ended")
    assert read_run(tmp_path / "run").state == "failed"
    again = finish(*command(*ddp, "run_dir=run"), cwd=tmp_path)
    assert "resuming" in again.stderr
    assert epochs(tmp_path / "run") == [str(n) for n in range(1, 31)]


@pytest.mark.slow
def test_out_of_memory_names_the_setting_to_lower(tmp_path: Path):
    """With a memory limit, the error names the setting to lower; the run succeeds with a lower value."""
    limited = ["bash", "-c", 'ulimit -v 5000000; exec "$@"', "-"]
    arguments = ["train", *SMALL, "dataset.sizes.train=1024", "trainer.max_epochs=1", "model.widths=[256,8]"]
    full = finish(*limited, *command(*arguments, "trainer.batch_size=1024", "run_dir=run"), cwd=tmp_path, code=2)
    assert full.stderr.splitlines()[-1].startswith("gm-mlic: error: out of memory: lower trainer.batch_size")
    assert read_run(tmp_path / "run").state == "failed"
    finish(*limited, *command(*arguments, "trainer.batch_size=64", "run_dir=other"), cwd=tmp_path)


@pytest.mark.slow
def test_killed_data_loader_worker_is_reported(tmp_path: Path):
    """A killed data loader worker is reported, and the same command resumes from the last epoch."""
    arguments = ["train", *SMALL, "trainer.max_epochs=30", "trainer.num_workers=1", "run_dir=run"]
    process = subprocess.Popen(
        command(*arguments), env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 400
    while len(epochs(tmp_path / "run")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    while process.poll() is None and time.monotonic() < deadline:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        time.sleep(0.01)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "a data loader worker was killed" in err.decode().splitlines()[-1]
    again = finish(*command(*arguments), cwd=tmp_path)
    assert "resuming run after epoch" in again.stderr
    assert epochs(tmp_path / "run") == [str(n) for n in range(1, 31)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_preempted_ddp_run_resumes(tmp_path: Path):
    """On SIGTERM to torchrun, all processes save and stop at the same step; the resumed run is identical."""
    run = [*TWO, "trainer.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp", "trainer.max_epochs=40"]
    process = subprocess.Popen(
        torchrun(*run, "run_dir=run"),
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 400
    while len(epochs(tmp_path / "run")) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert "Stopping after this step" in err.decode()
    assert "terminated; run the same command again to resume" in err.decode()
    assert read_run(tmp_path / "run").state == "interrupted"
    assert 2 <= len(epochs(tmp_path / "run")) < 40

    again = finish(*torchrun(*run, "run_dir=run"), cwd=tmp_path)
    assert "resuming" in again.stderr
    finish(*torchrun(*run, "run_dir=whole"), cwd=tmp_path)
    a, b = (read_run(tmp_path / name) for name in ("run", "whole"))
    assert [{**e, "seconds": 0} for e in a.epochs] == [{**e, "seconds": 0} for e in b.epochs]
    x, y = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(x[name], y[name]) for name in y)
