"""Rotation, the paged KV pool and attention in float32."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight
    return normed


def rotate(heads: Array, positions: Array, cos: Array, sin: Array) -> Array:
    """heads `[T, n, head_dim]`, positions `[T]`, cos and sin `[positions, rotary_dim/2]`: rotate-half on the first
    rotary_dim dimensions."""
    half = cos.shape[1]
    c, s = cos[positions][:, None, :], sin[positions][:, None, :]
    first, second, rest = np.split(heads, [half, 2 * half], axis=-1)
    return np.concatenate([first * c - second * s, second * c + first * s, rest], axis=-1)


def rope_qkv(
    qkv: Array,
    positions: Array,
    cos: Array,
    sin: Array,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[Array, Array, float] | None = None,
) -> tuple[Array, Array, Array]:
    """q `[T, num_heads, head_dim]`, k and v `[T, num_kv_heads, head_dim]` of qkv `[T, ...]`; norms: the weights of
    q's and k's norm, and their epsilon."""
    heads = qkv.reshape(len(qkv), num_heads + 2 * num_kv_heads, -1)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], norms[2]), rms_norm(k, norms[1], norms[2])
    return rotate(q, positions, cos, sin), rotate(k, positions, cos, sin), v


def history(cache: Array, blocks: Array, length: int) -> Array:
    """The first `length` tokens of a sequence, `[length, num_kv_heads, head_dim]`, from the pool
    `[num_blocks, num_kv_heads, 32, head_dim]`."""
    pages = cache[blocks].swapaxes(1, 2)
    return pages.reshape(-1, *pages.shape[2:])[:length]


def attention(
    q: Array, keys: Array, values: Array, positions: Array, scale: float, window: int | None, softcap: float | None
) -> Array:
    """q `[T, num_heads, head_dim]` at `positions [T]` over keys and values `[n, num_kv_heads, head_dim]` at 0..n-1:
    causal, with a window w a token sees itself and the w - 1 before it. `[T, num_heads, head_dim]`."""
    group = q.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    logits = np.einsum("thd,nhd->htn", q, keys) * np.float32(scale)
    if softcap is not None:
        logits = np.float32(softcap) * np.tanh(logits / np.float32(softcap))
    distance = positions[:, None] - np.arange(len(keys))[None, :]
    seen = (distance >= 0) & (distance < window) if window is not None else distance >= 0
    logits = np.where(seen[None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    attended: Array = np.einsum("htn,nhd->thd", weights / weights.sum(axis=-1, keepdims=True), values)
    return attended
