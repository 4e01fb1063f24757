"""The product for few rows that streams the weights once: y = x · weightᵀ, with what comes before and after it."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from triton.experimental.gluon.language import BlockedLayout, SliceLayout

from farrier.plugins.gemv_kernel import gemv
from farrier.plugins.kernel import WARP_SIZE, KernelSource, PerRows, Variant

MOST_ROWS = 8
_BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}
_MOST_CANDIDATES = 20
_FEWEST_PROGRAMS = 128
_MOST_REGISTERS = 210
"""Of those that `_registers` counts: with what else there is, more would exceed 255."""

_TILES = (
    (2, 1, 4, 2),
    (4, 1, 4, 2),
    (4, 1, 4, 1),
    (2, 1, 8, 2),
    (8, 1, 2, 1),
    (4, 1, 4, 4),
    (2, 1, 2, 2),
    (8, 4, 2, 2),
    (16, 4, 1, 2),
    (8, 2, 4, 1),
    (2, 1, 8, 1),
    (2, 1, 4, 1),
    (8, 4, 1, 4),
    (16, 4, 2, 2),
    (8, 2, 2, 1),
    (4, 1, 2, 2),
    (8, 1, 4, 1),
    (1, 1, 4, 4),
    (1, 1, 8, 2),
    (4, 2, 2, 2),
    (8, 4, 2, 1),
    (16, 8, 1, 2),
    (4, 1, 4, 1, 8),
    (4, 1, 4, 2, 8),
    (16, 8, 1, 4, 8),
    (2, 1, 4, 2, 8),
    (4, 2, 1, 1, 8),
    (4, 2, 1, 1),
    (2, 1, 2, 1),
    (2, 1, 1, 1),
    (1, 1, 4, 1),
    (1, 1, 1, 1),
)
"""Fields of GemvTile, those that did well on an H200 first."""


@dataclass(frozen=True)
class GemvTile:
    """A program computes `block_n` output columns. `warps_n` warps share them, `warps_k` warps share K; a thread reads
    `vector` bytes of a weight row at a time and has `unroll` such loads of each of its rows in flight."""

    block_n: int
    warps_n: int
    warps_k: int
    unroll: int
    vector: int = 16


@dataclass(frozen=True)
class Gemv(Variant):
    """out = epilogue(norm(x) · weightᵀ · scale + bias) for `rows` rows (1, 2, 4 or 8) of x `[rows, k]`.

    Arguments, without those that the variant lacks: x `[*, k]`; rows i32 `[rows]` if `row_gather`: the row of x for
    each row of out (a negative one reads row 0; read before gdc_wait: it must not come from an earlier kernel of the
    step); norm_weight fp32 `[k]`; weight `[n, k]`; scale `[n]` fp32, or `[n, k / group_size]` in `scale_type`; zero i8
    `[n, k / group_size]`; bias `[n]` in the type named by `bias`; out `[rows, n]` in `out_type`.

    `epilogue`: "store"; "add": out += y; "gated": out = activation(gate) · up, where weight (and scale, zero, bias)
    has 2·n rows, those of gate first. `norm_eps`: x is RMS-normalized. `softcap`: out = softcap · tanh(y / softcap).
    fp8 and int8 weights have a scale for each row or, with `group_size`, for each group; int4 always has groups and is
    packed by `pack_int4`.

    The type declared for weight is i32 (fp16 for fp16): threads load words. fp8 needs compute capability 8.9.

    Raises ValueError for what cannot be combined.
    """

    rows: int
    n: int
    k: int
    weight: str
    x_type: str
    out_type: str
    tile: GemvTile
    group_size: int | None = None
    scale_type: str = "fp32"
    zeros: bool = False
    epilogue: str = "store"
    activation: str | None = None
    norm_eps: float | None = None
    bias: str | None = None
    softcap: float | None = None
    row_gather: bool = False
    pdl: bool = False

    def __post_init__(self) -> None:
        if self.rows not in (1, 2, 4, MOST_ROWS):
            raise ValueError(f"A GEMV has 1, 2, 4 or 8 rows, not {self.rows}; pad them.")
        if self.k % 32:
            raise ValueError(f"A GEMV needs a K divisible by 32, not {self.k}.")
        if (self.epilogue == "gated") != (self.activation is not None):
            raise ValueError("A gated epilogue needs an activation; others take none.")
        if self.group_size is not None and (self.group_size % 32 or self.k % self.group_size):
            raise ValueError(f"Groups of {self.group_size} do not divide K = {self.k} in multiples of 32.")
        if self.weight == "int4" and self.group_size is None:
            raise ValueError("int4 weights need a group size.")
        if self.group_size is not None and _BITS[self.weight] == 16:
            raise ValueError(f"{self.weight} weights have no scales.")
        if self.zeros and self.group_size is None:
            raise ValueError("Zero points need a group size.")

    def source(self) -> KernelSource:
        tile, bits = self.tile, _BITS[self.weight]
        values = tile.vector * 8 // bits
        units = values if self.weight == "fp16" else tile.vector // 4
        lanes = WARP_SIZE * tile.warps_k
        steps, rest = divmod(self.k, lanes * values * tile.unroll)
        halves = 2 if self.epilogue == "gated" else 1
        types = {
            "x": self.x_type,
            "rows": "i32" if self.row_gather else None,
            "norm_weight": "fp32" if self.norm_eps is not None else None,
            "weight": "fp16" if self.weight == "fp16" else "i32",
            "scale": self.scale_type if bits < 16 else None,
            "zero": "i8" if self.zeros else None,
            "bias": self.bias,
            "out": self.out_type,
        }
        constants = {
            "ROWS": self.rows,
            "N": self.n,
            "K": self.k,
            "FORMAT": self.weight,
            "GROUP": self.group_size,
            "EPILOGUE": self.epilogue,
            "ACTIVATION": self.activation,
            "NORM_EPS": self.norm_eps,
            "SOFTCAP": self.softcap,
            "BLOCK_N": tile.block_n,
            "LANES": lanes,
            "UNROLL": tile.unroll,
            "STEPS": steps,
            "TAIL": _power_of_two(ceil(rest / (lanes * values))),
            "UNITS": units,
            "VALUES": values,
            "TILE": self._layout(halves, units),
            "X_TILE": self._layout(halves, values),
            "RESULT": SliceLayout(2, SliceLayout(2, SliceLayout(4, self._layout(1, units)))),
            "PDL": self.pdl,
        }
        return KernelSource(
            gemv,
            {name: f"*{type_}" for name, type_ in types.items() if type_},
            {name: None for name, type_ in types.items() if not type_} | constants,
            num_warps=tile.warps_n * tile.warps_k,
            pdl=self.pdl,
            max_registers=self._max_registers(halves),
        )

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (ceil(self.n / self.tile.block_n),)

    def _max_registers(self, halves: int) -> int:
        """Enough for a tile, as few as 16 (12, 8) warps a multiprocessor leave each thread. Without a number ptxas aims
        lower than that, and loads x piece by piece: each waits for the one before."""
        needed = _registers(self.tile, self.rows, self.k, self.weight, halves) + (32 if self.zeros else 0)
        if self.rows == 1 and needed <= 170:
            return 128
        return 168 if needed <= (200 if self.rows == 1 else 150) else 255

    def _layout(self, halves: int, size: int) -> Any:
        """Of [rows of x, rows of weights, loads, lanes, size]."""
        return BlockedLayout(
            [self.rows, halves, 1, 1, size],
            [1, 1, 1, WARP_SIZE, 1],
            [1, self.tile.warps_n, 1, self.tile.warps_k, 1],
            [4, 3, 2, 1, 0],
        )


def candidates(rows: int, n: int, k: int, weight: str, gated: bool = False) -> list[GemvTile]:
    """The tiles worth timing for x `[rows, k]` and weight `[n, k]` (`[2·n, k]` if `gated`), at most 20.

    The first is the default. It has two weight rows a thread in flight twice for one row of x and 16-bit weights, which
    did well for every matrix measured; four otherwise, as arithmetic on x is then shared by more weights.
    """
    halves = 2 if gated else 1
    wanted = 2 if rows == 1 and _BITS[weight] == 16 else 4 // halves
    tiles = sorted((GemvTile(*tile) for tile in _TILES), key=lambda tile: tile.block_n // tile.warps_n != wanted)
    fitting = [tile for tile in tiles if _fits(tile, rows, n, k, weight, halves)]
    return fitting[:_MOST_CANDIDATES] or [GemvTile(1, 1, 1, 1, vector=8)]


def _fits(tile: GemvTile, rows: int, n: int, k: int, weight: str, halves: int) -> bool:
    if tile.vector < 16 and _BITS[weight] == 16:
        return False
    values = tile.vector * 8 // _BITS[weight]
    span = WARP_SIZE * tile.warps_k * values
    steps, rest = divmod(k, span * tile.unroll)
    tail = _power_of_two(ceil(rest / span))
    same_as_less_unrolled = steps == 0 and tail < tile.unroll
    mostly_masked = (steps * tile.unroll + tail) * span > 1.25 * k
    too_few_programs = ceil(n / tile.block_n) < min(n // 2, _FEWEST_PROGRAMS)
    fits_registers = _registers(tile, rows, k, weight, halves) <= _MOST_REGISTERS
    return fits_registers and not (same_as_less_unrolled or mostly_masked or too_few_programs)


def _registers(tile: GemvTile, rows: int, k: int, weight: str, halves: int) -> int:
    """About how many registers weights in flight, sums, x, the norm's weight and converted weights take."""
    values = tile.vector * 8 // _BITS[weight]
    own_rows = halves * tile.block_n // tile.warps_n
    whole_k_in_flight = k <= WARP_SIZE * tile.warps_k * values * tile.unroll
    in_flight = tile.unroll * own_rows * tile.vector // 4 * (1 if whole_k_in_flight else 2)
    x = (rows + 1) * tile.unroll * values // (2 if rows > 2 else 1)
    converted = own_rows * values // (1 if _BITS[weight] == 16 else 2)
    return in_flight + rows * own_rows + x + converted


def _power_of_two(count: int) -> int:
    """The least power of two that is not below `count`; 0 for 0."""
    return 1 << (count - 1).bit_length() if count else 0


def pack_int4(values: Any) -> Any:
    """i8 values −8..7 `[N, K]` as the u8 `[N, K / 2]` that int4 variants read.

    Of eight weights, the 32-bit word has those of even index in its low half and those of odd index in its high half,
    each as weight + 8: masks then give pairs of neighbours, in the halves of a register.
    """
    eights = (values.reshape(*values.shape[:-1], -1, 8) + 8).astype(np.uint8)
    nibbles = np.concatenate([eights[..., 0::2], eights[..., 1::2]], -1)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).reshape(*values.shape[:-1], -1)


def repack_int4(packed: Any) -> Any:
    """The same from u8 `[N, K / 2]` with two signed weights a byte, the lower K in the low nibble."""
    signed = np.stack([packed << 4, packed], -1).astype(np.uint8).view(np.int8) >> 4
    return pack_int4(signed.reshape(*packed.shape[:-1], -1))


def gemv_reference(
    variant: Gemv,
    x: Any,
    weight: Any,
    rows: Any = None,
    norm_weight: Any = None,
    bias: Any = None,
    out: Any = None,
) -> Any:
    """What `variant` computes, fp32 `[rows, n]`. All in fp32: x `[*, k]`, weight `[n or 2·n, k]` with scales and zeros
    applied, out: the residual of "add"."""
    if rows is not None:
        x = x[np.maximum(rows, 0)]
    if variant.norm_eps is not None:
        x = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + variant.norm_eps) * norm_weight
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    if variant.activation is not None:
        gate, up = y[:, : variant.n], y[:, variant.n :]
        if variant.activation == "silu":
            y = gate / (1 + np.exp(-gate)) * up
        else:
            y = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    if variant.softcap is not None:
        y = variant.softcap * np.tanh(y / variant.softcap)
    return y if variant.epilogue != "add" else y + out
