from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gm_mlic.errors import ConfigError
from gm_mlic.losses import AsymmetricLoss, FocalLoss, MultiLabelLoss, WARPLoss, WeightedBCE


def loop(logits: Tensor, targets: Tensor, ratio: Tensor, beta: float, difficult: str) -> float:
    """Eq. 15 as a loop over probabilities."""
    total, count = 0.0, 0
    for b in range(logits.shape[0]):
        for c in range(logits.shape[1]):
            target, r = int(targets[b, c]), float(ratio[c])
            if target == 0:
                if difficult == "ignore":
                    continue
                target = 1 if difficult == "positive" else -1
            p = 1 / (1 + math.exp(-float(logits[b, c])))
            y = (target + 1) / 2
            w = y * math.exp(beta * (1 - r)) + (1 - y) * math.exp(beta * r)
            total -= w * (y * math.log(p) + (1 - y) * math.log(1 - p))
            count += 1
    return total / max(count, 1)


def case(B: int = 4, C: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(B, C, generator=generator, dtype=torch.float64)
    return logits, torch.randint(-1, 2, (B, C), generator=generator), torch.rand(C, generator=generator).double()


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 4),
    C=st.integers(1, 4),
    beta=st.sampled_from([0.0, 0.4, 2.0]),
    difficult=st.sampled_from(["positive", "negative", "ignore"]),
    seed=st.integers(0, 1000),
)
def test_equals_a_loop(B: int, C: int, beta: float, difficult: str, seed: int) -> None:
    logits, targets, ratio = case(B, C, seed)
    loss = WeightedBCE(ratio, beta, difficult, "voc", allow_all_present=True)(logits, targets)
    assert loss.dtype == torch.float64
    assert float(loss) == pytest.approx(loop(logits, targets, ratio, beta, difficult), rel=1e-12, abs=1e-12)


def test_beta_zero_equals_binary_cross_entropy() -> None:
    logits, targets, ratio = case()
    targets = targets == 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.double())
    torch.testing.assert_close(WeightedBCE(ratio)(logits, targets), expected)


def test_weights_of_rare_labels() -> None:
    loss, zero = WeightedBCE(torch.tensor([0.1, 0.9]), beta=1.0), torch.zeros(1, 1)
    term = {
        (y, r): float(WeightedBCE(torch.tensor([r]), beta=1.0)(zero, torch.tensor([[y]])))
        for y in (1, 0)
        for r in (0.1, 0.9)
    }
    assert term[1, 0.1] == pytest.approx(math.log(2) * math.exp(0.9))
    assert term[0, 0.1] == pytest.approx(math.log(2) * math.exp(0.1))
    assert term[1, 0.1] > term[1, 0.9]
    assert term[0, 0.1] < term[0, 0.9]
    assert float(loss(torch.zeros(1, 2), torch.tensor([[1, 1]]))) == pytest.approx((term[1, 0.1] + term[1, 0.9]) / 2)


def test_ignored_targets_have_no_gradient() -> None:
    logits, targets, ratio = case()
    logits.requires_grad_()
    WeightedBCE(ratio, 0.4, "ignore", "voc")(logits, targets).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad == 0, targets == 0)


def test_all_ignored_is_zero() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    everything = torch.ones(2, 3, dtype=torch.bool)
    loss = WeightedBCE(torch.full((3,), 0.5), 0.4, "ignore")(logits, torch.zeros(2, 3), everything)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not bool(logits.grad.any())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("target", [1, 0])
def test_extreme_logits(sign: int, target: int) -> None:
    logits = torch.tensor([[sign * 1e4]], requires_grad=True)
    loss = WeightedBCE(torch.tensor([0.5]))(logits, torch.tensor([[target]]))
    loss.backward()
    assert logits.grad is not None
    wrong = (sign == 1) != (target == 1)
    assert loss.item() == pytest.approx(1e4 if wrong else 0.0)
    assert float(logits.grad) == pytest.approx(sign if wrong else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, targets, ratio = case()
    half = logits.to(dtype)
    loss = WeightedBCE(ratio, 0.4, target_format="voc")(half, targets)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(loop(half.double(), targets, ratio, 0.4, "positive"), rel=1e-5)


@pytest.mark.parametrize("difficult", ["positive", "negative", "ignore"])
def test_gradcheck(difficult: str) -> None:
    logits, targets, ratio = case(3, 2)
    loss = WeightedBCE(ratio, 0.4, difficult, "voc")
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), (logits.requires_grad_(),))


@pytest.mark.parametrize(
    ("ratio", "options", "message"),
    [
        ([0.5, 1.1], {}, "label_ratio"),
        ([-0.1], {}, "label_ratio"),
        ([float("nan")], {}, "label_ratio"),
        ([0.5], {"beta": -0.1}, "^beta must"),
        ([0.5], {"beta": float("inf")}, "^beta must"),
        ([0.5], {"beta": float("nan")}, "^beta must"),
        ([0.5], {"difficult": "maybe"}, "positive, negative, ignore; got 'maybe'"),
        ([0.5], {"target_format": "pm1"}, "target_format must be one of binary, voc; got 'pm1'"),
    ],
)
def test_invalid_arguments(ratio: list[float], options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightedBCE(torch.tensor(ratio), **options)  # type: ignore[arg-type]


def test_logits_of_another_kind_are_refused() -> None:
    loss = WeightedBCE(torch.rand(3))
    with pytest.raises(ConfigError, match=r"^logits are torch.int64: expected floating-point"):
        loss(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3))
    for logits in (torch.rand(2, 4), torch.tensor(0.5)):
        with pytest.raises(ConfigError, match=r"^logits have shape .*, label_ratio has 3 labels"):
            loss(logits, torch.ones(2, 4))


def test_empty_batch_is_nan() -> None:
    assert WeightedBCE(torch.rand(3))(torch.rand(0, 3), torch.ones(0, 3)).isnan()


def test_repr() -> None:
    assert repr(WeightedBCE(torch.rand(3), 0.4, "ignore")) == "WeightedBCE(C=3, beta=0.4, difficult='ignore')"


def masks(targets: Tensor, difficult: str) -> tuple[Tensor, Tensor]:
    """Present and counted pairs of targets in {1, 0, -1}."""
    present = (targets == 1) | ((targets == 0) & (difficult == "positive"))
    return present, (targets != 0) if difficult == "ignore" else torch.ones_like(present)


def asymmetric_loop(logits: Tensor, targets: Tensor, difficult: str, plus: float, minus: float, m: float) -> float:
    present, counted = masks(targets, difficult)
    total = 0.0
    for s, y, counts in zip(logits.flatten().tolist(), present.flatten(), counted.flatten(), strict=True):
        p = 1 / (1 + math.exp(-s))
        q = max(p - m, 0)
        value = -((1 - p) ** plus) * math.log(p) if y else -(q**minus) * math.log(1 - q)
        total += value if counts else 0
    return total / max(1, int(counted.sum()))


def warp_loop(logits: Tensor, targets: Tensor, difficult: str) -> float:
    present, counted = masks(targets, difficult)
    total = 0.0
    for s, y, counts in zip(logits.tolist(), present.tolist(), counted.tolist(), strict=True):
        for j in range(len(s)):
            if not (y[j] and counts[j]):
                continue
            over = [1 - s[j] + s[k] for k in range(len(s)) if counts[k] and not y[k] and 1 - s[j] + s[k] > 0]
            if over:
                total += sum(1 / rank for rank in range(1, len(over) + 1)) * sum(over) / len(over)
    return total / max(1, int(counted.sum()))


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 4),
    C=st.integers(1, 5),
    difficult=st.sampled_from(["positive", "negative", "ignore"]),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]),
    share=st.sampled_from([0.0, 0.05, 0.25, 0.75]),
    seed=st.integers(0, 1000),
)
def test_losses_of_other_papers_equal_loops(
    B: int, C: int, difficult: str, gamma: float, share: float, seed: int
) -> None:
    logits, targets, ratio = case(B, C, seed)
    options = {"difficult": difficult, "target_format": "voc", "allow_all_present": True}
    present, counted = masks(targets, difficult)
    weight = share * present.double() + (1 - share) * (~present).double()
    right = torch.where(present, logits.sigmoid(), 1 - logits.sigmoid())
    focal = (-weight * (1 - right) ** gamma * right.log())[counted].sum() / counted.sum().clamp(min=1)
    asymmetric = (1.0, gamma, share), (gamma, 4.0, share)
    for loss, expected in (
        *((AsymmetricLoss(ratio, *s, **options), asymmetric_loop(logits, targets, difficult, *s)) for s in asymmetric),
        (FocalLoss(ratio, gamma, share, **options), float(focal)),
        (WARPLoss(ratio, **options), warp_loop(logits, targets, difficult)),
    ):  # fmt: skip
        assert float(loss(logits, targets)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


LOSSES: list[MultiLabelLoss] = [
    WeightedBCE(torch.full((3,), 0.5)), AsymmetricLoss(torch.full((3,), 0.5)), FocalLoss(torch.full((3,), 0.5)),
    WARPLoss(torch.full((3,), 0.5)),
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_gradients_of_extreme_logits_are_finite(loss: MultiLabelLoss) -> None:
    for size in (0.0, 1e-3, 30.0, 1e4):
        logits = torch.tensor([[size, -size, size]], requires_grad=True)
        value = loss(logits, torch.tensor([[1, 1, 0]]))
        value.backward()
        assert math.isfinite(value.item())
        assert logits.grad is not None
        assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_less_loss_after_a_step(loss: MultiLabelLoss) -> None:
    logits = torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.1, -0.1]], requires_grad=True)
    targets = torch.tensor([[1, 0, 0], [0, 1, 1]])
    before = loss(logits, targets)
    (gradient,) = torch.autograd.grad(before, logits)
    assert loss(logits - 0.1 * gradient, targets).item() < before.item()
    assert bool((gradient * (2 * targets - 1) <= 0).all())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AsymmetricLoss, {"gamma_negative": -1}, "^gamma_negative must be a number of at least 0; got -1"),
        (AsymmetricLoss, {"margin": 1.0}, "^margin must be a number of at least 0 and below 1; got 1.0"),
        (FocalLoss, {"gamma": float("nan")}, "^gamma must be a number of at least 0; got nan"),
        (FocalLoss, {"alpha": 2}, "^alpha must be a number from 0 to 1; got 2"),
    ],
)
def test_invalid_arguments_of_other_losses(kind: type, options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(torch.rand(3), **options)


def test_repr_of_other_losses() -> None:
    assert repr(LOSSES[1]) == (
        "AsymmetricLoss(C=3, gamma_positive=0.0, gamma_negative=4.0, margin=0.05, difficult='positive')"
    )
    assert repr(LOSSES[3]) == "WARPLoss(C=3, difficult='positive')"
