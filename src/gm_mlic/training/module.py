"""Lightning module: loss, metrics, optimizer and learning-rate schedule."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from gm_mlic.errors import ConfigError, GMMLICError, config_keys
from gm_mlic.graphs import SPATIAL, AssignmentBatch, drop_edges
from gm_mlic.instances import OnlineBatch
from gm_mlic.metrics import MultiLabelMetrics
from gm_mlic.nn import GMMLIC, LabelCache, ModelOutput, Penalized
from gm_mlic.optim import build_optimizer, build_scheduler
from gm_mlic.training.artifacts import Examples
from gm_mlic.training.online import OnlineGraphs
from gm_mlic.training.preemption import position
from gm_mlic.zoo.metadata import KEY, ModelMetadata

#: Key of the training loss of an unfinished epoch in a checkpoint.
_LOSS = "train_loss"
#: Steps between checks of the loss on a GPU; each check synchronizes.
_CHECK_EVERY = 50


class DivergedError(GMMLICError):
    """The loss is NaN or infinite, first at ``epoch`` (from 1) and ``step``, for images in ``rows`` of the dataset."""

    def __init__(self, message: str, epoch: int, step: int, rows: list[int]) -> None:
        super().__init__(message)
        self.epoch, self.step, self.rows = epoch, step, rows


class MLICModule(LightningModule):
    """Lightning module that trains and evaluates ``model``.

    Logs ``train/loss``, ``val/loss`` and ``val/NAME`` and ``test/NAME`` for each metric NAME (``val/mAP``,
    ``val/top3/CF1``, ...). After a test, ``test_values`` holds all metrics including ``AP`` (C,), ``test_scores`` the
    scores, targets and difficult (n, C) and rows (n,), and ``examples`` predictions for some images.

    Args:
        model: from a batch of assignment graphs to :class:`~gm_mlic.nn.ModelOutput`.
        loss: from logits (B, C), valid targets (B, C) in {0, 1} and difficult (B, C) bool or None to a scalar.
        metrics: from scores (B, C) in [0, 1] and the same targets.
        optimizer: settings of the optimizer (:func:`~gm_mlic.optim.build_optimizer`), and ``detector_lr``.
        scheduler: settings of the schedule (:func:`~gm_mlic.optim.build_scheduler`).
        metadata: stored in each checkpoint.
        online: from batches of images to graphs; None for batches of graphs.
        instance_graph_warmup_epochs: number of first epochs trained without edges of the instance graph. Parameters
            that depend on these edges get zero (not None) gradients during the warmup, so Adam's moments are zero when
            it ends, and the first updates can be a few times the learning rate.
        num_images: N of the training split; the loss gets the model's ``penalty()``, if it has one, divided by N C.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        metrics: MultiLabelMetrics,
        optimizer: dict[str, Any],
        scheduler: dict[str, Any],
        metadata: ModelMetadata,
        online: OnlineGraphs | None = None,
        instance_graph_warmup_epochs: int = 0,
        num_images: int = 1,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.metrics = metrics
        # Means over the images of all processes.
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.online = online
        self.instance_graph_warmup_epochs = instance_graph_warmup_epochs
        self.num_images = num_images
        self.optimizer_settings, self.scheduler_settings = optimizer, scheduler
        self.metadata = metadata
        self.test_values: dict[str, Any] = {}
        self.test_scores: tuple[Tensor, Tensor, Tensor | None, Tensor] | None = None
        self.examples = Examples()
        self._bad_step: Tensor | None = None
        #: Steps whose loss has not been checked yet, with the rows of their batches.
        self._recent: deque[tuple[int, Tensor | None]] = deque(maxlen=_CHECK_EVERY + 1)
        self._label_cache: LabelCache | None = None

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, OnlineBatch):  # the detector moves its images to its own device
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _graphs(self, batch: Any) -> Any:
        """Assignment graphs of a batch; None if none of its images is readable."""
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
        output = self.model(batch)
        if not isinstance(output, ModelOutput):
            kind, name = type(output).__name__, self.metadata.model["name"]
            raise ConfigError(f"The model {name} returned a {kind}, expected a ModelOutput.")
        loss: Tensor = self.loss(output.logits, batch.y, _difficult(batch))
        self.train_loss.update(loss.detach(), batch.num_graphs)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        for logits in output.auxiliary or ():
            loss = loss + self.loss(logits, batch.y, _difficult(batch))
        if output.loss is not None:
            loss = loss + output.loss
        if isinstance(self.model, Penalized):
            loss = loss + self.model.penalty() / (self.num_images * batch.y.shape[1])
        self._watch(loss, batch)
        return loss

    def _watch(self, loss: Tensor, batch: Any) -> None:
        """Record the first step with a non-finite loss; check it rarely, since a check synchronizes the GPU."""
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
                "diverged.json, earlier checkpoints in checkpoints/.",
                self.current_epoch + 1,
                step,
                [] if rows is None else rows.tolist(),
            )

    def on_train_epoch_end(self) -> None:
        self.stop_if_diverged()

    # Evaluation

    def on_validation_start(self) -> None:
        self.stop_if_diverged()  # before a checkpoint is saved
        self._label_cache = None  # the weights have changed

    def on_test_start(self) -> None:
        self._label_cache = None
        self.examples = Examples()

    def _output(self, batch: Any) -> ModelOutput:
        """Output of the network in evaluation; image-independent terms are cached at the first batch."""
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
            if name != "AP":
                self.log(f"{split}/{name}", float(value), rank_zero_only=True)
        return values

    # Optimization

    def configure_optimizers(self) -> Any:
        settings = dict(self.optimizer_settings)
        detector_lr = settings.pop("detector_lr", None)
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
        trainable = [] if self.online is None else [p for p in self.online.parameters() if p.requires_grad]
        if trainable:
            groups.append({"params": trainable, "lr": settings["lr"] / 10 if detector_lr is None else detector_lr})
        with config_keys("optimizer"):
            optimizer = build_optimizer(settings, groups)
        steps, epochs = int(self.trainer.estimated_stepping_batches), self.trainer.max_epochs
        with config_keys("scheduler"):
            schedule = build_scheduler(self.scheduler_settings, optimizer, steps, epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.metadata.to_checkpoint()
        # Loss of the steps so far, for checkpoints within an epoch; each process resumes with the mean over processes.
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
    """Mask of difficult labels of a batch; None for datasets without one."""
    mask: Tensor | None = getattr(batch, "difficult", None)
    return mask
