"""How fast a training step is: methods in turns, beside the official style and beside what the machine can do.

Example:
    >>> from instar.bench import bench
    >>> small = {"model": "small_cnn", "width": 4, "batch_size": 8, "device": "cpu"}
    >>> found = bench(["pgd_at", "gairat"], turns=2, steps=1, measure_memory=False, **small)
    >>> [row.name for row in found.rows]
    ['pgd_at', 'gairat']
"""

from instar.bench.clocks import CLOCKS, Ratio, Turn, in_turns, ratio_of
from instar.bench.draw import bars
from instar.bench.measure import MAIN, bench
from instar.bench.official import OFFICIAL, Budget, official
from instar.bench.rates import matmul_rate, operations
from instar.bench.result import Benchmark, Row
from instar.bench.subject import SWITCHES, Case, Subject, prepare

__all__ = [
    "CLOCKS",
    "MAIN",
    "OFFICIAL",
    "SWITCHES",
    "Benchmark",
    "Budget",
    "Case",
    "Ratio",
    "Row",
    "Subject",
    "Turn",
    "bars",
    "bench",
    "in_turns",
    "matmul_rate",
    "official",
    "operations",
    "prepare",
    "ratio_of",
]
