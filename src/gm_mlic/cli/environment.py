"""What a process of ours needs before torch is imported: the first, and those that a launcher starts for its jobs."""

from __future__ import annotations

import ctypes
import os
import warnings


def prepare_process() -> None:
    """Set how threads wait and memory is kept, and silence what is not for users to mend."""
    # How long a thread that waits for work spins before it sleeps. Spinning long (OpenMP's habit) takes the core from
    # other processes; not at all, and each of a graph network's many small operations has to wake a sleeper, which
    # halves the speed on two cores. Read when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    _keep_memory()
    # PyG's use of TorchScript is not for our users to mend.
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script", category=FutureWarning)


def _keep_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones.

    By itself it maps large tensors anew each time, and the kernel zeroes them page by page: a quarter of the time of a
    graph network on a CPU. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
