"""Rank and world size of this process, started by torchrun, srun or Lightning, or alone.

They are read from the environment, because they are needed before there is a trainer: to divide the extraction, and
because only rank 0 prints and writes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class RankInfo:
    """The rank of a process among those of its run.

    Attributes:
        rank: over all machines.
        world_size: number of processes.
        local_rank: on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


#: How torchrun and srun name rank, world size and local rank.
_NAMES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


def launcher() -> str | None:
    """``torchrun``, ``srun`` or ``lightning``; None for a single process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # Lightning takes these two names for a shell on the cluster, and so do we.
    is_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if not is_shell and all(name in os.environ for name in _NAMES["srun"]):
        return "srun"
    return "lightning" if "LOCAL_RANK" in os.environ else None


def rank_info() -> RankInfo:
    """The rank of this process."""
    started_by = launcher()
    if started_by is None:
        return RankInfo()
    if started_by in _NAMES:
        return RankInfo(*(int(os.environ[name]) for name in _NAMES[started_by]))
    # Lightning starts the other processes of one machine when the first is about to train, and forgets WORLD_SIZE
    # when it has.
    local_rank = int(os.environ["LOCAL_RANK"])
    return RankInfo(local_rank, int(os.environ.get("WORLD_SIZE", local_rank + 1)), local_rank)
