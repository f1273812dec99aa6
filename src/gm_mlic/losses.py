"""Losses: weighted binary cross-entropy (eq. 15) and those of other papers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gm_mlic.errors import ArgumentError
from gm_mlic.registry import LOSSES
from gm_mlic.schema import Fraction, NotNegative, Probability, checked
from gm_mlic.targets import DifficultRule, TargetFormat, as_table, normalize_targets, positives_and_counted


class MultiLabelLoss(nn.Module):
    """Base of losses of logits (B, C) and targets (B, C).

    For numerical stability, losses are computed from logits, in float32 (float64 stays float64). With
    ``difficult="ignore"``, they are means over the pairs that are not difficult. The loss of an empty batch is NaN, as
    in torch. Inputs, shapes and errors below are those of all losses.

    Args:
        label_ratio: (C,), the fraction of training images with label c.
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
        ArgumentError: if a ratio is not in [0, 1], or a setting is not valid; in ``forward``, if shapes differ, or a
            difficult mask is given with ``voc``.
        DataError: in ``forward``, if targets do not match the format.
    """

    label_ratio: Tensor
    #: Settings of the loss itself, for ``repr``.
    _own: ClassVar[tuple[str, ...]] = ()

    @checked
    def __init__(
        self,
        label_ratio: Tensor,
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
        self.difficult, self.target_format = difficult, target_format
        self.allow_all_present, self.validate_args = allow_all_present, validate_args
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
        return self.loss(logits, positive, counted)

    def loss(self, logits: Tensor, positive: Tensor, counted: Tensor | None) -> Tensor:
        """Loss of logits (B, C), for masks (B, C) of present labels and of pairs that count (None: all)."""
        values = self.pairwise(logits, positive)
        if counted is None:
            return values.sum() / values.numel()
        return (values * counted).sum() / counted.sum().clamp(min=1)

    def pairwise(self, logits: Tensor, positive: Tensor) -> Tensor:
        """Loss (B, C) of each image and label."""
        raise NotImplementedError

    def __repr__(self) -> str:
        voc = ", target_format='voc'" if self.target_format == "voc" else ""
        own = "".join(f"{name}={getattr(self, name)}, " for name in self._own)
        return f"{type(self).__name__}(C={self.label_ratio.numel()}, {own}difficult={self.difficult!r}{voc})"


@LOSSES.register("weighted_bce")
class WeightedBCE(MultiLabelLoss):
    r"""Weighted binary cross-entropy, averaged over images and labels (eq. 15).

    .. math::
        L = -\frac{1}{BC} \sum_{i,c} w_{ic} \left[ y_{ic} \log p_{ic} + (1 - y_{ic}) \log(1 - p_{ic}) \right], \quad
        w_{ic} = y_{ic} e^{\beta (1 - r_c)} + (1 - y_{ic}) e^{\beta r_c}

    The paper sums over images and labels instead of averaging, and omits the minus sign. With ``beta=0`` the loss
    equals :func:`torch.nn.functional.binary_cross_entropy_with_logits`.

    Args:
        label_ratio: (C,) :math:`r_c`, the fraction of training images with label c.
        beta: :math:`\beta`, the weight of rare labels (0: unweighted; the paper uses 0 on VOC 2007 and 0.4 on COCO and
            NUS-WIDE).
        difficult, target_format, allow_all_present, validate_args: see :class:`MultiLabelLoss`.
    """

    _own = ("beta",)

    @checked
    def __init__(
        self,
        label_ratio: Tensor,
        beta: NotNegative = 0.0,
        difficult: DifficultRule = "positive",
        target_format: TargetFormat = "binary",
        *,
        allow_all_present: bool = False,
        validate_args: bool = True,
    ) -> None:
        super().__init__(
            label_ratio, difficult, target_format, allow_all_present=allow_all_present, validate_args=validate_args
        )
        self.beta = beta

    def pairwise(self, logits: Tensor, positive: Tensor) -> Tensor:
        ratio = self.label_ratio.to(logits.dtype)
        weight = torch.where(positive, torch.exp(self.beta * (1 - ratio)), torch.exp(self.beta * ratio))
        y = positive.to(logits.dtype)
        return nn.functional.binary_cross_entropy_with_logits(logits, y, weight, reduction="none")


@LOSSES.register("asymmetric")
class AsymmetricLoss(MultiLabelLoss):
    r"""Asymmetric loss (ASL), averaged over images and labels (Ridnik et al., ICCV 2021, section 2).

    .. math::
        L_{ic} = -y_{ic} (1 - p_{ic})^{\gamma_+} \log p_{ic} - (1 - y_{ic}) \, q_{ic}^{\gamma_-} \log(1 - q_{ic}), \quad
        q_{ic} = \max(p_{ic} - m, 0)

    Absent labels that are easy have little or no weight. The authors' code sums over images and labels instead of
    averaging, and does not differentiate the factors with :math:`\gamma` (here: it does, as in the formula).

    Args:
        label_ratio: see :class:`MultiLabelLoss`; only C is used.
        gamma_positive: :math:`\gamma_+` (default: 0, the paper's).
        gamma_negative: :math:`\gamma_-` (default: 4, the paper's).
        margin: m, the probability below which an absent label has no loss (default: 0.05, the paper's).
        difficult, target_format, allow_all_present, validate_args: see :class:`MultiLabelLoss`.
    """

    _own = ("gamma_positive", "gamma_negative", "margin")

    @checked
    def __init__(
        self,
        label_ratio: Tensor,
        gamma_positive: NotNegative = 0.0,
        gamma_negative: NotNegative = 4.0,
        margin: Fraction = 0.05,
        difficult: DifficultRule = "positive",
        target_format: TargetFormat = "binary",
        *,
        allow_all_present: bool = False,
        validate_args: bool = True,
    ) -> None:
        super().__init__(
            label_ratio, difficult, target_format, allow_all_present=allow_all_present, validate_args=validate_args
        )
        self.gamma_positive, self.gamma_negative, self.margin = gamma_positive, gamma_negative, margin

    def pairwise(self, logits: Tensor, positive: Tensor) -> Tensor:
        q = (logits.sigmoid() - self.margin).clamp(min=0)
        # With m = 0, log(1 - q) from the logit; otherwise q < 1 - m.
        log_absent = nn.functional.logsigmoid(-logits) if self.margin == 0 else torch.log1p(-q)
        present = -nn.functional.logsigmoid(logits) * _power((-logits).sigmoid(), self.gamma_positive)
        return torch.where(positive, present, -log_absent * _power(q, self.gamma_negative))


@LOSSES.register("focal")
class FocalLoss(MultiLabelLoss):
    r"""Focal loss, averaged over images and labels (Lin et al., ICCV 2017, eq. 5).

    .. math::
        L_{ic} = -\alpha y_{ic} (1 - p_{ic})^\gamma \log p_{ic}
        - (1 - \alpha) (1 - y_{ic}) \, p_{ic}^\gamma \log(1 - p_{ic})

    Args:
        label_ratio: see :class:`MultiLabelLoss`; only C is used.
        gamma: :math:`\gamma`, focus on hard pairs (default: 2, the paper's).
        alpha: :math:`\alpha`, weight of present labels; absent ones have 1 - alpha (default: 0.25, the paper's).
        difficult, target_format, allow_all_present, validate_args: see :class:`MultiLabelLoss`.
    """

    _own = ("gamma", "alpha")

    @checked
    def __init__(
        self,
        label_ratio: Tensor,
        gamma: NotNegative = 2.0,
        alpha: Probability = 0.25,
        difficult: DifficultRule = "positive",
        target_format: TargetFormat = "binary",
        *,
        allow_all_present: bool = False,
        validate_args: bool = True,
    ) -> None:
        super().__init__(
            label_ratio, difficult, target_format, allow_all_present=allow_all_present, validate_args=validate_args
        )
        self.gamma, self.alpha = gamma, alpha

    def pairwise(self, logits: Tensor, positive: Tensor) -> Tensor:
        right = torch.where(positive, logits, -logits)  # logit of the probability of what is true
        weight = torch.where(positive, logits.new_tensor(self.alpha), logits.new_tensor(1 - self.alpha))
        return -weight * _power((-right).sigmoid(), self.gamma) * nn.functional.logsigmoid(right)


@LOSSES.register("warp")
class WARPLoss(MultiLabelLoss):
    r"""Weighted approximate ranking (WARP), averaged over images and labels (Gong et al., ICLR 2014, section 3).

    .. math::
        L = \frac{1}{BC} \sum_i \sum_{j: y_{ij} = 1} \frac{1}{r_{ij}} \sum_{l=1}^{r_{ij}} \frac 1 l
        \sum_{k: y_{ik} = 0} \max(0, 1 - s_{ij} + s_{ik})

    :math:`r_{ij}` is the number of absent labels within the margin of label j. The paper estimates it by drawing labels
    until one is within the margin, and adds the term of this label only; here it is counted, and the terms are
    averaged, which is the expectation over uniform draws. Logits are ranked and not calibrated: a probability of 0.5
    has no meaning, and CF1 and OF1 need fitted thresholds (``gm-mlic eval calibrate=true``).

    Args:
        label_ratio: see :class:`MultiLabelLoss`; only C is used.
        difficult, target_format, allow_all_present, validate_args: see :class:`MultiLabelLoss`; with
            ``difficult="ignore"``, they are neither present nor absent.
    """

    def loss(self, logits: Tensor, positive: Tensor, counted: Tensor | None) -> Tensor:
        counts = torch.ones_like(positive) if counted is None else counted
        pairs = (positive & counts)[:, :, None] & (~positive & counts)[:, None, :]  # (B, j, k)
        margins = (1 - logits[:, :, None] + logits[:, None, :]).clamp(min=0) * pairs
        rank = (margins > 0).sum(dim=2)
        steps = torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)
        harmonic = steps.reciprocal().cumsum(0)
        weight = torch.where(rank > 0, harmonic[(rank - 1).clamp(min=0)] / rank.clamp(min=1), 0)
        return (weight * margins.sum(dim=2)).sum() / (logits.numel() if counted is None else counted.sum().clamp(min=1))


def _power(base: Tensor, exponent: float) -> Tensor:
    """A power whose gradient at 0 is finite; the first power needs none."""
    return base**exponent if exponent >= 1 else base.clamp(min=1e-12) ** exponent if exponent else torch.ones_like(base)
