"""Weight-only quantization of `[N, K]` matrices (N output channels): what it means, in numpy.

int8: one symmetric scale for each output channel, `w ≈ scale[n] * q`, q from -127 to 127.
int4: one symmetric scale for each group of `group_size` neighbours in K, q from -8 to 7, two in a byte along K, the
lower K in the lower four bits. Scales may be negative: the largest magnitude of a group sits at -8.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

DEFAULT_GROUP_SIZE = 128
SMALLEST_GROUP_SIZE = 32

_INT4_LEVELS = (-8.0, -8.7, -9.6)
"""Where the largest magnitude of a group may land; beyond -8 it is clipped for the sake of the others."""


@dataclass(frozen=True)
class Quantization:
    """`group_size`: columns that share a scale; None for int8, whose rows have one."""

    kind: Literal["int8", "int4"]
    group_size: int | None = None

    def __post_init__(self) -> None:
        if (self.kind == "int4") != (self.group_size is not None) or not (
            self.group_size is None or self.group_size > 0
        ):
            raise ValueError(f"{self.kind} cannot have groups of {self.group_size}")


def group_size_for(columns: int, wanted: int) -> int | None:
    """`wanted`, or the largest half, quarter … of it that divides `columns` and is no smaller than 32."""
    while wanted >= SMALLEST_GROUP_SIZE:
        if columns % wanted == 0:
            return wanted
        wanted //= 2
    return None


def quantize(values: Float32, quantization: Quantization) -> tuple[npt.NDArray[Any], Float32]:
    """Stored values and scales of finite `values` `[N, K]`: int8 `[N, K]` and `[N]`, or uint8 `[N, K / 2]` and
    `[N, K / group_size]`. Rows do not depend on each other, so a matrix may be quantized in slices of rows."""
    if quantization.kind == "int8":
        return _quantize_int8(values)
    assert quantization.group_size is not None
    return _quantize_int4(values, quantization.group_size)


def dequantize(stored: npt.NDArray[Any], scale: Float32, quantization: Quantization) -> Float32:
    """The values `[N, K]` that stored values and scales stand for."""
    if quantization.kind == "int8":
        return stored * scale[:, None]
    levels = unpack_int4(stored).reshape(*scale.shape, -1)
    return (levels * scale[:, :, None]).reshape(len(stored), -1)


def unpack_int4(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """`[N, K / 2]` bytes → `[N, K]` values from -8 to 7."""
    nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    return (nibbles.astype(np.int8) ^ 8) - 8


def _quantize_int8(values: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    largest: Float32 = np.abs(values).max(axis=1)
    scale = _usable(np.divide(largest, 127, dtype=np.float32))
    return np.rint(values / scale[:, None]).astype(np.int8), scale


def _quantize_int4(values: Float32, group_size: int) -> tuple[npt.NDArray[np.uint8], Float32]:
    groups = values.reshape(len(values), -1, group_size)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)
    best_scale = _usable(np.divide(largest, _INT4_LEVELS[0], dtype=np.float32))
    best_error = np.full_like(largest, np.inf)
    for level in _INT4_LEVELS:
        scale = _usable(np.divide(largest, level, dtype=np.float32))
        with np.errstate(over="ignore"):  # of values too large to square, whose first scale will do
            error = np.square(_int4_levels(groups, scale) * scale - groups).sum(axis=2, keepdims=True)
        better = error < best_error
        best_scale, best_error = np.where(better, scale, best_scale), np.where(better, error, best_error)
    nibbles = _int4_levels(groups, best_scale).reshape(values.shape).astype(np.int8).view(np.uint8) & np.uint8(15)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << np.uint8(4), best_scale[:, :, 0]


def _int4_levels(groups: Float32, scale: Float32) -> Float32:
    levels: Float32 = np.clip(np.rint(groups / scale), -8, 7)
    return levels


def _usable(scale: Float32) -> Float32:
    """Where all values are zero, or so small that their scale is no normal number, any scale will do: they are zero."""
    return np.where(np.abs(scale) < np.finfo(np.float32).tiny, np.float32(1), scale)
