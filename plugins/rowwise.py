"""What kernels with one program for each row have in common: block sizes, fp8 rows."""

from typing import Any

import numpy as np
import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
SCALE_FLOOR = tl.constexpr(1e-12)
"""Scale of a row of zeros; small enough for any other row."""


def block_of(width: int) -> int:
    """Elements of the block that holds a row of `width`."""
    return int(triton.next_power_of_2(width))


def warps_for(width: int) -> int:
    """Eight to sixteen elements a thread; more only where the largest program ends."""
    return max(1, min(32, block_of(width) // 512))


@triton.jit
def row_scale(values):
    """What a row is divided by so that its largest value is fp8's."""
    return tl.maximum(tl.max(tl.abs(values), 0) / FP8_MAX, SCALE_FLOOR)


@triton.jit
def to_fp8(values, scale):
    scaled = values * (1.0 / scale)
    return tl.minimum(tl.maximum(scaled, -FP8_MAX), FP8_MAX).to(tl.float8e4nv)


def row_scales(values: Any) -> Any:
    """In numpy: the scale `[T]` of each row of `values` `[T, K]`."""
    return np.maximum(np.abs(values).max(axis=1) / np.float32(448), np.float32(1e-12)).astype(np.float32)
