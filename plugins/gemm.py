"""Matrix product of many rows: y = x W^T, for 9 rows up to whole prompts."""

from dataclasses import dataclass
from typing import Literal

import triton
import triton.language as tl

from farrier.plugins.kernel import KernelSource
from farrier.plugins.product import activated, after_earlier_kernels, product, scaled

WeightFormat = Literal["bf16", "fp16", "fp8", "int8", "int4"]
FP8_CAPABILITY = 89
TMA_CAPABILITY = 90
_ELEMENTS = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8e4nv", "int8": "i8", "int4": "u8"}
_BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "fp8e4nv": 8, "int8": 8, "int4": 4}


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

    bf16, fp16: as x_type. fp8: e4m3 [n, k], scale fp32 [n]. int8: i8 [n, k], scale fp32 [n] or, with a group_size,
    scale_type [n, k / group_size]. int4: u8 [n, k / 2], two values of -8..7 a byte, the lower k in the low half, with
    groups. `zeros`: zero i8 [n, k / group_size] is taken off before the scale is applied.
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
        if bool(self.group_size) != (self.format == "int4") and self.format != "int8":
            raise ValueError(f"{self.format} weights {'have no' if self.group_size else 'need'} groups.")
        if self.zeros and not self.group_size:
            raise ValueError("Zero points need groups.")

    def check(self, k: int, tile: GemmTile, tma: bool) -> None:
        """Raises ValueError where k does not suit this form."""
        if self.group_size and k % self.group_size or self.format == "int4" and k % 2:
            raise ValueError(f"k = {k} is not a whole number of groups of {self.group_size}.")
        if tma and (k * _BITS[self.format] % 128 or k * _BITS[self.x_type] % 128):
            raise ValueError(f"k = {k} makes rows that are not a multiple of 16 bytes, which TMA needs.")
        smallest = 32 if self.x_type == "fp8e4nv" else 16
        if tile.block_k < smallest:
            raise ValueError(f"block_k {tile.block_k} is less than {smallest}.")

    @property
    def row_scale(self) -> bool:
        return self.format in ("fp8", "int8") and not self.group_size

    @property
    def element(self) -> str:
        """Triton's name for what W is stored as."""
        return _ELEMENTS[self.format]

    def argument_types(self, tile: GemmTile, x_tma: bool, tma: bool, bias: bool) -> dict[str, str]:
        """Types of x, x_scale, weight, scale, zero and bias, as far as they are there."""
        columns = tile.block_k // 2 if self.format == "int4" else tile.block_k
        types = {"x": f"tensordesc<{self.x_type}[{tile.block_m},{tile.block_k}]>" if x_tma else f"*{self.x_type}"}
        if self.x_type == "fp8e4nv":
            types["x_scale"] = "*fp32"
        types["weight"] = f"tensordesc<{self.element}[{tile.block_n},{columns}]>" if tma else f"*{self.element}"
        if self.format not in ("bf16", "fp16"):
            types["scale"] = f"*{self.scale_type}" if self.group_size else "*fp32"
        if self.zeros:
            types["zero"] = "*i8"
        if bias:
            types["bias"] = "*fp32"
        return types

    def shared_bytes(self, tile: GemmTile, matrices: int) -> int:
        """Shared memory that the stages of a tile take, nearly."""
        bits = tile.block_m * _BITS[self.x_type] + matrices * tile.block_n * _BITS[self.format]
        return tile.stages * tile.block_k * bits // 8


@triton.jit
def gemm_kernel(
    x,
    x_scale,
    weight,
    scale,
    zero,
    bias,
    out,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    TYPE: tl.constexpr,
    WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    UP: tl.constexpr = N if EPILOGUE == "gated" else 0
    after_earlier_kernels(PDL)

    program = tl.program_id(0)
    group_first = program // (GROUP_M * TILES_N) * GROUP_M
    group_size = tl.minimum(tl.cdiv(M, BLOCK_M) - group_first, GROUP_M)
    within = program % (GROUP_M * TILES_N)
    m = (group_first + within % group_size) * BLOCK_M
    n = within // group_size * BLOCK_N

    rows = tl.arange(0, BLOCK_N)
    x_rows = tl.arange(0, BLOCK_M)
    # What lies past the end is computed from the last row again, and not stored.
    inside = tl.minimum(rows, N - 1 - n)
    x_inside = tl.minimum(x_rows, M - 1 - m)
    sums, up = product(
        x, m, x_inside, weight, scale, zero, n, inside, UP, TYPE, WEIGHT, GROUP, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA, TMA
    )
    x_scales = None
    if x_scale is not None:
        x_scales = tl.load(x_scale + m + x_inside)
    y = scaled(sums, x_scales, scale, bias, n, inside, ROW_SCALE)
    if UP > 0:
        y = activated(y, ACTIVATION) * scaled(up, x_scales, scale, bias, n + UP, inside, ROW_SCALE)
    if SOFTCAP > 0:
        y = SOFTCAP * (2 * tl.sigmoid(y * (2 / SOFTCAP)) - 1)

    y = tl.trans(y)
    place = out + m.to(tl.int64) * N + n + (x_rows[:, None] * N + rows[None, :])
    stored = (x_rows[:, None] < M - m) & (rows[None, :] < N - n)
    if EPILOGUE == "add":
        y += tl.load(place, mask=stored, other=0.0)
    tl.store(place, y.to(out.dtype.element_ty), mask=stored)


@dataclass(frozen=True)
class Gemm:
    """y [M, n] = x [M, k] W^T.

    Epilogues: `store` writes y (`softcap` > 0: as softcap · tanh(y / softcap)); `add` adds it to the fp32 residual
    that `out` is; `gated`: W has 2n rows, gates first, and activation(gate) · up [M, n] is written. `bias`: fp32, one
    per row of W. `tma`: x and W are given as descriptors with blocks (block_m, block_k) and (block_n, block_k), from
    compute capability 9.0 on; x may then describe more than M rows, whatever is in them.

    Deterministic: for one tile, a row of y depends on its row of x alone, bit by bit; not on M, nor on where it lies.

    Run-time arguments: x [M, k], x_scale fp32 [M] (fp8e4nv x), weight, scale, zero, bias (as far as there are such),
    out [M, n], M.
    """

    n: int
    k: int
    form: WeightForm
    tile: GemmTile
    out_type: Literal["bf16", "fp16", "fp32"]
    epilogue: Literal["store", "add", "gated"] = "store"
    activation: Literal["silu", "gelu"] | None = None
    bias: bool = False
    softcap: float = 0.0
    tma: bool = False
    pdl: bool = False

    def __post_init__(self) -> None:
        self.form.check(self.k, self.tile, self.tma)
        if (self.epilogue == "gated") != (self.activation is not None):
            raise ValueError("An activation goes with the gated epilogue, and only with it.")
        if self.softcap and self.epilogue != "store":
            raise ValueError("A soft cap goes with the store epilogue only.")
        if self.epilogue == "add" and self.out_type != "fp32":
            raise ValueError("The residual is fp32.")

    def source(self) -> KernelSource:
        tile = self.tile
        arguments = self.form.argument_types(tile, self.tma, self.tma, self.bias)
        arguments |= {"out": f"*{self.out_type}", "M": "i32"}
        absent = {name: None for name in ("x_scale", "scale", "zero", "bias") if name not in arguments}
        return KernelSource(
            gemm_kernel,
            arguments,
            absent
            | {
                "N": self.n,
                "K": self.k,
                "TYPE": tl.str_to_ty(self.form.x_type, None),
                "WEIGHT": self.form.format,
                "GROUP": self.form.group_size,
                "ROW_SCALE": self.form.row_scale,
                "EPILOGUE": self.epilogue,
                "ACTIVATION": self.activation,
                "SOFTCAP": self.softcap,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
                "TMA": self.tma,
                "PDL": self.pdl,
            },
            tile.warps,
            tile.stages,
            self.pdl,
        )

    def grid(self, rows: int) -> tuple[int, int, int]:
        return -(-rows // self.tile.block_m) * -(-self.n // self.tile.block_n), 1, 1
