"""Rotary embedding with optional QK-norm, and the append of new keys and values to the paged KV pool."""

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from farrier.plugins.kernel import KernelSource, PerRows, Variant

BLOCK_SIZE = 32
"""Tokens of a KV page."""

_FP8_MAX: tl.constexpr = tl.constexpr(448.0)


def padded(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def rotation_vector(rotary_dim: int) -> int:
    """Dimensions that stay neighbours under rotate-half: how wide their loads may be."""
    return math.gcd(rotary_dim // 2, 8)


@triton.jit
def rotation(cos, sin, position, d, ROTARY_DIM: tl.constexpr, VECTOR: tl.constexpr):
    """What dimension `d` is turned with: its partner, and the factors of itself and of its partner."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    turned = d < ROTARY_DIM
    first = d < HALF
    partner = tl.where(first, d + HALF, tl.where(turned, d - HALF, d))
    partner = tl.max_contiguous(tl.multiple_of(partner, VECTOR), VECTOR)
    angle = position * HALF + tl.where(first, d, d - HALF)
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    return partner, c, tl.where(first, -s, s)


@triton.jit
def rotated(heads, mask, d, partner, c, s, norm, HEAD_DIM: tl.constexpr, EPS: tl.constexpr):
    """fp32 `[rows, len(d)]`: the heads at the pointers `heads [rows, 1]`, normalized if EPS is given, then turned."""
    inside = mask & (d < HEAD_DIM)[None, :]
    own = tl.load(heads + d[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(heads + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if EPS is not None:
        scale = tl.rsqrt(tl.sum(own * own, axis=1, keep_dims=True) / HEAD_DIM + EPS)
        own = own * scale * tl.load(norm + d, mask=d < HEAD_DIM, other=0.0)[None, :]
        other = other * scale * tl.load(norm + partner, mask=d < HEAD_DIM, other=0.0)[None, :]
    return own * c[None, :] + other * s[None, :]


@triton.jit
def cached(x, TYPE: tl.constexpr):
    """`x` in the KV pool's type; fp8 saturates."""
    if tl.float8e4nv == TYPE:
        x = tl.minimum(tl.maximum(x, -_FP8_MAX), _FP8_MAX)
    return x.to(TYPE)


@triton.jit
def _rope_append(
    qkv,
    positions,
    slots,
    cos,
    sin,
    q_norm,
    k_norm,
    q_out,
    k_cache,
    v_cache,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    position = tl.maximum(tl.load(positions + token), 0)
    d = tl.arange(0, HEAD_PAD)
    inside = (d < HEAD_DIM)[None, :]
    partner, c, s = rotation(cos, sin, position, d, ROTARY_DIM, VECTOR)
    if PDL:
        gdc_wait()
    if slot < 0:
        return

    row = qkv + token.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    q_head = tl.arange(0, Q_ROWS)[:, None]
    q = rotated(row + q_head * HEAD_DIM, q_head < NUM_HEADS, d, partner, c, s, q_norm, HEAD_DIM, EPS)
    q_row = q_out + token.to(tl.int64) * (NUM_HEADS * HEAD_DIM)
    q_at = q_row + q_head * HEAD_DIM + d[None, :]
    tl.store(q_at, q.to(q_out.dtype.element_ty), mask=(q_head < NUM_HEADS) & inside)

    kv_head = tl.arange(0, KV_ROWS)[:, None]
    mask = kv_head < NUM_KV_HEADS
    k_row = row + NUM_HEADS * HEAD_DIM
    k = rotated(k_row + kv_head * HEAD_DIM, mask, d, partner, c, s, k_norm, HEAD_DIM, EPS)
    v_row = k_row + NUM_KV_HEADS * HEAD_DIM
    v = tl.load(v_row + kv_head * HEAD_DIM + d[None, :], mask=mask & inside, other=0.0).to(tl.float32)
    page = (slot // BLOCK).to(tl.int64)
    at = ((page * NUM_KV_HEADS + kv_head) * BLOCK + slot % BLOCK) * HEAD_DIM + d[None, :]
    tl.store(k_cache + at, cached(k, k_cache.dtype.element_ty), mask=mask & inside)
    tl.store(v_cache + at, cached(v, v_cache.dtype.element_ty), mask=mask & inside)


@dataclass(frozen=True)
class RopeAppend(Variant):
    """Rotates the queries and keys of a step, and appends its keys and values to the KV pool.

    Arguments: qkv `[T, (num_heads + 2·num_kv_heads)·head_dim]` of qkv_type, positions i32 `[T]`, slots i32 `[T]`
    (-1: the token is padding, nothing of it is written), cos and sin fp32 `[positions, rotary_dim/2]`; with
    qk_norm_eps q_norm and k_norm, fp32 `[head_dim]`; q_out `[T, num_heads·head_dim]` of act_type, k_cache and
    v_cache `[num_blocks, num_kv_heads, 32, head_dim]` of kv_type (fp8 saturates).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    qk_norm_eps: float | None = None
    qkv_type: str = "bf16"
    act_type: str = "bf16"
    kv_type: str = "bf16"
    pdl: bool = False

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(),)

    def source(self) -> KernelSource:
        normed = self.qk_norm_eps is not None
        rows = padded(self.num_heads)
        return KernelSource(
            function=_rope_append,
            arguments={
                "qkv": f"*{self.qkv_type}",
                "positions": "*i32",
                "slots": "*i32",
                "cos": "*fp32",
                "sin": "*fp32",
                **({"q_norm": "*fp32", "k_norm": "*fp32"} if normed else {}),
                "q_out": f"*{self.act_type}",
                "k_cache": f"*{self.kv_type}",
                "v_cache": f"*{self.kv_type}",
            },
            constants={
                **({} if normed else {"q_norm": None, "k_norm": None}),
                "NUM_HEADS": self.num_heads,
                "NUM_KV_HEADS": self.num_kv_heads,
                "Q_ROWS": rows,
                "KV_ROWS": padded(self.num_kv_heads),
                "HEAD_DIM": self.head_dim,
                "HEAD_PAD": padded(self.head_dim),
                "ROTARY_DIM": self.rotary_dim,
                "VECTOR": rotation_vector(self.rotary_dim),
                "BLOCK": BLOCK_SIZE,
                "EPS": self.qk_norm_eps,
                "PDL": self.pdl,
            },
            # about 32 fp32 values of q a thread
            num_warps=min(8, max(1, rows * padded(self.head_dim) // 1024)),
            pdl=self.pdl,
        )
