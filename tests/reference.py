"""A plain float32 numpy decoder that walks a `DecoderSpec`: slow, short, and the judge of what a spec means."""

import numpy as np
import numpy.typing as npt

from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.decoder import DecoderSpec, LayerSpec, RopeSpec

Float32 = npt.NDArray[np.float32]


def logits(checkpoint: CheckpointReader, token_ids: list[int]) -> Float32:
    """Logits `[T, V]` of every position of one sequence."""
    return _Reference(checkpoint).logits(np.array(token_ids))


class _Reference:
    def __init__(self, checkpoint: CheckpointReader) -> None:
        self.spec: DecoderSpec = checkpoint.spec
        self.weights = {name: checkpoint.float32(name) for name in checkpoint.names}
        self.weights.setdefault("lm_head.weight", self.weights["embed.weight"])

    def logits(self, token_ids: npt.NDArray[np.int64]) -> Float32:
        spec = self.spec
        hidden = self.weights["embed.weight"][token_ids] * np.float32(spec.embedding_multiplier)
        for index, layer in enumerate(spec.layers):
            p = f"layers.{index}."
            attended = self.attention(p, layer, self.norm(p + "attn_norm", hidden))
            hidden = hidden + (self.norm(p + "attn_post_norm", attended) if spec.sandwich_norms else attended)
            normed = self.norm(p + "mlp_norm", hidden)
            mixed = self.experts(p, normed) if layer.moe else self.mlp(p, normed)
            hidden = hidden + (self.norm(p + "mlp_post_norm", mixed) if spec.sandwich_norms else mixed)
        return softcap(self.linear("lm_head", self.norm("final_norm", hidden)), spec.final_softcap)

    def linear(self, name: str, x: Float32) -> Float32:
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", np.float32(0))

    def norm(self, name: str, x: Float32) -> Float32:
        weight = self.weights[name + ".weight"] + np.float32(self.spec.norm_unit_offset)
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self.spec.norm_eps)) * weight

    def attention(self, p: str, layer: LayerSpec, x: Float32) -> Float32:
        spec, length = self.spec, len(x)
        q, k, v = (self.linear(p + part, x).reshape(length, -1, spec.head_dim) for part in "qkv")
        if spec.qk_norm:
            q, k = self.norm(p + "q_norm", q), self.norm(p + "k_norm", k)
        q, k = (rotate(spec.ropes[layer.rope], part) for part in (q, k))
        k, v = (np.repeat(part, spec.num_heads // spec.num_kv_heads, axis=1) for part in (k, v))
        scores = softcap(np.einsum("qhd,khd->hqk", q, k) * np.float32(spec.attention_scale), spec.attention_softcap)
        distance = np.arange(length)[:, None] - np.arange(length)
        visible = (distance >= 0) & (distance < (layer.window or length))
        out = np.einsum("hqk,khd->qhd", softmax(np.where(visible, scores, -np.inf)), v)
        return self.linear(p + "o", out.reshape(length, -1))

    def mlp(self, p: str, x: Float32) -> Float32:
        gate = self.linear(p + "gate", x)
        if self.spec.activation == "silu":
            activated = gate / (1 + np.exp(-gate))
        else:
            activated = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
        return self.linear(p + "down", activated.astype(np.float32) * self.linear(p + "up", x))

    def experts(self, p: str, x: Float32) -> Float32:
        experts = self.spec.experts
        assert experts is not None
        share = softmax(self.linear(p + "router", x))
        share = np.where(share >= np.sort(share, axis=-1)[:, -experts.top_k, None], share, 0)
        if experts.normalize_top_k:
            share = share / share.sum(axis=-1, keepdims=True)
        return sum(share[:, e, None] * self.mlp(f"{p}experts.{e}.", x) for e in range(experts.num_experts))


def rotate(rope: RopeSpec, x: Float32) -> Float32:
    """Rotary embedding of `[T, heads, head_dim]` at positions 0 to T - 1."""
    cos, sin = (table[:, None, :] for table in rope.tables(len(x)))
    half = rope.rotary_dim // 2
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=-1)


def softmax(x: Float32) -> Float32:
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def softcap(x: Float32, cap: float | None) -> Float32:
    return x if cap is None else np.tanh(x / np.float32(cap)) * np.float32(cap)
