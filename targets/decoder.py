"""A model is data: every supported decoder is one `DecoderSpec` with different settings.

Backends walk the spec; none has per-model files. `farrier.targets.hf_config` maps Hugging Face
configs to it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of the first `rotary_dim` dimensions of a head, rotate-half convention.

    `inv_freq` has `rotary_dim // 2` entries (radians per position), all scaling already applied;
    `cos` and `sin` are both multiplied by `attention_factor`.
    """

    rotary_dim: int
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0

    def tables(self, num_positions: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """cos and sin, each `[num_positions, rotary_dim // 2]` float32."""
        # float32 like the reference implementation: its rounding at large positions is part of the model.
        angles = np.outer(np.arange(num_positions, dtype=np.float32), np.asarray(self.inv_freq, np.float32))
        cos, sin = np.cos(angles), np.sin(angles)
        return cos * np.float32(self.attention_factor), sin * np.float32(self.attention_factor)


@dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer: attention window in tokens (None: all), rope (index into
    `DecoderSpec.ropes`), and whether the MLP is a mixture of experts."""

    window: int | None
    rope: int
    moe: bool


@dataclass(frozen=True)
class ExpertSpec:
    """Mixture of experts: softmax router, `top_k` of `num_experts`, weights renormalized if asked."""

    num_experts: int
    top_k: int
    intermediate_size: int
    normalize_top_k: bool


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer. Weights are `[out_features, in_features]`; activations `[tokens, features]`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    max_positions: int
    norm_eps: float
    attention_scale: float
    activation: Activation = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    """Gemma: the attention and MLP outputs are normalized too, before they join the residual."""
    norm_unit_offset: bool = False
    """Gemma: norms multiply by `1 + weight`."""
    embedding_multiplier: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    experts: ExpertSpec | None = None
    tied_embeddings: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every canonical weight and its shape. This is what a unified checkpoint must hold, no more, no less."""
        h, q, kv = self.hidden_size, self.q_size, self.kv_size
        shapes: dict[str, tuple[int, ...]] = {"embed.weight": (self.vocab_size, h)}
        for index, layer in enumerate(self.layers):
            p = f"layers.{index}."
            shapes[p + "attn_norm.weight"] = (h,)
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[f"{p}{name}.weight"] = (rows, h)
                if self.qkv_bias:
                    shapes[f"{p}{name}.bias"] = (rows,)
            if self.qk_norm:
                shapes[p + "q_norm.weight"] = shapes[p + "k_norm.weight"] = (self.head_dim,)
            shapes[p + "o.weight"] = (h, q)
            if self.o_bias:
                shapes[p + "o.bias"] = (h,)
            shapes[p + "mlp_norm.weight"] = (h,)
            if self.sandwich_norms:
                shapes[p + "attn_post_norm.weight"] = shapes[p + "mlp_post_norm.weight"] = (h,)
            if layer.moe:
                assert self.experts is not None
                shapes[p + "router.weight"] = (self.experts.num_experts, h)
                for expert in range(self.experts.num_experts):
                    shapes.update(self._mlp(f"{p}experts.{expert}.", self.experts.intermediate_size))
            else:
                shapes.update(self._mlp(p, self.intermediate_size))
        shapes["final_norm.weight"] = (h,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes

    def _mlp(self, prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        h = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {
            prefix + "gate.weight": (size, h),
            prefix + "up.weight": (size, h),
            prefix + "down.weight": (h, size),
        }
        if self.mlp_bias:
            shapes |= {prefix + "gate.bias": (size,), prefix + "up.bias": (size,), prefix + "down.bias": (h,)}
        return shapes

    def num_parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.tensors().values())


def is_projection(name: str) -> bool:
    """Whether a canonical tensor is a matrix product's weight: what quantization may touch. The router decides
    which experts run, so it stays exact; the embedding is a table, not a product."""
    parts = name.split(".")
    return parts[-1] == "weight" and parts[-2] in ("q", "k", "v", "o", "gate", "up", "down", "lm_head")
