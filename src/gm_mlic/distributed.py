"""Rank and world size of this process under torchrun, srun or Lightning.

They are read from the environment, because they are needed before a trainer exists: to divide the extraction, and to
print and write only on rank 0.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class RankInfo:
    """Rank of a process.

    Attributes:
        rank: global rank.
        world_size: number of processes.
        local_rank: rank on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


#: Environment variables of rank, world size and local rank.
_NAMES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


def launcher() -> str | None:
    """Launcher of this process: ``torchrun``, ``srun`` or ``lightning``; None for a single process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # These job names mean an interactive shell, as in Lightning.
    is_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if not is_shell and all(name in os.environ for name in _NAMES["srun"]):
        return "srun"
    return "lightning" if "LOCAL_RANK" in os.environ else None


def rank_info() -> RankInfo:
    """Rank, world size and local rank of this process."""
    kind = launcher()
    if kind is None:
        return RankInfo()
    if kind in _NAMES:
        return RankInfo(*(int(os.environ[name]) for name in _NAMES[kind]))
    # Lightning starts the other local processes just before training and unsets WORLD_SIZE afterwards.
    local_rank = int(os.environ["LOCAL_RANK"])
    return RankInfo(local_rank, int(os.environ.get("WORLD_SIZE", local_rank + 1)), local_rank)
