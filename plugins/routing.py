"""Mixture of experts around its matrices: who is chosen, in what order pairs are computed, and their sum.

A pair is a token with one of the experts chosen for it: pair t · top_k + j.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import triton
import triton.language as tl

from farrier.plugins.kernel import KernelSource, PerRows, Variant
from farrier.plugins.product import after_earlier_kernels

_CHUNK = 1024


@dataclass(frozen=True)
class TopK(Variant):
    """The experts of each token: softmax over all of them, the top_k most likely (of equals the first), their
    probabilities as weights; with `renormalize` divided by their sum.

    Run-time arguments: logits fp32 [T, experts], slots i32 [T] (negative: padding, whose experts are -1 and weights
    0), out: expert ids i32 [T, top_k], weights fp32 [T, top_k], T.
    """

    experts: int
    top_k: int
    renormalize: bool
    pdl: bool = False
    block_t: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"{self.top_k} of {self.experts} experts cannot be chosen.")

    def source(self) -> KernelSource:
        arguments = {"logits": "*fp32", "slots": "*i32", "ids": "*i32", "weights": "*fp32", "T": "i32"}
        constants = {
            "E": self.experts,
            "TOP_K": self.top_k,
            "RENORMALIZE": self.renormalize,
            "BLOCK_T": self.block_t,
            "BLOCK_E": triton.next_power_of_2(self.experts),
            "BLOCK_J": triton.next_power_of_2(self.top_k),
            "PDL": self.pdl,
        }
        return KernelSource(top_k_kernel, arguments, constants, 4, 1, self.pdl)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(self.block_t),)


@triton.jit
def top_k_kernel(
    logits,
    slots,
    ids,
    weights,
    T,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    after_earlier_kernels(PDL)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)[None, :]
    order = tl.arange(0, BLOCK_J)[None, :]
    given = tokens < T
    values = tl.load(logits + tokens[:, None] * E + experts, mask=given[:, None] & (experts < E), other=float("-inf"))
    values = tl.where(given[:, None] | (experts >= E), values, 0.0)
    likely = tl.exp(values - tl.max(values, 1)[:, None])
    likely = likely / tl.sum(likely, 1)[:, None]
    chosen = tl.zeros((BLOCK_T, BLOCK_J), tl.int32)
    shares = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
    for j in tl.static_range(TOP_K):
        # Of NaN any expert is the largest, but it has to be one that exists.
        best = tl.minimum(tl.argmax(values, 1, tie_break_left=True), E - 1)[:, None]
        chosen = tl.where(order == j, best, chosen)
        shares = tl.where(order == j, tl.sum(tl.where(experts == best, likely, 0.0), 1)[:, None], shares)
        values = tl.where(experts == best, float("-inf"), values)
    if RENORMALIZE:
        shares = shares / tl.sum(shares, 1)[:, None]
    padding = tl.load(slots + tokens, mask=given, other=-1)[:, None] < 0
    place = tokens[:, None] * TOP_K + order
    stored = given[:, None] & (order < TOP_K)
    tl.store(ids + place, tl.where(padding, -1, chosen), mask=stored)
    tl.store(weights + place, tl.where(padding, 0.0, shares), mask=stored)


@dataclass(frozen=True)
class Align(Variant):
    """Pairs sorted by expert, stably, each expert's filled up to whole blocks of `block` pairs.

    Run-time arguments: ids i32 [T, top_k] (negative: nobody), out: pairs i32 [blocks, block] (-1: filling),
    block_experts i32 [blocks] (-1: block not needed, whose pairs are not written), T. There are `blocks.count(T)`.
    """

    experts: int
    top_k: int
    block: int
    pdl: bool = False

    @property
    def blocks(self) -> PerRows:
        """At least as many blocks as T tokens can need: one that is not full for each expert, beside the full ones.
        Counted for so many tokens at once as fill about one block an expert."""
        tokens = triton.cdiv(self.experts * self.block, self.top_k)
        return PerRows(tokens, self.experts + triton.cdiv(tokens * self.top_k, self.block))

    def source(self) -> KernelSource:
        arguments = {"ids": "*i32", "pairs": "*i32", "block_experts": "*i32", "T": "i32"}
        constants = {
            "E": self.experts,
            "TOP_K": self.top_k,
            "BLOCKS_TOKENS": self.blocks.block,
            "BLOCKS": self.blocks.factor,
            "BLOCK_E": max(32, triton.next_power_of_2(self.experts)),
            "BLOCK": self.block,
            "CHUNK": _CHUNK,
            "PDL": self.pdl,
        }
        return KernelSource(align_kernel, arguments, constants, 4, 1, self.pdl)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (self.experts,)


@triton.jit
def align_kernel(
    ids,
    pairs,
    block_experts,
    T,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCKS_TOKENS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    after_earlier_kernels(PDL)
    # A program per expert. Each counts everybody's pairs: cheaper than a kernel that does it before.
    expert = tl.program_id(0)
    P = T * TOP_K
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, P, CHUNK):
        at = start + tl.arange(0, CHUNK)
        chosen = tl.load(ids + at, mask=at < P, other=-1)
        counts += tl.histogram(tl.maximum(chosen, 0), BLOCK_E, mask=chosen >= 0)
    needed = (counts + BLOCK - 1) // BLOCK
    experts = tl.arange(0, BLOCK_E)
    first = tl.sum(tl.where(experts < expert, needed, 0))
    end = first + tl.sum(tl.where(experts == expert, needed, 0))

    written = first * BLOCK
    for start in range(0, P, CHUNK):
        at = start + tl.arange(0, CHUNK)
        mine = (tl.load(ids + at, mask=at < P, other=-1) == expert).to(tl.int32)
        tl.store(pairs + written + tl.cumsum(mine, 0) - 1, at, mask=mine > 0)
        written += tl.sum(mine)
    filling = written + tl.arange(0, BLOCK)
    tl.store(pairs + filling, -1, mask=filling < end * BLOCK)

    # Blocks after the last expert's are nobody's.
    last = tl.where(expert == E - 1, tl.cdiv(T, BLOCKS_TOKENS) * BLOCKS, end)
    for start in range(first, last, CHUNK):
        block = start + tl.arange(0, CHUNK)
        tl.store(block_experts + block, tl.where(block < end, expert, -1), mask=block < last)


@dataclass(frozen=True)
class Combine(Variant):
    """The sum of each token's pairs, in the order of its choices: deterministic.

    Run-time arguments: y y_type [T · top_k, hidden], out [T, hidden] (`add`: the fp32 residual; `store`), T.
    """

    top_k: int
    hidden: int
    y_type: Literal["bf16", "fp16", "fp32"]
    out_type: Literal["bf16", "fp16", "fp32"]
    epilogue: Literal["add", "store"] = "add"
    pdl: bool = False
    block_h: int = 512

    def __post_init__(self) -> None:
        if self.epilogue == "add" and self.out_type != "fp32":
            raise ValueError("The residual is fp32.")

    def source(self) -> KernelSource:
        constants = {
            "TOP_K": self.top_k,
            "H": self.hidden,
            "ADD": self.epilogue == "add",
            "BLOCK_H": self.block_h,
            "PDL": self.pdl,
        }
        arguments = {"y": f"*{self.y_type}", "out": f"*{self.out_type}", "T": "i32"}
        return KernelSource(combine_kernel, arguments, constants, 4, 1, self.pdl)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return PerRows(), triton.cdiv(self.hidden, self.block_h)


@triton.jit
def combine_kernel(
    y,
    out,
    T,
    TOP_K: tl.constexpr,
    H: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    after_earlier_kernels(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (columns < H) & (token < T)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for j in tl.static_range(TOP_K):
        total += tl.load(y + (token * TOP_K + j) * H + columns, mask=inside, other=0.0).to(tl.float32)
    place = out + token * H + columns
    if ADD:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


def top_k(logits: Any, count: int, renormalize: bool) -> tuple[Any, Any]:
    """In numpy: float32 logits [T, E] to ids [T, count] and weights [T, count]."""
    likely = np.exp(logits - logits.max(1, keepdims=True))
    likely /= likely.sum(1, keepdims=True)
    ids = np.argsort(-logits, 1, kind="stable")[:, :count].astype(np.int32)
    weights = np.take_along_axis(likely, ids, 1)
    return ids, weights / weights.sum(1, keepdims=True) if renormalize else weights


def align(ids: Any, experts: int, block: int) -> tuple[Any, Any]:
    """In numpy: ids [P] to pairs [needed, block] and block_experts [needed]."""
    pairs, block_experts = [], []
    for expert in range(experts):
        mine = np.flatnonzero(ids == expert)
        for start in range(0, len(mine), block):
            few = mine[start : start + block]
            pairs.append(np.pad(few, (0, block - len(few)), constant_values=-1))
            block_experts.append(expert)
    return np.array(pairs, np.int32).reshape(-1, block), np.array(block_experts, np.int32)
