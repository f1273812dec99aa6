"""Random and stratified train/val/test splits."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from gm_mlic.errors import ArgumentError
from gm_mlic.targets import normalize_targets

Split = Literal["train", "val", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


def rows_of(split: str, count: int, val_fraction: float, seed: int) -> np.ndarray:
    """Rows of ``split`` in an official set of ``count`` images, ascending.

    ``test`` has all rows. Otherwise, ``val`` has ``round(val_fraction * count)`` rows of a seeded permutation, at least
    one unless the fraction is 0, and ``train`` the others.

    Raises:
        ConfigError: if the split is empty.
    """
    if split == "test":
        return np.arange(count)
    held_out = max(1, round(val_fraction * count)) if val_fraction else 0
    order = np.random.default_rng(seed).permutation(count)
    rows = np.sort(order[:held_out] if split == "val" else order[held_out:])
    if count and not rows.size:
        raise ArgumentError(
            "val_fraction", f"is {val_fraction}, which leaves no image of {count} for split {split!r}: change it."
        )
    return rows


def stratified(targets: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Iterative stratification: hold out rows such that each label keeps its frequency in both parts.

    Sechidis, Tsoumakas and Vlahavas (2011): the rarest remaining label is distributed first; its rows count towards
    their other labels too. Here all rows of a label are drawn at random at once, not one by one. Rows without labels
    are drawn last, to reach the total.

    Args:
        targets: (N, C) in {0, 1}.
        fraction: fraction of the rows to hold out, in [0, 1].
        seed: seed of the draw.

    Returns:
        (N,) bool, True for held-out rows: ``round(fraction * N)`` of them, at least one for a fraction above 0.
    """
    rng = np.random.default_rng(seed)
    present, _ = normalize_targets(targets)
    N = len(present)
    wanted_rows = max(1, round(fraction * N)) if fraction and N else 0
    wanted = fraction * present.sum(axis=0)
    held_out, left = np.zeros(N, dtype=bool), np.ones(N, dtype=bool)
    remaining = present.sum(axis=0)
    while remaining.any():
        label = int(np.where(remaining > 0, remaining, N + 1).argmin())
        rows = np.flatnonzero(left & present[:, label])
        room = wanted_rows - int(held_out.sum())
        take = int(np.clip(np.floor(wanted[label] + 0.5), 0, min(len(rows), room)))
        chosen = rng.permutation(rows)[:take]
        held_out[chosen] = True
        left[rows] = False
        wanted -= present[chosen].sum(axis=0)
        remaining -= present[rows].sum(axis=0)
    # If most labels are rare, rounding leaves too few rows: fill up with any rows.
    for rows in (np.flatnonzero(left), np.flatnonzero(~held_out)):
        room = wanted_rows - int(held_out.sum())
        held_out[rng.permutation(rows[~held_out[rows]])[:room]] = True
    return held_out
