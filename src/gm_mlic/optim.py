"""Learning-rate schedules for detector and model training."""

from __future__ import annotations

import torch


def one_cycle(
    optimizer: torch.optim.Optimizer, rates: list[float], steps: int, pct_start: float
) -> torch.optim.lr_scheduler.OneCycleLR:
    """One-cycle schedule of torch, adjusted for short runs, where a phase of one step would divide by zero.

    Args:
        optimizer: optimizer to schedule.
        rates: maximum learning rate per parameter group.
        steps: total number of steps.
        pct_start: fraction of steps with increasing learning rate; at least two steps.
    """
    steps = max(steps, 4)
    pct_start = min(max(pct_start, 2 / steps), 1 - 1 / steps)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=pct_start)
