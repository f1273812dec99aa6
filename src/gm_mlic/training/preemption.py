"""Preemption: save a checkpoint after the current step on SIGINT or SIGTERM, and resume exactly there."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gm_mlic.errors import Terminated

log = logging.getLogger(__name__)

#: Key of the position in a checkpoint: the epoch (from 0) to resume, and its number of finished steps.
POSITION = "position"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def position(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Epoch (from 0) to resume, and its number of finished steps."""
    found = checkpoint.get(POSITION)
    return (found["epoch"], found["steps"]) if found else (checkpoint["epoch"] + 1, 0)


@contextlib.contextmanager
def restored_signal_handlers() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM on exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class PreemptionCheckpoint(Callback):
    """Callback that saves a checkpoint and stops after the step in which SIGINT or SIGTERM arrives.

    During validation, the run stops after the epoch. A second signal stops it immediately. All processes stop at the
    same step. It also saves within an epoch after each ``minutes``, unless None. Train within
    :func:`restored_signal_handlers`.
    """

    def __init__(self, path: Path, minutes: float | None) -> None:
        self.path, self.minutes = path, minutes
        self.received: int | None = None
        self._steps = 0
        self._saved = time.monotonic()

    # Signals

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:  # after Lightning sets its handlers
        self._saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._leave(number)
        self.received = number
        log.warning("Stopping after this step; a second signal stops immediately.")

    @staticmethod
    def _leave(number: int) -> None:
        if number == signal.SIGTERM:
            raise Terminated
        raise KeyboardInterrupt

    # Steps

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        if i + 1 >= trainer.num_training_batches:  # the epoch is saved after validation
            return
        stop = self._any_rank(trainer, self.received is not None)
        due = self.minutes is not None and time.monotonic() - self._saved > 60 * self.minutes
        if stop or self._any_rank(trainer, due):
            self._save(trainer, module, steps=i + 1)
        if stop:
            self._leave(self.received or signal.SIGTERM)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._any_rank(trainer, self.received is not None):
            self._leave(self.received or signal.SIGTERM)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.received is not None:  # skip the test
            self._leave(self.received)

    @staticmethod
    def _any_rank(trainer: Trainer, flag: bool) -> bool:
        return flag if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(flag, all=False)

    def _save(self, trainer: Trainer, module: LightningModule, steps: int) -> None:
        module.stop_if_diverged()  # type: ignore[operator]
        self._steps = steps
        try:
            trainer.save_checkpoint(self.path)
        finally:
            self._steps = 0
        self._saved = time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        epoch = trainer.current_epoch if self._steps else trainer.current_epoch + 1
        checkpoint[POSITION] = {"epoch": epoch, "steps": self._steps}
        if not self._steps:
            self._saved = time.monotonic()
