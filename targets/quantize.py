"""Weight-only quantization of `[N, K]` matrices (N output channels): what it means, in numpy.

`w = scale * (q - zero)`, with one scale for each output channel or for each group of `group_size` neighbours in K.
int8: q from -128 to 127, a byte each. int4: q from -8 to 7, two in a byte along K, the lower K in the lower four bits.
fp8: q is a float8 e4m3. `zero`, an int8 of the range of q beside each scale, is there with zero points only.

What is quantized here has no zero points: int8 and fp8 get one scale for each output channel, int4 one for each group,
which may be negative: the largest magnitude of a group sits at -8. Zero points, and groups of int8 and fp8, come with
models that are quantized already.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from farrier.targets.float8 import LARGEST, from_float8, to_float8

Float32 = npt.NDArray[np.float32]

DEFAULT_GROUP_SIZE = 128
SMALLEST_GROUP_SIZE = 32

_INT4_LEVELS = (-8.0, -8.7, -9.6)
"""Where the largest magnitude of a group may land; beyond -8 it is clipped for the sake of the others."""


@dataclass(frozen=True)
class Quantization:
    """`group_size`: columns that share a scale; None: all of a row. int4 and zero points always come in groups."""

    kind: Literal["int8", "int4", "fp8"]
    group_size: int | None = None
    zero_points: bool = False

    def __post_init__(self) -> None:
        if not (self.kind != "int4" if self.group_size is None else self.group_size > 0):
            raise ValueError(f"{self.kind} cannot have groups of {self.group_size}")
        if self.zero_points and (self.kind == "fp8" or self.group_size is None):
            raise ValueError(f"{self.kind} with groups of {self.group_size} cannot have zero points")


def group_size_for(columns: int, wanted: int) -> int | None:
    """`wanted`, or the largest half, quarter … of it that divides `columns` and is no smaller than 32."""
    while wanted >= SMALLEST_GROUP_SIZE:
        if columns % wanted == 0:
            return wanted
        wanted //= 2
    return None


def quantize(values: Float32, quantization: Quantization) -> tuple[npt.NDArray[Any], Float32]:
    """Stored values and scales of finite `values` `[N, K]`: int8, or fp8 as uint8, `[N, K]` and `[N]`; int4 as uint8
    `[N, K / 2]` and `[N, K / group_size]`. Rows do not depend on each other, so a matrix may be quantized in slices of
    rows."""
    assert not quantization.zero_points
    if quantization.kind == "int4":
        assert quantization.group_size is not None
        return _quantize_int4(values, quantization.group_size)
    assert quantization.group_size is None
    return _quantize_int8(values) if quantization.kind == "int8" else _quantize_fp8(values)


def dequantize(
    stored: npt.NDArray[Any], scale: Float32, quantization: Quantization, zero: npt.NDArray[np.int8] | None = None
) -> Float32:
    """The values `[N, K]` that stored values, scales and, of the scales' shape, zero points stand for."""
    levels = unpacked(stored, quantization.kind)
    rows, columns = levels.shape
    levels = levels.reshape(rows, -1, quantization.group_size or columns)
    if zero is not None:
        levels = levels - zero.reshape(rows, -1, 1)
    return (levels * scale.reshape(rows, -1, 1)).reshape(rows, columns)


def unpacked(stored: npt.NDArray[Any], kind: str) -> Float32:
    """The numbers q, `[N, K]`."""
    if kind == "fp8":
        return from_float8(stored)
    return (unpack_int4(stored) if kind == "int4" else stored).astype(np.float32)


def pack_int4(levels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """`[N, K]` values from -8 to 7, of which only the lower four bits are looked at → `[N, K / 2]` bytes."""
    nibbles = levels & np.uint8(15)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << np.uint8(4)


def unpack_int4(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """`[N, K / 2]` bytes → `[N, K]` values from -8 to 7."""
    nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    return (nibbles.astype(np.int8) ^ 8) - 8


def _quantize_int8(values: Float32) -> tuple[npt.NDArray[np.int8], Float32]:
    largest: Float32 = np.abs(values).max(axis=1)
    scale = _usable(np.divide(largest, 127, dtype=np.float32))
    return np.rint(values / scale[:, None]).astype(np.int8), scale


def _quantize_fp8(values: Float32) -> tuple[npt.NDArray[np.uint8], Float32]:
    largest: Float32 = np.abs(values).max(axis=1)
    scale = _usable(np.divide(largest, LARGEST, dtype=np.float32))
    return to_float8(values / scale[:, None]), scale


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
    levels = _int4_levels(groups, best_scale).reshape(values.shape)
    return pack_int4(levels.astype(np.int8).view(np.uint8)), best_scale[:, :, 0]


def _int4_levels(groups: Float32, scale: Float32) -> Float32:
    levels: Float32 = np.clip(np.rint(groups / scale), -8, 7)
    return levels


def _usable(scale: Float32) -> Float32:
    """Where all values are zero, or so small that their scale is no normal number, any scale will do: they are zero."""
    return np.where(np.abs(scale) < np.finfo(np.float32).tiny, np.float32(1), scale)
