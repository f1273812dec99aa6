"""Weighted binary cross-entropy loss (eq. 15)."""

from __future__ import annotations

from typing import Annotated, get_args

import torch
from annotated_types import Ge
from torch import Tensor, nn

from gm_mlic.errors import ArgumentError
from gm_mlic.registry import LOSSES
from gm_mlic.targets import (
    DifficultRule,
    TargetFormat,
    as_table,
    check_target_format,
    normalize_targets,
    positives_and_counted,
)

DIFFICULT_POLICIES: tuple[str, ...] = get_args(DifficultRule)


@LOSSES.register("weighted_bce")
class WeightedBCE(nn.Module):
    r"""Weighted binary cross-entropy, averaged over images and labels (eq. 15).

    .. math::
        L = -\frac{1}{BC} \sum_{i,c} w_{ic} \left[ y_{ic} \log p_{ic} + (1 - y_{ic}) \log(1 - p_{ic}) \right], \quad
        w_{ic} = y_{ic} e^{\beta (1 - r_c)} + (1 - y_{ic}) e^{\beta r_c}

    The paper sums over images and labels instead of averaging, and omits the minus sign. For numerical stability, the
    loss is computed from logits, in float32 (float64 stays float64). With ``beta=0`` it equals
    :func:`torch.nn.functional.binary_cross_entropy_with_logits`. With ``difficult="ignore"``, it is the mean over the
    pairs that are not difficult. The loss of an empty batch is NaN, as in torch.

    Args:
        label_ratio: (C,) :math:`r_c`, the fraction of training images with label c.
        beta: :math:`\beta`, the weight of rare labels (0: unweighted; the paper uses 0 on VOC 2007 and 0.4 on COCO and
            NUS-WIDE).
        difficult: treatment of difficult image-label pairs (VOC): ``positive`` (as in ML-GCN), ``negative``, or
            ``ignore`` (no loss).
        target_format: ``binary`` (default): targets in {0, 1}, difficult pairs as a mask. ``voc``: targets in
            {1, 0, -1}, where 0 is difficult and -1 absent.
        allow_all_present: with ``voc``, accept a batch of targets without any -1 (default: ``False``).
        validate_args: check the values of the targets (default: ``True``). The check synchronizes with the GPU and is
            skipped under ``torch.compile``. Disable it for targets that are known to be valid.

    Shapes:
        - **input:** logits (B, C); targets (B, C) of bool, integers or floats; difficult (B, C) bool, or None. Arrays
          and nested lists are converted to tensors
        - **output:** scalar

    Raises:
        ArgumentError: if a ratio is not in [0, 1], beta is negative or not finite, or an option is unknown; in
            ``forward``, if shapes differ, or a difficult mask is given with ``voc``.
        DataError: in ``forward``, if targets do not match the format.
    """

    label_ratio: Tensor

    def __init__(
        self,
        label_ratio: Tensor,
        beta: Annotated[float, Ge(0)] = 0.0,
        difficult: DifficultRule = "positive",
        target_format: TargetFormat = "binary",
        *,
        allow_all_present: bool = False,
        validate_args: bool = True,
    ) -> None:
        super().__init__()
        ratio = as_table("label_ratio", label_ratio).to(torch.float64)
        if not bool(((ratio >= 0) & (ratio <= 1)).all()):
            raise ArgumentError("label_ratio", "must be in [0, 1].")
        if not 0 <= beta < float("inf"):
            raise ArgumentError("beta", f"must be 0 or more, got {beta}.")
        if difficult not in DIFFICULT_POLICIES:
            raise ArgumentError("difficult", f"must be one of {', '.join(DIFFICULT_POLICIES)}; got {difficult!r}.")
        check_target_format(target_format)
        self.beta = beta
        self.difficult = difficult
        self.target_format = target_format
        self.allow_all_present = allow_all_present
        self.validate_args = validate_args
        self.register_buffer("label_ratio", ratio)

    def forward(self, logits: Tensor, targets: Tensor, difficult: Tensor | None = None) -> Tensor:
        logits = as_table("logits", logits, self.label_ratio.device)
        targets = as_table("targets", targets, logits.device)
        difficult = None if difficult is None else as_table("difficult", difficult, logits.device)
        C = self.label_ratio.numel()
        if not logits.is_floating_point():
            raise ArgumentError("logits", f"are {logits.dtype}: expected floating-point numbers.")
        if logits.shape[-1:] != (C,):
            raise ArgumentError("logits", f"have shape {tuple(logits.shape)}, label_ratio has {C} labels.")
        if targets.shape != logits.shape:
            raise ArgumentError("targets", f"have shape {tuple(targets.shape)}, logits {tuple(logits.shape)}.")
        present, difficult = normalize_targets(
            targets,
            difficult,
            self.target_format,
            allow_all_present=self.allow_all_present,
            validate_args=self.validate_args,
        )
        positive, counted = positives_and_counted(present, difficult, self.difficult)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        ratio = self.label_ratio.to(logits.dtype)
        weight = torch.where(positive, torch.exp(self.beta * (1 - ratio)), torch.exp(self.beta * ratio))
        pairs: Tensor | int = logits.numel()
        if counted is not None:
            weight = weight * counted
            pairs = counted.sum().clamp(min=1)
        y = positive.to(logits.dtype)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y, weight, reduction="sum")
        return loss / pairs

    def __repr__(self) -> str:
        voc = ", target_format='voc'" if self.target_format == "voc" else ""
        return (
            f"{type(self).__name__}(C={self.label_ratio.numel()}, beta={self.beta}, difficult={self.difficult!r}{voc})"
        )
