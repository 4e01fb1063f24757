"""Gated activations: act(gate) · up."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from farrier.plugins.kernel import KernelSource, PerRows, Variant
from farrier.plugins.rowwise import block_of, row_scale, to_fp8, warps_for

_COLUMNS = 2048
"""A program's, where rows need no scale: eight elements for each of 256 threads."""


@dataclass(frozen=True)
class Gated(Variant):
    """The activation of a gated MLP.

    Arguments: gate_up `[T, 2 · width]` (a row's gates, then its ups), out `[T, width]`, and scale fp32 `[T]` if
    `out_type` is fp8e4nv: what to multiply a row of out with.
    """

    width: int
    activation: Literal["silu", "gelu_tanh"]
    in_type: str
    out_type: str
    pdl: bool = False

    def source(self) -> KernelSource:
        arguments = {"gate_up": f"*{self.in_type}", "out": f"*{self.out_type}"}
        constants: dict[str, Any] = {} if self._scaled else {"scale": None}
        if self._scaled:
            arguments["scale"] = "*fp32"
        constants |= {"WIDTH": self.width, "BLOCK": self._block, "GELU": self.activation == "gelu_tanh"}
        constants["PDL"] = self.pdl
        return KernelSource(_gated, arguments, constants, num_warps=self._warps, pdl=self.pdl)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(), triton.cdiv(self.width, self._block))

    @property
    def _scaled(self) -> bool:
        return self.out_type == "fp8e4nv"

    @property
    def _block(self) -> int:
        whole = block_of(self.width)
        return whole if self._scaled else min(whole, _COLUMNS)

    @property
    def _warps(self) -> int:
        return warps_for(self.width) if self._scaled else max(1, self._block // 256)


@triton.jit
def _gated(gate_up, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    if PDL:
        gdc_wait()
    gate = tl.load(gate_up + row * (2 * WIDTH) + columns, inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + columns, inside, other=0).to(tl.float32)
    if GELU:
        # tanh(t) + 1 = 2 · sigmoid(2t)
        values = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        values = gate * tl.sigmoid(gate) * up
    if scale is None:
        tl.store(out + row * WIDTH + columns, values.to(out.dtype.element_ty), inside)
    else:
        factor = row_scale(values)
        tl.store(scale + row, factor)
        tl.store(out + row * WIDTH + columns, to_fp8(values, factor), inside)


def gated(gate_up: Any, activation: str) -> Any:
    """In numpy: `gate_up` fp32 `[T, 2I]` → fp32 `[T, I]`."""
    gate, up = np.split(gate_up, 2, axis=1)
    if activation == "silu":
        with np.errstate(over="ignore"):  # a gate shut entirely
            return gate / (1 + np.exp(-gate)) * up
    return 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
