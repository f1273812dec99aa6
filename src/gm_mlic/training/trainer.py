"""Lightning trainer and callbacks, built from the config."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from gm_mlic.device import resolve_device
from gm_mlic.distributed import launcher, rank_info
from gm_mlic.errors import ConfigError
from gm_mlic.io import first_line
from gm_mlic.training.atomic_checkpoint_io import AtomicCheckpointIO
from gm_mlic.training.callbacks import EpochLog
from gm_mlic.training.preemption import PreemptionCheckpoint

#: Seconds in which the other processes of a run can report that one has ended, before Lightning kills them.
_GRACE = 60


class _PatientObserver(_ChildProcessObserver):
    """Lightning's observer of the processes that it starts; it kills all as soon as it finds that one has ended."""

    def _terminate_all(self) -> None:
        time.sleep(_GRACE)  # a daemon thread: it ends with the process
        super()._terminate_all()


def _observe(processes: list[subprocess.Popen[bytes]]) -> None:
    _PatientObserver(os.getpid(), processes).start()


subprocess_script._launch_process_observer = _observe


def strategies() -> tuple[str, ...]:
    """Allowed values of ``trainer.strategy``."""
    return ("auto", *StrategyRegistry.available_strategies())


def build_trainer(config: DictConfig, run_dir: Path | None, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Build a Lightning trainer without Lightning's own logger, progress bar and summary.

    Without ``run_dir``, for evaluation, it saves no checkpoints.

    Raises:
        ConfigError: if accelerator, devices, strategy or precision are not available.
    """
    settings = config.trainer
    if settings.num_nodes > 1 and launcher() not in ("torchrun", "srun"):
        raise ConfigError(
            f"trainer.num_nodes={settings.num_nodes}: start multi-node runs with torchrun or srun (see "
            "docs/reliability.md)."
        )
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, finds only bugs
    deterministic = settings.deterministic
    if deterministic == "auto":
        deterministic = resolve_device(settings.accelerator) == "cpu"
    try:
        trainer = Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=settings.strategy,
            precision=settings.precision,
            deterministic="warn" if deterministic else None,
            max_epochs=settings.max_epochs,
            gradient_clip_val=settings.gradient_clip_val,
            callbacks=list(callbacks),
            plugins=[AtomicCheckpointIO()],
            default_root_dir=run_dir,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=run_dir is not None,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"trainer.accelerator={settings.accelerator}, devices={settings.devices}, strategy={settings.strategy}, "
            f"precision={settings.precision} is not available: {first_line(error)}"
        ) from error
    cores = max(2, os.cpu_count() or 1)  # two processes are enough to try DDP, also on one core
    if trainer.strategy.root_device.type == "cpu" and trainer.num_devices > cores:
        raise ConfigError(
            f"trainer.devices={settings.devices} starts as many processes on {cores} CPU cores: set trainer.devices to "
            f"at most {cores}, or use a GPU."
        )
    count = rank_info().world_size
    if trainer.world_size != count and launcher() in ("torchrun", "srun"):
        raise ConfigError(
            f"{launcher()} started {count} processes, but trainer.devices={settings.devices} and trainer.num_nodes="
            f"{settings.num_nodes} give a world size of {trainer.world_size}: set trainer.devices to the processes per "
            "node, trainer.num_nodes to the number of nodes, and trainer.strategy=ddp."
        )
    return trainer


def training_callbacks(config: DictConfig, run_dir: Path) -> list[Callback]:
    """Build the callbacks: progress and CSV log, checkpoints of the best and last epoch, and optional ones."""
    settings = config.trainer
    checkpoints: dict[str, Any] = {
        "dirpath": run_dir / "checkpoints",
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    callbacks: list[Callback] = [
        EpochLog(run_dir / "metrics.csv"),
        # Two callbacks, because ModelCheckpoint(save_last=True) only writes last.ckpt when the best one changes. Best
        # is first: last.ckpt then contains its state, and a run killed between the two repeats the epoch.
        ModelCheckpoint(filename="best", monitor="val/mAP", mode="max", **checkpoints),
        ModelCheckpoint(filename="last", **checkpoints),
    ]
    if settings.ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=settings.ema_decay))
    if settings.early_stopping is not None:
        callbacks.append(
            EarlyStopping("val/mAP", mode="max", patience=settings.early_stopping, check_on_train_epoch_end=True)
        )
    # Last, so that it saves the changes of the other callbacks at the end of a step.
    return [
        *callbacks,
        PreemptionCheckpoint(run_dir / "checkpoints" / "last.ckpt", settings.checkpoint_every_n_minutes),
    ]
