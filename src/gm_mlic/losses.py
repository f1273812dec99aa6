"""The weighted cross-entropy that trains the network (eq. 15)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gm_mlic.errors import ArgumentError, ConfigError

DIFFICULT_POLICIES = ("positive", "negative", "ignore")


class WeightedBCE(nn.Module):
    r"""Weighted binary cross-entropy over images and labels (eq. 15; the paper prints it without its minus sign).

    .. math::
        L = -\frac{1}{BC} \sum_{i,c} w_{ic} \left[ y_{ic} \log p_{ic} + (1 - y_{ic}) \log(1 - p_{ic}) \right], \quad
        w_{ic} = y_{ic} e^{\beta (1 - r_c)} + (1 - y_{ic}) e^{\beta r_c}

    (with ``difficult="ignore"``, the mean over those that count), computed from logits in float32 (float64 stays
    float64), so that no logarithm underflows.

    Args:
        label_ratio: (C,) :math:`r_c`, the share of training images that carry label c.
        beta: :math:`\beta`, how strongly rare labels are weighted (default: 0, plain cross-entropy; the paper has 0 on
            VOC 2007 and 0.4 on COCO and NUS-WIDE).
        difficult: what a target of 0 ("difficult" in VOC) counts as: ``positive`` (ML-GCN's habit, default),
            ``negative``, or ``ignore`` (no loss).

    Shapes:
        - **input:** logits (B, C), targets (B, C) in {1, 0, -1}; mind that 0 is "difficult", absent is -1
        - **output:** scalar

    Raises:
        ConfigError: if a ratio is not in [0, 1], beta is negative or not finite, or ``difficult`` is unknown.
    """

    label_ratio: Tensor

    def __init__(self, label_ratio: Tensor, beta: float = 0.0, difficult: str = "positive") -> None:
        super().__init__()
        ratio = torch.as_tensor(label_ratio, dtype=torch.float64)
        if not bool(((ratio >= 0) & (ratio <= 1)).all()):
            raise ArgumentError("label_ratio", "must hold shares in [0, 1].")
        if not 0 <= beta < float("inf"):
            raise ArgumentError("beta", f"must be 0 or more, got {beta}.")
        if difficult not in DIFFICULT_POLICIES:
            raise ArgumentError("difficult", f"must be one of {', '.join(DIFFICULT_POLICIES)}; got {difficult!r}.")
        self.beta = beta
        self.difficult = difficult
        self.register_buffer("label_ratio", ratio)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.shape[-1] != self.label_ratio.numel():
            raise ConfigError(f"The loss was made for {self.label_ratio.numel()} labels, not {logits.shape[-1]}.")
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        present = targets >= 0 if self.difficult == "positive" else targets > 0
        y = present.to(logits.dtype)
        ratio = self.label_ratio.to(logits.dtype)
        weight = torch.where(present, torch.exp(self.beta * (1 - ratio)), torch.exp(self.beta * ratio))
        if self.difficult == "ignore":
            weight = weight * (targets != 0)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, y, weight, reduction="sum")
        counted = (targets != 0).sum().clamp(min=1) if self.difficult == "ignore" else logits.numel()
        return loss / counted

    def __repr__(self) -> str:
        return f"{type(self).__name__}(C={self.label_ratio.numel()}, beta={self.beta}, difficult={self.difficult!r})"
