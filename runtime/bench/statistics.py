"""Percentiles of what was measured."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Of a sample; in the sample's unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def summary(sample: Iterable[float]) -> Summary | None:
    """None when the sample is empty."""
    values = np.fromiter(sample, np.float64)
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99]).tolist()
    return Summary(len(values), float(values.mean()), p50, p90, p99, float(values.max()))
