"""The metric object: collects scores and targets over batches and processes, then computes every number at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from gm_mlic.errors import ArgumentError, ConfigError, DataError
from gm_mlic.metrics.conventions import convention
from gm_mlic.metrics.functional import _average_precision, _precision_recalls, check_scores, check_targets


class MultiLabelMetrics(Metric):
    """mAP, AP, CP/CR/CF1 and OP/OR/OF1, over all predictions and over the 3 highest of each image.

    Exact: all scores are kept, nothing is binned. States are concatenated over processes. Inputs are copied, never
    changed. Of rows that share an id (as a distributed sampler pads with), one is kept; where every row has an id, rows
    are ranked in the order of their ids, so that ties give the same result for any number of processes.

    Args:
        num_labels: C.
        preset: a key of :data:`~gm_mlic.metrics.conventions.PRESETS`.
        labels: the C names, used in ``excluded_labels``; the column numbers by default.
        target_format: ``voc`` for targets in {1, 0, -1}, ``binary`` for targets in {0, 1}.
        options: single options of :class:`~gm_mlic.metrics.conventions.Convention` that replace the preset's.

    Attributes:
        convention: the options in force.
        excluded_labels: after ``compute``, names of the labels without a positive, which no mean over labels contains.

    Raises:
        ConfigError: for an unknown preset, option or value.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    scores: list[Tensor]
    targets: list[Tensor]
    ids: list[Tensor]

    def __init__(
        self,
        num_labels: int,
        preset: str = "mlgcn",
        *,
        labels: Sequence[str] | None = None,
        target_format: Literal["voc", "binary"] = "voc",
        **options: Any,
    ) -> None:
        super().__init__()
        if num_labels < 1:
            raise ArgumentError("num_labels", f"is {num_labels}: at least one label is needed.")
        if labels is not None and len(labels) != num_labels:
            raise ConfigError(f"{len(labels)} label names were given for {num_labels} labels.")
        if target_format not in ("voc", "binary"):
            raise ArgumentError("target_format", f"is {target_format!r}: choose voc (1, 0, -1) or binary (0, 1).")
        self.num_labels = num_labels
        self.preset = preset
        self.labels = tuple(labels) if labels is not None else tuple(str(c) for c in range(num_labels))
        self.target_format = target_format
        self.convention = convention(preset, **options)
        self.excluded_labels: tuple[str, ...] = ()
        for name in ("scores", "targets", "ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, targets: Tensor, ids: Tensor | Sequence[int] | None = None) -> None:
        """Add a batch.

        Args:
            scores: (N, C) probabilities in [0, 1].
            targets: (N, C) in {1, 0, -1}, or {0, 1} with ``target_format="binary"``.
            ids: (N,) integers >= 0, one for each image of the dataset (its row, say).

        Raises:
            DataError: for NaN, scores outside [0, 1], other target values, or shapes that do not fit.
        """
        # Half precision becomes float32 without loss (ties stay ties); float64 stays.
        kept = scores.detach().to(torch.promote_types(scores.dtype, torch.float32), copy=True)
        if not scores.is_floating_point():
            kept = scores
        if self.target_format == "binary":
            check_targets(targets, (0, 1), 'use 1 (present) and 0 (absent), or target_format="voc".')
            targets = targets.to(torch.int8) * 2 - 1
        check_scores(kept, targets, self.num_labels)
        if ids is None:
            rows = torch.full((len(kept),), -1, dtype=torch.int64, device=kept.device)
        else:
            rows = torch.as_tensor(ids, device=kept.device)
            if rows.shape != (len(kept),) or rows.is_floating_point() or (rows.numel() and rows.min() < 0):
                raise DataError(f"ids must be {len(kept)} integers >= 0, one for each row of scores.")
            rows = rows.to(torch.int64, copy=True)
        self.scores.append(kept)
        self.targets.append(targets.detach().to(kept.device, torch.int8, copy=True))
        self.ids.append(rows)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; one that saw no image takes part with no rows."""
        if isinstance(self.scores, list) and not self.scores:
            self.scores.append(torch.empty(0, self.num_labels, device=self.device))
            self.targets.append(torch.empty(0, self.num_labels, dtype=torch.int8, device=self.device))
            self.ids.append(torch.empty(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """All numbers, in percent (0 to 100), float64.

        Returns:
            ``mAP``, ``CP``, ``CR``, ``CF1``, ``OP``, ``OR``, ``OF1``, and the six under ``top3/``: 0-d; ``AP``:
            (C,), NaN for labels without a positive, which no mean over labels contains. A mean over no label is NaN.

        Raises:
            DataError: if there was no image, or one id came with different targets.
        """
        scores, targets, _ = self._rows()
        rules = self.convention
        AP = _average_precision(scores, targets, rules.ap, rules.difficult_ap)
        result = {"mAP": AP.nanmean()}
        both = _precision_recalls(scores, targets, rules, (None, 3))
        for prefix, numbers in zip(("", "top3/"), both, strict=True):
            result |= {prefix + name: value for name, value in vars(numbers).items()}
        result["AP"] = AP
        self.excluded_labels = tuple(name for name, ap in zip(self.labels, AP.tolist(), strict=True) if ap != ap)
        return {name: 100 * value for name, value in result.items()}

    def collected(self) -> tuple[Tensor, Tensor, Tensor]:
        """All processes' scores (N, C), targets (N, C) int8 and ids (N,), -1 where none were given; each row once."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self._rows()

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """All scores, targets and ids, without the repeated rows. They replace the batches, so none is held twice."""
        if not len(self.scores):
            raise DataError("There is nothing to evaluate: no scores were given.")
        for name in ("scores", "targets", "ids"):
            setattr(self, name, [dim_zero_cat(getattr(self, name))])
        ids = self.ids[0]
        if len(ids) == 0:
            raise DataError("There is nothing to evaluate: no scores were given.")
        if bool((ids < 0).any()):
            if not bool((ids < 0).all()):
                raise DataError("Some rows came with ids and some without: give ids to every update or to none.")
        elif not bool((ids[1:] > ids[:-1]).all()):
            self._sort_rows()
        return self.scores[0], self.targets[0], self.ids[0]

    def _sort_rows(self) -> None:
        """Put the rows in the order of their ids, each id once."""
        ids, order = self.ids[0].sort(stable=True)
        again = torch.zeros_like(ids, dtype=torch.bool)
        again[1:] = ids[1:] == ids[:-1]
        here = again.nonzero()[:, 0]
        differs = (self.targets[0][order[here]] != self.targets[0][order[here - 1]]).any(1)
        if differs.any():
            raise DataError(
                f"Image id {int(ids[here[differs][0]])} came twice with different targets: ids must be unique."
            )
        keep = order[~again]
        for name in ("scores", "targets", "ids"):
            setattr(self, name, [getattr(self, name)[0][keep]])
