"""Matrix product of many rows: y = x W^T, for 9 rows up to whole prompts."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import triton
import triton.language as tl

from farrier.plugins.kernel import KernelSource, PerRows, Variant
from farrier.plugins.product import activated, after_earlier_kernels, product, scaled, tile_of
from farrier.plugins.weight_form import GemmTile, WeightForm


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

    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), TILES_N, GROUP_M)
    m = tile_m * BLOCK_M
    n = tile_n * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    x_rows = tl.arange(0, BLOCK_M)
    # What lies past the end is computed from the last row again, and not stored.
    inside = tl.minimum(rows, N - 1 - n)
    x_inside = m + tl.minimum(x_rows, M - 1 - m)
    sums, up = product(
        x, m, x_inside, weight, scale, zero, n, inside, UP, TYPE, WEIGHT, GROUP, K, BLOCK_M, BLOCK_N, BLOCK_K, TMA, TMA
    )
    x_scales = None
    if x_scale is not None:
        x_scales = tl.load(x_scale + x_inside)
    y = scaled(sums, x_scales, scale, bias, n, inside, ROW_SCALE)
    if UP > 0:
        y = activated(y, ACTIVATION) * scaled(up, x_scales, scale, bias, n + UP, inside, ROW_SCALE)
    if SOFTCAP is not None:
        y = SOFTCAP * (2 * tl.sigmoid(y * (2 / SOFTCAP)) - 1)

    y = tl.trans(y)
    place = out + m.to(tl.int64) * N + n + (x_rows[:, None] * N + rows[None, :])
    stored = (x_rows[:, None] < M - m) & (rows[None, :] < N - n)
    if EPILOGUE == "add":
        y += tl.load(place, mask=stored, other=0.0)
    tl.store(place, y.to(out.dtype.element_ty), mask=stored)


@dataclass(frozen=True)
class Gemm(Variant):
    """y [M, n] = x [M, k] W^T.

    Epilogues: `store` writes y (with a `softcap`: softcap · tanh(y / softcap)); `add` adds it to the fp32 residual
    that `out` is; `gated`: W has 2n rows, gates first, and activation(gate) · up [M, n] is written. `bias`: the type of
    one number per row of W. `tma`: x and W are given as descriptors with blocks (block_m, block_k) and (block_n,
    block_k), from compute capability 9.0 on; x may then describe more than M rows, whatever is in them.

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
    activation: Literal["silu", "gelu_tanh"] | None = None
    bias: Literal["bf16", "fp16", "fp32"] | None = None
    softcap: float | None = None
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
                "TYPE": tl.str_to_ty(self.form.dot_type, None),
                "WEIGHT": self.form.format,
                "GROUP": self.form.group_size,
                "ROW_SCALE": self.form.row_scale,
                "EPILOGUE": self.epilogue,
                "ACTIVATION": self.activation,
                "SOFTCAP": self.softcap or None,
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

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(self.tile.block_m, triton.cdiv(self.n, self.tile.block_n)),)


def gated(gate: Any, up: Any, activation: str) -> Any:
    """In numpy: activation(gate) · up."""
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up


def gemm(variant: Gemm, x: Any, weight: Any, bias: Any = None) -> Any:
    """In numpy: float32 x [M, k] and W (see `unpacked`) to y [M, n]; the residual is left out."""
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if variant.activation is not None:
        gate, up = np.split(y, 2, 1)
        return gated(gate, up, variant.activation)
    return variant.softcap * np.tanh(y / variant.softcap) if variant.softcap else y
