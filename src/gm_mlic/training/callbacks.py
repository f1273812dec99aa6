"""Progress, log and ``metrics.csv`` of a training run."""

from __future__ import annotations

import csv
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gm_mlic.io import Progress, atomic_write

log = logging.getLogger(__name__)


class EpochLog(Callback):
    """Progress bar of each epoch, and at its end a row of ``metrics.csv`` (epochs from 1) and a log line.

    The file is replaced atomically at each epoch, so a killed run loses no rows. A resumed run keeps the rows up to the
    epoch of its checkpoint (Lightning's CSVLogger deletes the file). The seconds of an epoch that it resumes include
    those before the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._bar: Progress | None = None  # none for the rest of an epoch that is resumed
        self._open = ExitStack()
        self._begin = self._seconds = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._begin = time.monotonic() - self._seconds  # an epoch that is resumed has no on_train_epoch_start
        if self.path.exists():
            with self.path.open(newline="") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= trainer.current_epoch]

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._begin = time.monotonic()
        bar = Progress(_title(trainer), "steps", int(trainer.num_training_batches), show=trainer.is_global_zero)
        self._bar = self._open.enter_context(bar)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, i: int) -> None:
        if self._bar is not None:
            self._bar.advance(1)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._open.close()
        if not trainer.is_global_zero:
            return
        values = {name: f"{float(value):.6g}" for name, value in sorted(trainer.callback_metrics.items())}
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        seconds = time.monotonic() - self._begin
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "seconds": f"{seconds:.3f}"}
        mAP, best = float(values["val/mAP"]), max((float(r["val/mAP"]) for r in self._rows), default=float("-inf"))
        self._rows.append({**row, "lr": f"{lr:.6g}", **values})
        names = list(dict.fromkeys(name for row in self._rows for name in row))
        with atomic_write(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self._rows)
        log.info(
            "%s  train loss %.4f  val mAP %5.2f  best %5.2f  %.1f s%s",
            _title(trainer), float(values["train/loss"]), mAP, max(mAP, best), seconds, " *" if mAP > best else "",
        )  # fmt: skip

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._open.close()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.monotonic() - self._begin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds = state_dict["seconds"]


def _title(trainer: Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
