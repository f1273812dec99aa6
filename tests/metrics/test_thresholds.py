from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlic.errors import DataError
from gm_mlic.metrics import Convention, MultiLabelMetrics, fit_thresholds, get_convention


def f1(scores: list[float], targets: list[int], threshold: float, rule: Convention) -> float:
    """F1 of one label by definition."""
    tp = fp = fn = 0
    for score, target in zip(scores, targets, strict=True):
        if target == 0 and rule.difficult_f1 == "ignore":
            continue
        positive = target == 1 or (target == 0 and rule.difficult_f1 == "positive")
        chosen = score >= threshold if rule.compare == "ge" else score > threshold
        tp += chosen and positive
        fp += chosen and not positive
        fn += positive and not chosen
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, width=32)), st.sampled_from([-1, 0, 1])),
        min_size=1,
        max_size=15,
    ),
    difficult=st.sampled_from(["ignore", "negative", "positive"]),
    compare=st.sampled_from(["ge", "gt"]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_fitted_thresholds_are_optimal(
    rows: list[tuple[float, int]], difficult: str, compare: str, dtype: type
) -> None:
    """Compared with every score and every midpoint between scores."""
    scores, targets = [s for s, _ in rows], [t for _, t in rows]
    rule = Convention(difficult_f1=difficult, compare=compare, threshold=0.25)
    table = torch.from_numpy(np.array(scores, dtype=dtype)[:, None])
    (fitted,) = fit_thresholds(
        table, torch.tensor(targets)[:, None], rule, target_format="voc", allow_all_present=True
    ).tolist()
    assert 0 <= fitted <= 1
    levels = sorted({0.0, 1.0, *scores})
    tried = [*levels, *((a + b) / 2 for a, b in itertools.pairwise(levels))]
    best = max(f1(scores, targets, t, rule) for t in tried)
    if best == 0:
        assert fitted == 0.25
    else:
        assert f1(scores, targets, fitted, rule) == pytest.approx(best)


def test_manual_example() -> None:
    scores = torch.tensor([[0.9, 0.9, 0.4], [0.8, 0.8, 0.4], [0.3, 0.3, 0.1], [0.2, 0.2, 0.2]], dtype=torch.float64)
    targets = torch.tensor([[1, 0, 0], [1, 0, 1], [1, 0, 0], [0, 0, 1]])
    # Label 0: scores >= 0.3 pass; label 1: no positive; label 2: {0.4, 0.4} has F1 1/2, {0.4, 0.4, 0.2} has 4/5.
    fitted = fit_thresholds(scores, targets)
    torch.testing.assert_close(fitted, torch.tensor([0.25, 0.5, 0.15], dtype=torch.float64))
    assert fit_thresholds(scores, targets, get_convention("asl"))[1] == 0.8


def test_ties_are_resolved_to_the_highest_threshold() -> None:
    # {0.9}: 2/3 (P 1, R 1/2); all four: 2/3 (P 1/2, R 1).
    scores = torch.tensor([[0.9], [0.6], [0.5], [0.2]])
    assert fit_thresholds(scores, torch.tensor([[1], [0], [0], [1]])).item() == pytest.approx(0.75)


def test_adjacent_floats_are_separated() -> None:
    low = np.float32(0.5)
    scores = torch.tensor([[np.nextafter(low, np.float32(1))], [low]])
    targets = torch.tensor([[1], [0]])
    for compare in ("ge", "gt"):
        rule = Convention(compare=compare)
        metrics = MultiLabelMetrics(1, compare=compare, threshold=fit_thresholds(scores, targets, rule))
        metrics.update(scores, targets)
        assert metrics.compute()["OF1"] == 100


def test_fitted_thresholds_do_not_lower_f1_on_fitted_images() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(300, 6, generator=generator) < 0.2).int()
    scores = torch.sigmoid(torch.randn(300, 6, generator=generator) + 4 * targets - 3)
    values = []
    for threshold in (0.5, fit_thresholds(scores, targets)):
        metrics = MultiLabelMetrics(6, f1="mean_f1", threshold=threshold)
        metrics.update(scores, targets)
        values.append(metrics.compute())
    assert values[1]["CF1"] > values[0]["CF1"]
    assert values[1]["mAP"] == values[0]["mAP"]


def test_invalid_input() -> None:
    with pytest.raises(DataError, match="differ in shape"):
        fit_thresholds(torch.rand(3, 2), torch.ones(2, 2))
    with pytest.raises(DataError, match="no scores to fit"):
        fit_thresholds(torch.rand(0, 2), torch.ones(0, 2))
