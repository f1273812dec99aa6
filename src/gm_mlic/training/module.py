"""The Lightning module: loss, scores, metrics, optimiser. The network itself knows nothing of Lightning."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gm_mlic.errors import ConfigError, GMMLICError
from gm_mlic.graphs import SPATIAL, AssignmentBatch, drop_edges
from gm_mlic.instances import OnlineBatch
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.nn import GMMLIC, LabelCache, ModelOutput
from gm_mlic.optim import one_cycle
from gm_mlic.training.artifacts import Examples
from gm_mlic.training.online import OnlineGraphs
from gm_mlic.training.preemption import position
from gm_mlic.zoo.metadata import KEY, ModelMetadata

#: Where a checkpoint keeps the training loss of an unfinished epoch.
_LOSS = "train_loss"
#: How often, in steps, a GPU's loss is looked at (looking waits for the GPU).
_CHECK_EVERY = 50


class DivergedError(GMMLICError):
    """The loss is NaN or infinite.

    Attributes:
        epoch, step: where it first was so; the epoch from 1.
        rows: of the images of that batch, on this process.
    """

    def __init__(self, message: str, epoch: int, step: int, rows: list[int]) -> None:
        super().__init__(message)
        self.epoch, self.step, self.rows = epoch, step, rows


class MLICModule(LightningModule):
    """Trains ``model`` to minimise ``loss`` and measures it with ``metrics``.

    Logs ``train/loss`` and, for validation, ``val/loss`` and ``val/NAME`` for each metric NAME (``val/mAP``,
    ``val/top3/CF1``, ...); for testing, ``test/NAME``. After a test, ``test_values`` holds all of them, with
    ``AP`` (C,), ``test_scores`` the scores, targets and difficult (n, C) and rows (n,) that they are made of, and
    ``examples`` what was predicted for some of the images.

    Args:
        model: from a batch of assignment graphs to :class:`~gm_mlic.nn.ModelOutput`.
        loss: from logits (B, C), targets (B, C) in {0, 1} and difficult (B, C) bool or None to a scalar. Targets have
            been checked.
        metrics: of the same, with scores in [0, 1].
        optimizer: the settings of ``conf/optimizer``.
        metadata: written into each checkpoint.
        online: what turns images into graphs, for batches that are images.
        instance_graph_warmup_epochs: epochs at the beginning that are trained without edges of the instance graph.
            Parameters that read these edges get zero (not None) gradients until then, so Adam's moments are zero when
            the graph joins, and the first updates can be a few times the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        metrics: MultiLabelMetrics,
        optimizer: dict[str, Any],
        metadata: ModelMetadata,
        online: OnlineGraphs | None = None,
        instance_graph_warmup_epochs: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.metrics = metrics
        # Means over images, of all processes, however many each of them has.
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.online = online
        self.instance_graph_warmup_epochs = instance_graph_warmup_epochs
        self.optimizer_settings = optimizer
        self.metadata = metadata
        self.test_values: dict[str, Any] = {}
        self.test_scores: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None
        self.examples = Examples()
        self._bad_step: Tensor | None = None
        #: Steps and the rows of their batches, as far back as the loss has not been looked at.
        self._recent: deque[tuple[int, Tensor | None]] = deque(maxlen=_CHECK_EVERY + 1)
        self._label_cache: LabelCache | None = None

    def forward(self, batch: Any) -> Any:
        return self.model(batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, OnlineBatch):  # the detector takes its images where it needs them
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _graphs(self, batch: Any) -> Any:
        """The assignment graphs of a batch; None if none of its images can be read."""
        if not isinstance(batch, OnlineBatch):
            return batch
        assert self.online is not None
        return self.online(batch, self.device) if len(batch) else None

    # Training

    def training_step(self, batch: Any, batch_index: int) -> Tensor | None:
        batch = self._graphs(batch)
        if batch is None:
            return None
        if self.current_epoch < self.instance_graph_warmup_epochs:
            batch = drop_edges(batch, SPATIAL)
        loss: Tensor = self.loss(self.model(batch).logits, batch.y, _difficult(batch))
        self._watch(loss, batch)
        self.train_loss.update(loss.detach(), batch.num_graphs)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss

    def _watch(self, loss: Tensor, batch: Any) -> None:
        """Remember the first step with a loss that is not finite; look seldom, since looking waits for the device."""
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, dtype=torch.int64, device=loss.device)
        self._recent.append((self.global_step, batch.row))
        is_first = ~torch.isfinite(loss.detach()) & (self._bad_step < 0)
        self._bad_step = torch.where(is_first, self.global_step, self._bad_step)
        if loss.device.type == "cpu" or self.global_step % _CHECK_EVERY == 0:
            self.stop_if_diverged()

    def stop_if_diverged(self) -> None:
        if self._bad_step is not None and int(self._bad_step) >= 0:
            step = int(self._bad_step)
            rows = next((rows for number, rows in self._recent if number == step), None)
            raise DivergedError(
                f"The loss is not finite at epoch {self.current_epoch + 1}, step {step}: lower optimizer.lr (now "
                f"{self.optimizer_settings['lr']:g}) or set trainer.gradient_clip_val. The images of that step are in "
                "diverged.json, what was good before is in checkpoints/.",
                self.current_epoch + 1,
                step,
                [] if rows is None else rows.tolist(),
            )

    def on_train_epoch_end(self) -> None:
        self.stop_if_diverged()

    def on_validation_epoch_start(self) -> None:
        self.stop_if_diverged()  # before a checkpoint of such weights is written

    # Evaluation

    def on_validation_start(self) -> None:
        self._label_cache = None  # the weights have changed

    on_predict_start = on_validation_start

    def on_test_start(self) -> None:
        self._label_cache = None
        self.examples = Examples()

    def _output(self, batch: Any) -> ModelOutput:
        """The network's output in evaluation; what does not depend on the images is computed at the first batch."""
        if not isinstance(self.model, GMMLIC) or not isinstance(batch, AssignmentBatch):
            output: ModelOutput = self.model(batch)
            return output
        if self._label_cache is None:
            self._label_cache = self.model.precompute_labels(batch)
        output = self.model(batch, self._label_cache)
        return output

    def validation_step(self, batch: Any, batch_index: int) -> None:
        batch = self._graphs(batch)
        if batch is None:
            return
        logits = self._output(batch).logits.float()
        self.val_loss.update(self.loss(logits, batch.y, _difficult(batch)), batch.num_graphs)
        self.log("val/loss", self.val_loss)
        self.metrics.update(torch.sigmoid(logits), batch.y, _difficult(batch), ids=batch.row)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def test_step(self, batch: Any, batch_index: int) -> None:
        batch = self._graphs(batch)
        if batch is None:
            return
        output = self._output(batch)
        self.examples.collect(batch, output)
        self.metrics.update(torch.sigmoid(output.logits.float()), batch.y, _difficult(batch), ids=batch.row)

    def on_test_epoch_end(self) -> None:
        self.test_scores = self.metrics.collected()
        self.test_values = self._log_metrics("test")

    def _log_metrics(self, split: str) -> dict[str, Any]:
        values: dict[str, Any] = self.metrics.compute()
        self.metrics.reset()
        for name, value in values.items():
            if torch.as_tensor(value).numel() == 1 and name != "AP":
                self.log(f"{split}/{name}", float(value), rank_zero_only=True)
        return values

    def predict_step(self, batch: Any, batch_index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B,), scores (B, C) and argmax instances (B, C) of a batch of graphs."""
        output = self._output(batch)
        return batch.row, torch.sigmoid(output.logits.float()), output.argmax_instance

    # Optimisation

    def configure_optimizers(self) -> Any:
        settings = self.optimizer_settings
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
        learning = [] if self.online is None else [p for p in self.online.parameters() if p.requires_grad]
        if learning:
            lr = settings["detector_lr"] if settings["detector_lr"] is not None else settings["lr"] / 10
            groups.append({"params": learning, "lr": lr})
        optimizer: torch.optim.Optimizer
        if settings["name"] == "sgd":
            optimizer = torch.optim.SGD(
                groups, lr=settings["lr"], momentum=settings["momentum"], weight_decay=settings["weight_decay"]
            )
        elif settings["name"] == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=settings["lr"], weight_decay=settings["weight_decay"])
        else:
            raise ConfigError(f"optimizer.name={settings['name']}: expected one of sgd, adamw.")
        steps = int(self.trainer.estimated_stepping_batches)
        schedule: torch.optim.lr_scheduler.LRScheduler
        if settings["lr_scheduler"] == "step":
            assert self.trainer.max_epochs is not None
            epoch = max(1, steps // self.trainer.max_epochs)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, settings["step_size"] * epoch, settings["gamma"])
        else:
            rates = [group["lr"] for group in optimizer.param_groups]
            schedule = one_cycle(optimizer, rates, steps, settings["pct_start"])
        # Both count steps: a checkpoint at the end of an epoch is written before an epoch-wise schedule would move on.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.metadata.to_checkpoint()
        # Of the steps so far, for an epoch that is saved within; an equal part of it for each process.
        mean = self.train_loss
        parts = self.trainer.strategy.reduce(torch.stack([mean.mean_value, mean.weight]), reduce_op="mean")
        checkpoint[_LOSS] = [*parts.tolist(), mean.update_count]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if position(checkpoint)[1]:
            total, weight, count = checkpoint[_LOSS]
            self.train_loss.mean_value.fill_(total)
            self.train_loss.weight.fill_(weight)
            self.train_loss._update_count = int(count)


def _difficult(batch: Any) -> Tensor | None:
    """Which labels of a batch are difficult; None where the dataset does not say."""
    mask: Tensor | None = getattr(batch, "difficult", None)
    return mask
