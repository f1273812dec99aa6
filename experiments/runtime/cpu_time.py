"""``gm-mlic bench`` with CPU time instead of wall time, for a machine that other jobs share.

    OMP_NUM_THREADS=1 python experiments/runtime/cpu_time.py bench.cases=[voc2007]     # arguments of gm-mlic bench

CPU time does not include the time in which other jobs run. With one thread, it is the wall time of an idle machine.
"""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

from gm_mlic.bench import measure
from gm_mlic.cli.main import main

if __name__ == "__main__":
    measure.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[attr-defined]
    main(["bench", *sys.argv[1:]])
