"""Torchmetrics metric that accumulates scores and targets over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from gm_mlic.errors import ArgumentError, DataError, check_positive
from gm_mlic.metrics.conventions import Convention, get_convention
from gm_mlic.metrics.functional import all_metrics, checked_targets
from gm_mlic.targets import TargetFormat, as_table, check_target_format

_STATES = ("scores", "targets", "difficult", "ids")


class MultiLabelMetrics(Metric):
    """Metrics mAP, AP, CP/CR/CF1 and OP/OR/OF1, over all predictions and over the top 3 of each image.

    Results are exact: all scores are kept, without binning. States are concatenated over processes; inputs are copied.
    Rows with the same id (padding of a distributed sampler) are counted once. If all rows have ids, they are sorted by
    id, so that ties give the same result for any number of processes.

    Args:
        num_labels: C.
        convention: a key of :data:`~gm_mlic.metrics.conventions.CONVENTIONS`, or a
            :class:`~gm_mlic.metrics.conventions.Convention`.
        labels: the C names, used in ``excluded_labels``; default: column numbers.
        target_format: ``binary`` (default) for targets in {0, 1} and a difficult mask; ``voc`` for targets in
            {1, 0, -1}, where 0 is difficult.
        allow_all_present: with ``voc``, accept a batch of targets without any -1 (default: ``False``).
        **options: options of :class:`~gm_mlic.metrics.conventions.Convention` that override the convention.

    Attributes:
        convention: the resulting options.
        excluded_labels: after ``compute``, names of labels without positives, excluded from means over labels.

    Raises:
        ArgumentError: if the convention, an option or a value is unknown.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    scores: list[Tensor]
    targets: list[Tensor]
    difficult: list[Tensor]
    ids: list[Tensor]

    def __init__(
        self,
        num_labels: int,
        convention: str | Convention = "mlgcn",
        *,
        labels: Sequence[str] | None = None,
        target_format: TargetFormat = "binary",
        allow_all_present: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        check_positive(num_labels=num_labels)
        if labels is not None and len(labels) != num_labels:
            raise ArgumentError("labels", f"has {len(labels)} names for {num_labels} labels.")
        check_target_format(target_format)
        self.num_labels = num_labels
        self.labels = tuple(labels) if labels is not None else tuple(str(c) for c in range(num_labels))
        self.target_format = target_format
        self.allow_all_present = allow_all_present
        self.convention = get_convention(convention, **options)
        self.excluded_labels: tuple[str, ...] = ()
        for name in _STATES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        scores: Tensor,
        targets: Tensor,
        difficult: Tensor | None = None,
        *,
        ids: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Accumulate a batch of tensors, arrays or nested lists.

        Args:
            scores: (N, C) probabilities in [0, 1].
            targets: (N, C) in {0, 1}, of bool, integers or floats; in {1, 0, -1} with ``target_format="voc"``.
            difficult: (N, C) bool mask of difficult image-label pairs (VOC); default: none. The convention defines
                their treatment.
            ids: (N,) integers >= 0, unique per image (such as the row in the dataset).

        Raises:
            DataError: if scores are NaN or outside [0, 1], targets have other values, or shapes do not match.
            ArgumentError: if ``difficult`` is not a bool mask of this shape, or is given with ``voc``.
        """
        scores = as_table("scores", scores)
        if scores.is_floating_point():
            # Half precision is converted to float32 exactly (ties stay ties); float64 is kept.
            scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32), copy=True)
        _, present, difficult = checked_targets(
            scores, targets, difficult, self.target_format, self.allow_all_present, self.num_labels
        )
        N, device = len(scores), scores.device
        rows = torch.full((N,), -1, device=device) if ids is None else torch.as_tensor(ids, device=device)
        if ids is not None and (rows.shape != (N,) or rows.is_floating_point() or bool((rows < 0).any())):
            raise DataError(f"ids must be {N} integers >= 0, one per row of scores.")
        self.scores.append(scores)
        self.targets.append(present.to(device))
        self.difficult.append(
            torch.zeros_like(self.targets[-1]) if difficult is None else difficult.to(device, copy=True)
        )
        self.ids.append(rows.to(torch.int64, copy=True))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; a process without images contributes no rows."""
        if isinstance(self.scores, list) and not self.scores:
            self.scores.append(torch.empty(0, self.num_labels, device=self.device))
            for masks in (self.targets, self.difficult):
                masks.append(torch.empty(0, self.num_labels, dtype=torch.bool, device=self.device))
            self.ids.append(torch.empty(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Compute all metrics in percent (0 to 100), float64.

        Returns:
            ``mAP``, ``CP``, ``CR``, ``CF1``, ``OP``, ``OR``, ``OF1``, and the last six under ``top3/``: 0-d; ``AP``:
            (C,), NaN for labels without positives, which are excluded from means over labels. A mean over no label is
            NaN.

        Raises:
            DataError: if there are no images, or one id has different targets.
        """
        scores, targets, difficult, _ = self._rows()
        result = all_metrics(scores, targets, difficult, self.convention)
        undefined = result["AP"].isnan().tolist()
        self.excluded_labels = tuple(name for name, nan in zip(self.labels, undefined, strict=True) if nan)
        return result

    def collected(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Accumulated rows of all processes, without duplicates.

        Returns:
            scores (N, C); targets (N, C) bool, False for difficult pairs; difficult (N, C) bool, None if there are
            none; ids (N,), -1 if not given.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            return self._rows()

    def _rows(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """:meth:`collected` of this process. The rows replace the batches to save memory."""
        if not len(self.ids) or not len(dim_zero_cat(self.ids)):
            raise DataError("There are no scores to evaluate: call update first.")
        for name in _STATES:
            setattr(self, name, [dim_zero_cat(getattr(self, name))])
        ids = self.ids[0]
        if bool((ids < 0).any()):
            if not bool((ids < 0).all()):
                raise DataError("Some rows have ids and some do not: pass ids to every update or to none.")
        elif not bool((ids[1:] > ids[:-1]).all()):
            self._sort_rows()
        difficult = self.difficult[0] if bool(self.difficult[0].any()) else None
        return self.scores[0], self.targets[0], difficult, self.ids[0]

    def _sort_rows(self) -> None:
        """Sort the rows by id and drop duplicates."""
        ids = self.ids[0].cpu().numpy()
        _, rows, copies = np.unique(ids, return_index=True, return_inverse=True)
        keep = torch.from_numpy(rows)  # the first row of each id
        first = keep[torch.from_numpy(copies)]
        for table in (self.targets[0], self.difficult[0]):
            differs = (table != table[first]).any(dim=1).cpu().numpy()
            if differs.any():
                raise DataError(f"Image id {ids[differs][0]} occurs twice with different targets: ids must be unique.")
        for name in _STATES:
            setattr(self, name, [getattr(self, name)[0][keep]])
