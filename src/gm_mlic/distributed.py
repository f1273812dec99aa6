"""Which of a run's processes this one is: one of torchrun's, of srun's, of Lightning's, or the only one.

Read from the environment alone, because it is needed before there is a trainer: to divide the extraction, and to know
who speaks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The place of a process among those of its run.

    Attributes:
        rank: its number, over all machines.
        count: how many there are.
        local: its number on this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0


#: How torchrun and srun name rank, count and local rank.
_NAMES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


def started_by() -> str | None:
    """``torchrun``, ``srun`` or ``lightning``; None if this is a process of its own."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    # Lightning takes these two names for a shell on the cluster, and so do we.
    is_shell = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if not is_shell and all(name in os.environ for name in _NAMES["srun"]):
        return "srun"
    return "lightning" if "LOCAL_RANK" in os.environ else None


def place() -> Place:
    """The place of this process."""
    starter = started_by()
    if starter is None:
        return Place()
    if starter in _NAMES:
        return Place(*(int(os.environ[name]) for name in _NAMES[starter]))
    # Lightning starts the other processes of one machine when the first is about to train, and forgets WORLD_SIZE
    # when it has.
    local = int(os.environ["LOCAL_RANK"])
    return Place(local, int(os.environ.get("WORLD_SIZE", local + 1)), local)
