"""Matrix products of a mixture of experts: every pair of a token and an expert by that expert's matrix."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import triton
import triton.language as tl

from farrier.plugins.gemm import gated
from farrier.plugins.kernel import KernelSource, PerRows, Variant
from farrier.plugins.product import activated, after_earlier_kernels, product, scaled, tile_of
from farrier.plugins.routing import Align
from farrier.plugins.weight_form import GemmTile, WeightForm


@dataclass(frozen=True)
class GroupedGemm(Variant):
    """The first or the second product of the experts, over pairs (see `routing`). W is [experts, rows, k], of the form
    that `Gemm` takes with rows and experts counted through; so are scale, zero and bias.

    There are P = T · top_k pairs. `gated`: W has 2n rows an expert; x [T, k] are tokens and out [P, n] is
    activation(gate) · up of each pair. `weighted`: W has n rows; x [P, k] and out [P, n] are pairs, out times the
    pair's routing weight.

    `direct`: for at most block_m pairs, without sorting. A program per pair: the first of each expert computes all of
    that expert's, so that its weights are read once. Otherwise pairs come sorted by `align`.
    `tma`: W as a descriptor [experts · rows, k] with blocks (block_n, block_k).
    Rows of out whose expert is negative are not written. Deterministic as `Gemm` is.

    Run-time arguments: x, x_scale fp32 [rows of x] (fp8e4nv x), weight, scale, zero, bias (as far as there are such),
    experts i32 (`direct`: the ids [P], else block_experts), pairs i32 (not `direct`), routing fp32 [P] (`weighted`),
    out, T.
    """

    experts: int
    top_k: int
    n: int
    k: int
    form: WeightForm
    tile: GemmTile
    out_type: Literal["bf16", "fp16", "fp32"]
    epilogue: Literal["gated", "weighted"]
    activation: Literal["silu", "gelu_tanh"] | None = None
    bias: Literal["bf16", "fp16", "fp32"] | None = None
    direct: bool = False
    tma: bool = False
    pdl: bool = False

    def __post_init__(self) -> None:
        self.form.check(self.k, self.tile, self.tma)
        if (self.epilogue == "gated") != (self.activation is not None):
            raise ValueError("An activation goes with the gated epilogue, and only with it.")

    def source(self) -> KernelSource:
        tile = self.tile
        arguments = self.form.argument_types(tile, False, self.tma, self.bias) | {"experts": "*i32"}
        if not self.direct:
            arguments["pairs"] = "*i32"
        if self.epilogue == "weighted":
            arguments["routing"] = "*fp32"
        arguments |= {"out": f"*{self.out_type}", "T": "i32"}
        absent = {
            name: None for name in ("x_scale", "scale", "zero", "bias", "pairs", "routing") if name not in arguments
        }
        return KernelSource(
            grouped_gemm_kernel,
            arguments,
            absent
            | {
                "N": self.n,
                "K": self.k,
                "X_PAIRS": self.top_k if self.epilogue == "gated" else 1,
                "TYPE": tl.str_to_ty(self.form.dot_type, None),
                "WEIGHT": self.form.format,
                "GROUP": self.form.group_size,
                "ROW_SCALE": self.form.row_scale,
                "ACTIVATION": self.activation,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
                "TOP_K": self.top_k,
                "BLOCKS_TOKENS": self._blocks.block,
                "BLOCKS": self._blocks.factor,
                "DIRECT": self.direct,
                "TMA": self.tma,
                "PDL": self.pdl,
            },
            tile.warps,
            tile.stages,
            self.pdl,
        )

    @property
    def align(self) -> Align:
        """What sorts the pairs for this product."""
        return Align(self.experts, self.top_k, self.tile.block_m, self.pdl)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        blocks, tiles = self._blocks, triton.cdiv(self.n, self.tile.block_n)
        return (PerRows(blocks.block, blocks.factor * tiles),)

    def grid(self, rows: int = 0) -> tuple[int, ...]:
        """For so many tokens. Raises ValueError for more than a direct product can take."""
        if self.direct and rows * self.top_k > self.tile.block_m:
            raise ValueError(f"{rows} tokens have more than {self.tile.block_m} pairs: sort them by expert.")
        return super().grid(rows)

    @property
    def _blocks(self) -> PerRows:
        return PerRows(1, self.top_k) if self.direct else self.align.blocks


@triton.jit
def grouped_gemm_kernel(
    x,
    x_scale,
    weight,
    scale,
    zero,
    bias,
    experts,
    pairs,
    routing,
    out,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    X_PAIRS: tl.constexpr,
    TYPE: tl.constexpr,
    WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCKS_TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DIRECT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    UP: tl.constexpr = 0 if ACTIVATION is None else N
    after_earlier_kernels(PDL)

    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks = tl.cdiv(T, BLOCKS_TOKENS) * BLOCKS
    block, tile_n = tile_of(tl.program_id(0), blocks, TILES_N, GROUP_M)
    n = tile_n * BLOCK_N
    columns = tl.arange(0, BLOCK_M)
    expert = tl.load(experts + block)
    if DIRECT:
        mine = (tl.load(experts + columns, mask=columns < T * TOP_K, other=-1) == expert) & (expert >= 0)
        # Columns of nobody repeat this program's pair, and are not stored.
        pair = tl.where(mine, columns, block)
        needed = (expert >= 0) & (tl.min(tl.where(mine, columns, BLOCK_M)) == block)
    else:
        needed = expert >= 0
        pair = tl.load(pairs + block * BLOCK_M + columns, mask=needed, other=-1)
        mine = pair >= 0
        pair = tl.maximum(pair, 0)
    if needed:
        rows = tl.arange(0, BLOCK_N)
        inside = tl.minimum(rows, N - 1 - n)
        first = expert * (N + UP) + n
        x_row = pair // X_PAIRS
        sums, up = product(
            x, 0, x_row, weight, scale, zero, first, inside, UP, TYPE, WEIGHT, GROUP, K, BLOCK_M, BLOCK_N, BLOCK_K,
            False, TMA,
        )  # fmt: skip
        x_scales = None
        if x_scale is not None:
            x_scales = tl.load(x_scale + x_row)
        y = scaled(sums, x_scales, scale, bias, first, inside, ROW_SCALE)
        if UP > 0:
            y = activated(y, ACTIVATION) * scaled(up, x_scales, scale, bias, first + UP, inside, ROW_SCALE)
        if routing is not None:
            y *= tl.load(routing + pair)[None, :]
        place = out + pair.to(tl.int64)[:, None] * N + (n + rows)[None, :]
        tl.store(place, tl.trans(y).to(out.dtype.element_ty), mask=mine[:, None] & (rows[None, :] < N - n))


def grouped_gemm(variant: GroupedGemm, x: Any, weight: Any, ids: Any, routing: Any, bias: Any = None) -> Any:
    """In numpy: float32 x, W [experts, rows, k], ids [P] and routing [P] to y [P, n]; NaN where the id is negative."""
    y = np.full((len(ids), variant.n), np.nan, np.float32)
    for pair, expert in enumerate(ids):
        if expert >= 0:
            row = x[pair // variant.top_k if variant.activation else pair]
            product_ = weight[expert] @ row + (0 if bias is None else bias[expert])
            if variant.activation:
                gate, up = np.split(product_, 2)
                y[pair] = gated(gate, up, variant.activation)
            else:
                y[pair] = product_ * routing[pair]
    return y
