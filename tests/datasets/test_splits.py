from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlic.datasets.splits import rows_of, stratified
from gm_mlic.errors import ConfigError


@given(st.integers(2, 300), st.floats(0, 0.99), st.integers(0, 9))
def test_val_and_train_partition_the_rows(count: int, fraction: float, seed: int) -> None:
    held_out = max(1, round(fraction * count)) if fraction else 0
    assert (rows_of("test", count, fraction, seed) == np.arange(count)).all()
    if 0 < held_out < count:
        val, train = (rows_of(split, count, fraction, seed) for split in ("val", "train"))
        assert sorted([*val, *train]) == list(range(count))
        assert len(val) == held_out
        assert (np.diff(val) > 0).all()
        assert (np.diff(train) > 0).all()
        assert (rows_of("val", count, fraction, seed) == val).all()
    else:
        empty, full = ("train", "val") if held_out else ("val", "train")
        assert (rows_of(full, count, fraction, seed) == np.arange(count)).all()
        with pytest.raises(ConfigError, match="leaves no image"):
            rows_of(empty, count, fraction, seed)


def test_rows_depend_on_the_seed() -> None:
    assert rows_of("val", 1000, 0.1, 0).tolist() != rows_of("val", 1000, 0.1, 1).tolist()


@given(st.integers(0, 60), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=200)
def test_stratified_holds_out_the_requested_number(N: int, C: int, fraction: float, seed: int) -> None:
    targets = np.random.default_rng(seed).choice([1, 0], (N, C), p=[0.3, 0.7])
    before = targets.copy()
    out = stratified(targets, fraction, seed)
    assert out.shape == (N,)
    assert out.dtype == bool
    assert (targets == before).all()
    assert (stratified(targets, fraction, seed) == out).all()
    wanted = max(1, round(fraction * N)) if fraction and N else 0
    assert out.sum() == wanted


def test_stratified_keeps_label_frequencies() -> None:
    rng = np.random.default_rng(3)
    ratio = np.array([0.002, 0.01, 0.05, 0.2, 0.5])
    targets = (rng.random((5000, 5)) < ratio).astype(np.int8)
    out = stratified(targets, 0.2, 0)
    count, held = (targets == 1).sum(axis=0), (targets[out] == 1).sum(axis=0)
    assert abs(out.sum() - 1000) <= 5
    assert (np.abs(held - 0.2 * count) <= 1 + 0.02 * count).all()


def test_stratified_keeps_rare_labels_in_both_parts() -> None:
    targets = np.zeros((400, 2))
    targets[:, 0] = 1
    targets[:4, 1] = 1
    for seed in range(20):
        assert (targets[stratified(targets, 0.25, seed)][:, 1] == 1).sum() == 1


@pytest.mark.shared
def test_nuswide_in_seconds(shared_data: Path) -> None:
    """161,789 rows and 81 labels, as in NUS-WIDE's training list."""
    with np.load(shared_data / "labels" / "nuswide81.npz") as file:
        targets = np.unpackbits(file["rows"][:161_789], axis=1)[:, :81].astype(np.int8)
    out = stratified(targets, 0.1, 0)
    assert abs(out.sum() - 16_179) <= 1
    ratio = (targets[out] == 1).mean(axis=0) / (targets == 1).mean(axis=0)
    assert (np.abs(ratio - 1) < 0.12).all()  # the rarest label has 45 positives: 5 instead of 4.5
