"""The KV pool's layout, as OpenVINO's CPU plugin wants it."""

from farrier.targets.decoder import DecoderSpec
from farrier.targets.engine import KvDtype

BLOCK_SIZE = 32
"""Tokens in a KV block: the only size OpenVINO's CPU PagedAttention takes."""

_SCALE_BYTES = 8
"""A u8 cache keeps a scale and a zero point (two f32): for keys per channel of a block, for values per token."""


def kv_bytes_per_block(spec: DecoderSpec, kv_dtype: KvDtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    if kv_dtype == "u8":
        key = (BLOCK_SIZE + _SCALE_BYTES) * spec.head_dim
        value = BLOCK_SIZE * (spec.head_dim + _SCALE_BYTES)
    else:
        key = value = BLOCK_SIZE * spec.head_dim * {"f32": 4, "bf16": 2}[kv_dtype]
    return len(spec.layers) * spec.num_kv_heads * (key + value)
