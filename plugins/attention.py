"""Paged attention for MHA, GQA and MQA: the query heads of one KV head are rows of one tile, so K and V are read once.

`DecodeAttention` fuses a decode step's QK-norm, rotation and KV append with split-KV attention over one query token a
sequence. `PrefillAttention` takes ragged chunks, decode rows among them, after `RopeAppend`.
"""

import math
from dataclasses import dataclass, replace

from farrier.plugins.attention_kernel import decode_attention, prefill_attention
from farrier.plugins.kernel import KernelSource, PerRows, Variant
from farrier.plugins.rope import BLOCK_SIZE, padded, rotation_vector

_LOG2E = math.log2(math.e)
_MIN_ROWS = 16  # what the tensor cores multiply at least
_SMS = 132
_FULL_GRID = 512  # programs from which on more splits cost more than they bring, measured on an H200
_HELD_BYTES = 512  # of K and V a thread: 64 registers for K, V waits in shared memory
_SHARED_BYTES = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10}


@dataclass(frozen=True)
class AttentionShape:
    """What both forms of attention are told of a layer. `scale` multiplies q·k before the soft cap; `window` w: a
    token sees itself and the w - 1 before it; act_type is the type of q and of the result, kv_type of the pool."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    act_type: str = "bf16"
    kv_type: str = "bf16"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads do not share {self.num_kv_heads} KV heads evenly.")
        if self.scale <= 0:
            raise ValueError(f"The attention scale has to be positive, not {self.scale}.")

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def constants(self) -> dict[str, object]:
        cap = self.softcap
        return {
            "NUM_HEADS": self.num_heads,
            "NUM_KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "HEAD_PAD": padded(self.head_dim),
            "FACTOR": _LOG2E * (self.scale if cap is None else cap),
            "CAP_FACTOR": None if cap is None else 2 * _LOG2E * self.scale / cap,
            "WINDOW": self.window,
        }


@dataclass(frozen=True)
class DecodeAttention(Variant):
    """One query token a sequence: rotates it, appends its key and value to the KV pool, attends.

    Arguments: qkv `[B, (num_heads + 2·num_kv_heads)·head_dim]` of qkv_type, context_lens i32 `[B]` (the new token's
    position; -1: the sequence is padding, nothing of it is read or written), block_ids i32, block_starts i32
    `[B + 1]`, cos and sin fp32 `[positions, rotary_dim/2]`; with qk_norm_eps q_norm and k_norm, fp32 `[head_dim]`;
    k_cache and v_cache `[num_blocks, num_kv_heads, 32, head_dim]`, partial_out fp32
    `[B, num_heads, splits, head_dim]`, partial_stats fp32 `[B, num_heads, splits, 2]`, counters i32
    `[B, num_kv_heads]` (0 before and after), out `[B, num_heads·head_dim]`. With one split the three buffers before
    `out` are not touched.

    With `pdl` everything but qkv is read before the kernels in front of this one have ended: of one step these may
    write neither this layer's pool nor the step's inputs. `block_t`, a multiple of 32, is the tokens of a tile;
    `splits` programs share the tiles a sequence has, and those left without one end at once.
    """

    shape: AttentionShape
    rotary_dim: int
    qk_norm_eps: float | None = None
    qkv_type: str = "bf16"
    splits: int = 1
    block_t: int = 64
    warps: int = 4
    stages: int = 2
    pdl: bool = False

    def __post_init__(self) -> None:
        _check_block_t(self.block_t)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (self.shape.num_kv_heads, self.splits, PerRows())

    def default(self, batch: int, context: int) -> "DecodeAttention":
        """This layer's kernel for `batch` sequences of up to `context` tokens each, before anything was measured."""
        return self._with(*self._tile(batch, context))

    def candidates(self, batch: int, context: int) -> "list[DecodeAttention]":
        """What is worth measuring for this shape on the device, the default first; at most 24."""
        default = self._tile(batch, context)
        tiles = dict.fromkeys([default])
        for factor in (1, 0.5, 2, 4):
            splits = max(1, int(default[0] * factor))
            for block_t, warps in ((128, 8), (128, 4), (64, 4), (32, 4), (64, 8), (32, 2)):
                if splits <= -(-context // block_t) and self._fits(block_t, warps):
                    tiles[(splits, block_t, warps)] = None
        return [self._with(*tile) for tile in tiles][:24]

    def _with(self, splits: int, block_t: int, warps: int) -> "DecodeAttention":
        # Three stages keep a tile in flight while one is worked on; of large tiles two, and other programs on the
        # same SM do that.
        stages = 3 if block_t * padded(self.shape.head_dim) <= 64 * 128 else 2
        return replace(self, splits=splits, block_t=block_t, warps=warps, stages=stages)

    def _tile(self, batch: int, context: int) -> tuple[int, int, int]:
        """Splits, tokens of a tile, warps."""
        shape = self.shape
        tokens = context if shape.window is None else min(context, shape.window)
        programs = batch * shape.num_kv_heads
        most = max(1, _FULL_GRID // programs)
        # Few programs: large tiles, so that each has all it reads in flight at once. Many and little to read: small
        # ones, so that several programs share an SM.
        block_t = 32 if most == 1 and tokens <= 512 else 128
        splits = min(most, max(1, -(-tokens // block_t)))
        warps = 8 if programs * splits <= _SMS else 4
        while block_t > 32 and not self._fits(block_t, warps):
            block_t //= 2
        return splits, block_t, warps

    def _fits(self, block_t: int, warps: int) -> bool:
        """Whether a tile of K and V is held until the step's qkv is there without spilling."""
        width = 1 if self.shape.kv_type == "fp8e4nv" else 2
        return 2 * block_t * padded(self.shape.head_dim) * width <= warps * 32 * _HELD_BYTES

    def source(self) -> KernelSource:
        shape = self.shape
        normed = self.qk_norm_eps is not None
        pool = f"*{shape.kv_type}"
        group = padded(shape.group)
        head = padded(shape.head_dim)
        return KernelSource(
            function=decode_attention,
            arguments={
                "qkv": f"*{self.qkv_type}",
                "context_lens": "*i32",
                "block_ids": "*i32",
                "block_starts": "*i32",
                "cos": "*fp32",
                "sin": "*fp32",
                **({"q_norm": "*fp32", "k_norm": "*fp32"} if normed else {}),
                "k_cache": pool,
                "v_cache": pool,
                "partial_out": "*fp32",
                "partial_stats": "*fp32",
                "counters": "*i32",
                "out": f"*{shape.act_type}",
            },
            constants={
                **({} if normed else {"q_norm": None, "k_norm": None}),
                **shape.constants,
                "GROUP_PAD": group,
                "ROWS": max(_MIN_ROWS, group),
                "ROTARY_DIM": self.rotary_dim,
                "VECTOR": rotation_vector(self.rotary_dim),
                "EPS": self.qk_norm_eps,
                "SPLITS": self.splits,
                # 32 partial values a thread in flight
                "REDUCED": min(padded(self.splits), max(1, 32 * 32 * self.warps // (group * head))),
                "BLOCK_T": self.block_t,
                "STAGES": self.stages,
                "PDL": self.pdl,
            },
            num_warps=self.warps,
            num_stages=self.stages,
            pdl=self.pdl,
        )


@dataclass(frozen=True)
class PrefillAttention(Variant):
    """Ragged chunks of queries, rotated and their keys and values appended to the pool before: causal attention over
    what a sequence had in the pool and the chunk itself.

    Arguments: q `[T, num_heads·head_dim]`, k_cache and v_cache `[num_blocks, num_kv_heads, 32, head_dim]`, tiles i32
    `[n, 2]` (see `tiles`), query_starts i32 `[B + 1]`, context_lens i32 `[B]` (tokens before the chunk; -1: nothing
    of the sequence is read or written), block_ids i32, block_starts i32 `[B + 1]`, out `[T, num_heads·head_dim]`.

    A row's result depends neither on the rows beside it nor on how its sequence was cut into chunks, to the bit, as
    long as the variant stays the same.
    """

    shape: AttentionShape
    block_m: int = 128
    block_t: int = 64
    warps: int = 8
    stages: int = 2
    pdl: bool = False

    def __post_init__(self) -> None:
        _check_block_t(self.block_t)
        if self.block_m < self.shape.group:
            raise ValueError(f"A tile of {self.block_m} rows does not hold the {self.shape.group} heads of a group.")

    @property
    def block_q(self) -> int:
        """Query tokens of a tile."""
        return self.block_m // self.shape.group

    def default(self, compute_capability: int) -> "PrefillAttention":
        """This layer's kernel before anything was measured."""
        return self._with(*self._tiles(compute_capability)[0])

    def candidates(self, compute_capability: int) -> "list[PrefillAttention]":
        """What is worth measuring on the device, the default first; at most 24. Results of different block_m or
        block_t differ in their last bits."""
        return [self._with(*tile) for tile in self._tiles(compute_capability)]

    def _with(self, block_m: int, block_t: int, warps: int, stages: int) -> "PrefillAttention":
        return replace(self, block_m=block_m, block_t=block_t, warps=warps, stages=stages)

    def _tiles(self, compute_capability: int) -> list[tuple[int, int, int, int]]:
        wide = padded(self.shape.head_dim) > 128
        if compute_capability >= 90:
            # Two warp groups of 64 rows: what their accumulators leave of the registers bounds block_t.
            tiles = [(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2)] if wide else [(128, 128, 8, 2), (128, 64, 8, 3)]
        else:
            tiles = [(64, 32, 8, 2)] if wide else [(64, 64, 4, 2), (64, 32, 4, 2)]
        tiles += [
            (block_m, block_t, warps, stages)
            for block_m, warps in ((128, 8), (64, 4), (128, 4))
            for block_t in (64, 128, 32)
            for stages in (2, 3)
        ]
        limit = _SHARED_BYTES[compute_capability]
        fitting = [tile for tile in tiles if tile[0] >= self.shape.group and self._shared_bytes(tile) <= limit]
        return list(dict.fromkeys(fitting))[:24]

    def _shared_bytes(self, tile: tuple[int, int, int, int]) -> int:
        """At most: q, and K and V of every stage."""
        block_m, block_t, _, stages = tile
        return 2 * padded(self.shape.head_dim) * (block_m + 2 * stages * block_t)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(), self.shape.num_kv_heads)

    def source(self) -> KernelSource:
        shape = self.shape
        pool = f"*{shape.kv_type}"
        return KernelSource(
            function=prefill_attention,
            arguments={
                "q": f"*{shape.act_type}",
                "k_cache": pool,
                "v_cache": pool,
                "tiles": "*i32",
                "query_starts": "*i32",
                "context_lens": "*i32",
                "block_ids": "*i32",
                "block_starts": "*i32",
                "out": f"*{shape.act_type}",
            },
            constants={
                **shape.constants,
                "BLOCK_Q": self.block_q,
                "BLOCK_M": self.block_m,
                "BLOCK_T": self.block_t,
                "STAGES": self.stages,
                "PDL": self.pdl,
            },
            num_warps=self.warps,
            num_stages=self.stages,
            pdl=self.pdl,
        )


def _check_block_t(block_t: int) -> None:
    if block_t % BLOCK_SIZE:
        raise ValueError(f"block_t has to be a multiple of the {BLOCK_SIZE} tokens of a page, not {block_t}.")
