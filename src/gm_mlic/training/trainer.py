"""From a config to a Lightning trainer and its callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from gm_mlic.device import resolve_device
from gm_mlic.distributed import launcher, rank_info
from gm_mlic.errors import ConfigError
from gm_mlic.training.atomic_checkpoint_io import AtomicCheckpointIO
from gm_mlic.training.callbacks import EpochCSV, EpochProgressBar
from gm_mlic.training.preemption import PreemptionCheckpoint


def strategies() -> tuple[str, ...]:
    """The values of ``trainer.strategy``."""
    return ("auto", *StrategyRegistry.available_strategies())


def build_trainer(config: DictConfig, run_dir: Path | None, callbacks: Sequence[Callback] = ()) -> Trainer:
    """A Lightning trainer with our log lines instead of its own.

    Args:
        config: with ``trainer``.
        run_dir: None for evaluation only.
        callbacks: besides those that the config asks for.

    Raises:
        ConfigError: if there is no such accelerator, device, strategy or precision here.
    """
    settings = config.trainer
    if settings.num_nodes > 1 and launcher() not in ("torchrun", "srun"):
        raise ConfigError(
            f"trainer.num_nodes={settings.num_nodes}: start the processes of several machines with torchrun or srun "
            "(docs/reliability.md has the commands)."
        )
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # slow, finds only bugs
    try:
        trainer = Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=settings.strategy,
            precision=settings.precision,
            deterministic="warn" if _is_deterministic(config) else None,
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
            f"precision={settings.precision} cannot be had here: {str(error).splitlines()[0]}"
        ) from error
    count = rank_info().world_size
    if trainer.world_size != count and launcher() in ("torchrun", "srun"):
        raise ConfigError(
            f"{launcher()} started {count} processes, but trainer.devices={settings.devices} and trainer.num_nodes="
            f"{settings.num_nodes} make a run of {trainer.world_size}: set them to the processes of a machine and the "
            "number of machines, and trainer.strategy=ddp."
        )
    return trainer


def _is_deterministic(config: DictConfig) -> bool:
    wanted = config.trainer.deterministic
    return bool(resolve_device(config.trainer.accelerator) == "cpu" if wanted == "auto" else wanted)


def training_callbacks(config: DictConfig, run_dir: Path) -> list[Callback]:
    """Bar, CSV log, checkpoints of best and last epoch, and what the config asks for."""
    settings = config.trainer
    checkpoints: dict[str, Any] = {
        "dirpath": run_dir / "checkpoints",
        "save_on_train_epoch_end": True,
        "enable_version_counter": False,
    }
    callbacks: list[Callback] = [
        EpochProgressBar(),
        EpochCSV(run_dir / "metrics.csv"),
        # Two of them, because ModelCheckpoint(save_last=True) only writes last.ckpt when the best one changes. The best
        # comes first: last.ckpt then knows of it, and a run killed between the two repeats that epoch.
        ModelCheckpoint(filename="best", monitor="val/mAP", mode="max", **checkpoints),
        ModelCheckpoint(filename="last", **checkpoints),
    ]
    if settings.ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=settings.ema_decay))
    if settings.early_stopping is not None:
        callbacks.append(
            EarlyStopping("val/mAP", mode="max", patience=settings.early_stopping, check_on_train_epoch_end=True)
        )
    # After those that change something at the end of a step.
    return [
        *callbacks,
        PreemptionCheckpoint(run_dir / "checkpoints" / "last.ckpt", settings.checkpoint_every_n_minutes),
    ]
