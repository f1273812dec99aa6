"""Process settings that must be made before torch is imported, in the main process and in jobs of a launcher."""

from __future__ import annotations

import contextlib
import ctypes
import os


def prepare_process() -> None:
    """Configure OpenMP threads, the memory allocator and matplotlib."""
    # Spin count of idle OpenMP threads, read when torch is imported. The default spins long and takes the core from
    # other processes. Without spinning, each of the network's many small operations has to wake threads, which halves
    # the speed on two cores.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # By default glibc maps and zeroes the pages of each large tensor again, a quarter of the time of a graph network on
    # a CPU. Other C libraries are not changed.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    os.environ["MPLBACKEND"] = "agg"  # figures are only written to files; the user's backend may need a screen
