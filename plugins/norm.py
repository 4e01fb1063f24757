"""RMS normalization and per-token quantization of activations; one program for each row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from farrier.plugins.kernel import KernelSource, PerRows, Variant
from farrier.plugins.rowwise import block_of, row_scale, to_fp8, warps_for

FP8 = "fp8e4nv"


@dataclass(frozen=True)
class RmsNorm(Variant):
    """Normalizes rows of the residual stream.

    Arguments: x fp32 `[T, hidden]`; rows i32 `[S]` if `picks_rows` (a negative one reads row 0), else every row
    counts, S = T; weight fp32 `[hidden]`; out `[S, hidden]`; scale fp32 `[S]` if `out_type` is fp8e4nv: what to
    multiply a row of out with.
    """

    hidden: int
    eps: float
    out_type: str
    picks_rows: bool = False
    pdl: bool = False

    def source(self) -> KernelSource:
        arguments, constants = _given(
            {
                "x": "*fp32",
                "rows": "*i32" if self.picks_rows else None,
                "weight": "*fp32",
                "out": f"*{self.out_type}",
                "scale": "*fp32" if self.out_type == FP8 else None,
            }
        )
        constants |= {"EPS": self.eps, "WIDTH": self.hidden, "BLOCK": block_of(self.hidden), "PDL": self.pdl}
        return KernelSource(_rms_norm, arguments, constants, num_warps=warps_for(self.hidden), pdl=self.pdl)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(),)


@dataclass(frozen=True)
class PostNormAdd(Variant):
    """Adds what a sub-layer put out to the residual stream, normalized (Gemma).

    Arguments: y fp32 `[T, hidden]`, weight fp32 `[hidden]`, residual fp32 `[T, hidden]`, changed in place.
    """

    hidden: int
    eps: float
    pdl: bool = False

    def source(self) -> KernelSource:
        return KernelSource(
            _post_norm_add,
            {"y": "*fp32", "weight": "*fp32", "residual": "*fp32"},
            {"EPS": self.eps, "WIDTH": self.hidden, "BLOCK": block_of(self.hidden), "PDL": self.pdl},
            num_warps=warps_for(self.hidden),
            pdl=self.pdl,
        )

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(),)


@dataclass(frozen=True)
class Quantize(Variant):
    """Quantizes each row to fp8 with a scale of its own.

    Arguments: x `[T, width]`, out fp8e4nv `[T, width]`, scale fp32 `[T]`: what to multiply a row of out with.
    """

    width: int
    in_type: str
    pdl: bool = False

    def source(self) -> KernelSource:
        return KernelSource(
            _quantize,
            {"x": f"*{self.in_type}", "out": f"*{FP8}", "scale": "*fp32"},
            {"WIDTH": self.width, "BLOCK": block_of(self.width), "PDL": self.pdl},
            num_warps=warps_for(self.width),
            pdl=self.pdl,
        )

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(),)


def _given(types: Mapping[str, str | None]) -> tuple[dict[str, str], dict[str, Any]]:
    """Arguments, and a None for each that this variant does without."""
    return {name: type_ for name, type_ in types.items() if type_}, {name: None for name in types if not types[name]}


@triton.jit
def _rms_norm(
    x, rows, weight, out, scale, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_launch_dependents()
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weights = tl.load(weight + columns, inside, other=0)
    program = tl.program_id(0)
    row = program
    if rows is not None:
        row = tl.maximum(tl.load(rows + program), 0)
    if PDL:
        gdc_wait()
    values = tl.load(x + row.to(tl.int64) * WIDTH + columns, inside, other=0)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + EPS) * weights
    pointers = out + program.to(tl.int64) * WIDTH + columns
    if scale is None:
        tl.store(pointers, values.to(out.dtype.element_ty), inside)
    else:
        factor = row_scale(values)
        tl.store(scale + program, factor)
        tl.store(pointers, to_fp8(values, factor), inside)


@triton.jit
def _post_norm_add(y, weight, residual, EPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weights = tl.load(weight + columns, inside, other=0)
    offsets = tl.program_id(0).to(tl.int64) * WIDTH + columns
    if PDL:
        gdc_wait()
    values = tl.load(y + offsets, inside, other=0)
    before = tl.load(residual + offsets, inside, other=0)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / WIDTH + EPS) * weights
    tl.store(residual + offsets, before + values, inside)


@triton.jit
def _quantize(x, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    row = tl.program_id(0)
    offsets = row.to(tl.int64) * WIDTH + columns
    if PDL:
        gdc_wait()
    values = tl.load(x + offsets, inside, other=0).to(tl.float32)
    factor = row_scale(values)
    tl.store(scale + row, factor)
    tl.store(out + offsets, to_fp8(values, factor), inside)


def rms_norm(x: Any, weight: Any, eps: float) -> Any:
    """In numpy: rows of `x` `[T, hidden]` normalized, times `weight`."""
    return (x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(eps)) * weight).astype(np.float32)
