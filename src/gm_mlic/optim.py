"""Learning-rate schedules, of the detector's training and the model's."""

from __future__ import annotations

import torch


def one_cycle(
    optimizer: torch.optim.Optimizer, rates: list[float], steps: int, pct_start: float
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Torch's one-cycle schedule, which divides by zero where a phase has a single step: in runs of few steps.

    Args:
        optimizer: its groups' learning rates are scheduled.
        rates: the highest learning rate of each group.
        steps: in all.
        pct_start: share of them in which the learning rate rises; at least two steps.
    """
    steps = max(steps, 4)
    pct_start = min(max(pct_start, 2 / steps), 1 - 1 / steps)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=pct_start)
