"""How weights lie in memory, and the tiles in which products go through them."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FP8_CAPABILITY, TMA_CAPABILITY = 89, 90
"""fp8 exists from this compute capability on."""

WeightFormat = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
_ELEMENTS = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8e4nv", "int8": "i8", "int4": "u8"}
_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "fp8e4nv": 8, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class GemmTile:
    """What one program computes: block_m rows of x times block_n columns of y (each with its gate: 2 block_n rows of
    W), block_k at a time with `stages` of them under way. `group_m` tiles of rows share W while it is in the L2."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 1


@dataclass(frozen=True)
class WeightForm:
    """How W [n, k] lies in memory and how x is given.

    bf16, fp16: as x_type. fp32: what a router may have; x is brought to fp32. fp8: e4m3 [n, k]. int8: i8 [n, k]. int4:
    u8 [n, k / 2] as `gemv.pack_int4` makes them: in the 32-bit word of eight weights, each 8 more than it stands for,
    those of odd index are in the upper half. fp8 and int8 have a scale fp32 [n] or, with a group_size, scale_type
    [n, k / group_size]; int4 always has groups. `zeros`: zero i8 [n, k / group_size] is taken off before the scale is
    applied.
    x_type fp8e4nv: x has an fp32 scale per row, and so must W.
    """

    format: WeightFormat
    x_type: Literal["bf16", "fp16", "fp8e4nv"]
    group_size: int = 0
    zeros: bool = False
    scale_type: Literal["fp32", "bf16", "fp16"] = "fp32"

    def __post_init__(self) -> None:
        if self.x_type == "fp8e4nv" and self.format != "fp8":
            raise ValueError(f"fp8 activations need fp8 weights, not {self.format}.")
        if self.format in ("bf16", "fp16") and self.format != self.x_type:
            raise ValueError(f"{self.format} weights need {self.format} activations, not {self.x_type}.")
        if self.group_size and (self.group_size < 32 or self.group_size & (self.group_size - 1)):
            raise ValueError(f"Group size {self.group_size} is not a power of two of at least 32.")
        if self.format == "int4" and not self.group_size:
            raise ValueError("int4 weights need groups.")
        if self.group_size and (self.format in ("fp32", "bf16", "fp16") or self.x_type == "fp8e4nv"):
            raise ValueError(f"{self.format} weights have no groups beside {self.x_type} activations.")
        if self.zeros and (not self.group_size or self.format == "fp8"):
            raise ValueError("Zero points need integers in groups.")

    def check(self, k: int, tile: GemmTile, tma: bool) -> None:
        """Raises ValueError where k does not suit this form."""
        if self.group_size and k % self.group_size:
            raise ValueError(f"k = {k} is not a whole number of groups of {self.group_size}.")
        if tma and not self.suits_tma(k):
            raise ValueError(f"k = {k} makes rows that are not a multiple of 16 bytes, which TMA needs.")
        smallest = 32 if self.x_type == "fp8e4nv" else 16
        if tile.block_k < smallest:
            raise ValueError(f"block_k {tile.block_k} is less than {smallest}.")

    def suits_tma(self, k: int) -> bool:
        """Whether rows of W and of x are a multiple of 16 bytes long, as TMA wants them."""
        return k * _BITS[self.format] % 128 == 0 and k * _BITS[self.x_type] % 128 == 0

    @property
    def row_scale(self) -> bool:
        return self.format in ("fp8", "int8") and not self.group_size

    @property
    def dot_type(self) -> str:
        """In what x and W are multiplied."""
        return "fp32" if self.format == "fp32" else self.x_type

    @property
    def element(self) -> str:
        """Triton's name for what W is stored as."""
        return _ELEMENTS[self.format]

    def argument_types(self, tile: GemmTile, x_tma: bool, tma: bool, bias: str | None) -> dict[str, str]:
        """Types of x, x_scale, weight, scale, zero and bias, as far as they are there."""
        columns = tile.block_k // 2 if self.format == "int4" else tile.block_k
        types = {"x": f"tensordesc<{self.x_type}[{tile.block_m},{tile.block_k}]>" if x_tma else f"*{self.x_type}"}
        if self.x_type == "fp8e4nv":
            types["x_scale"] = "*fp32"
        types["weight"] = f"tensordesc<{self.element}[{tile.block_n},{columns}]>" if tma else f"*{self.element}"
        if self.format not in ("fp32", "bf16", "fp16"):
            types["scale"] = f"*{self.scale_type}" if self.group_size else "*fp32"
        if self.zeros:
            types["zero"] = "*i8"
        if bias:
            types["bias"] = f"*{bias}"
        return types

    def shared_bytes(self, tile: GemmTile, matrices: int) -> int:
        """Shared memory that the stages of a tile take, nearly."""
        bits = tile.block_m * _BITS[self.x_type] + matrices * tile.block_n * _BITS[self.format]
        return tile.stages * tile.block_k * bits // 8


def unpacked(form: WeightForm, weight: Any, scale: Any, zero: Any) -> Any:
    """In numpy: W as float32 [n, k]. bf16 weights are uint16 bits, fp8 ones uint8; what the form lacks is None."""
    if form.format == "bf16":
        return (weight.astype(np.uint32) << 16).view(np.float32)
    if form.format == "fp8":
        exponent, mantissa = (weight >> 3 & 15).astype(np.int32), (weight & 7).astype(np.float32)
        value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
        value = np.where(weight & 128, -value, value)
    elif form.format == "int4":
        shifts = np.array([0, 16, 4, 20, 8, 24, 12, 28], np.uint32)
        value = (weight.view(np.uint32)[..., None] >> shifts & 15).reshape(len(weight), -1).astype(np.float32) - 8
    else:
        value = weight.astype(np.float32)
    if zero is not None:
        value = value - np.repeat(zero.astype(np.float32), form.group_size, 1)
    if form.group_size:
        value = value * np.repeat(scale.astype(np.float32), form.group_size, 1)
    elif scale is not None:
        value = value * scale[:, None]
    return value.astype(np.float32)
