from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gm_mlic.errors import ConfigError
from gm_mlic.losses import WeightedBCE


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
        ([0.5], {"target_format": "pm1"}, "target_format is 'pm1': choose binary"),
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
