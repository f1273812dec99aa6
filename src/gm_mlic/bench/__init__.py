"""Benchmarks of time and memory of dense and sparse execution."""

from gm_mlic.bench.measure import FlopCounter, interleaved, matrix_rate, peak_bytes
from gm_mlic.bench.runtime import CASES, EXECUTIONS, Case, compare, grow, ratios, shares

__all__ = [
    "CASES",
    "EXECUTIONS",
    "Case",
    "FlopCounter",
    "compare",
    "grow",
    "interleaved",
    "matrix_rate",
    "peak_bytes",
    "ratios",
    "shares",
]
