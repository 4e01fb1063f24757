"""Host time of a decode step: schedule, pack and unpack, without the engine."""

from collections.abc import Iterator
from statistics import median

from host_time import BUDGET_MS, measure
from lines import Line

CONTEXT, STEPS = 1024, 300


def host() -> Iterator[Line]:
    for batch_size, budget in BUDGET_MS.items():
        milliseconds = median(measure(False, batch_size, CONTEXT, STEPS, {"temperature": 0.0}))
        yield Line(f"host time of a step, batch {batch_size}, context {CONTEXT}", "ms", milliseconds, None, budget)
