"""Paged KV pools, and the types of their elements, for the tests of attention."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.kernels.interpreter import bfloat16, float8, float8_values, float32

TYPES: dict[str, Any] = {
    "bf16": (bfloat16, float32),
    "fp16": (lambda x: np.asarray(x, np.float16), lambda x: np.asarray(x, np.float32)),
    "fp32": (lambda x: np.asarray(x, np.float32), lambda x: x),
    "fp8e4nv": (float8, float8_values),
}
"""Type name: how float32 values become its bits, and back."""


def rotary_tables(positions: int, rotary_dim: int) -> tuple[Any, Any]:
    angles = np.arange(positions)[:, None] / 100.0 ** (np.arange(0, rotary_dim, 2) / rotary_dim)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@dataclass
class Pool:
    """The pages of some sequences, scattered; beyond a sequence's length lies what must not be read: NaN."""

    keys: Any
    values: Any
    block_ids: Any
    block_starts: Any
    decode: Any

    def blocks(self, sequence: int) -> Any:
        return self.block_ids[self.block_starts[sequence] : self.block_starts[sequence + 1]]

    def slots(self, sequence: int, positions: Any) -> Any:
        return self.blocks(sequence)[positions // 32] * 32 + positions % 32


def pool(lengths: Any, room: Any, kv_heads: int, head_dim: int, kv_type: str, random: Any) -> Pool:
    """Pages for `lengths[b] + room[b]` tokens of each sequence, the first `lengths[b]` of them filled."""
    counts = [-(-max(int(n) + int(r), 0) // 32) for n, r in zip(lengths, room, strict=True)]
    block_starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    num_blocks = int(block_starts[-1]) + 2
    block_ids = random.permutation(num_blocks)[: block_starts[-1]].astype(np.int32)
    encode, decode = TYPES[kv_type]
    nan = {"bf16": 0x7FC0, "fp16": np.nan, "fp8e4nv": 0x7F}[kv_type]
    caches = []
    for _ in range(2):
        cache = np.full_like(encode(np.zeros((num_blocks, kv_heads, 32, head_dim))), nan)
        for b, length in enumerate(lengths):
            pages = encode(random.normal(size=(counts[b], kv_heads, 32, head_dim)))
            pages.swapaxes(1, 2)[np.arange(counts[b] * 32).reshape(-1, 32) >= length] = nan
            cache[block_ids[block_starts[b] : block_starts[b + 1]]] = pages
        caches.append(cache)
    return Pool(*caches, block_ids, block_starts, decode)
