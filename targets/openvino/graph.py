"""Walks a `DecoderSpec` into an OpenVINO graph."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import openvino as ov
from openvino import opset16 as ops

from farrier.targets.decoder import DecoderSpec, LayerSpec
from farrier.targets.openvino.attention import Attention, parameter, softcap


class Weights(Protocol):
    """Where the walk takes its constants from: kernel-layout tensors by name (see `pack`)."""

    def __contains__(self, name: str) -> bool: ...

    def matrix(self, name: str) -> Any:
        """A weight as an f32-valued node, with its decompression where it is stored compressed."""
        ...

    def rows(self, name: str, ids: Any) -> Any:
        """Rows `ids` of a table, f32."""
        ...


def build_graph(spec: DecoderSpec, weights: Weights, attention: Attention, max_seq_len: int) -> ov.Model:
    """`token_ids`, `positions` `[T]`, `sample_rows` `[S]` and what `attention` declares → `logits` `[S, vocab]` f32."""
    return _Walk(spec, weights, attention, max_seq_len).model()


def _ints(*values: int) -> Any:
    return ops.constant(np.array(values, np.int32))


def _axis(value: int) -> Any:
    return ops.constant(np.int32(value))


def _float(value: float) -> Any:
    return ops.constant(np.float32(value))


class _Walk:
    def __init__(self, spec: DecoderSpec, weights: Weights, attention: Attention, max_seq_len: int) -> None:
        self._spec = spec
        self._weights = weights
        self._attention = attention
        self._max_seq_len = max_seq_len

    def model(self) -> ov.Model:
        spec = self._spec
        inputs = {name: parameter(name, np.int32, [-1]) for name in ("token_ids", "positions", "sample_rows")}
        inputs |= self._attention.declare()
        hidden = self._weights.rows("embed.weight", inputs["token_ids"])
        if spec.embedding_multiplier != 1.0:
            hidden = ops.multiply(hidden, _float(spec.embedding_multiplier))
        ropes = [self._rope(index, inputs["positions"]) for index in range(len(spec.ropes))]
        for index, layer in enumerate(spec.layers):
            hidden = self._layer(index, layer, hidden, ropes[layer.rope])
        sampled = self._norm("final_norm", ops.gather(hidden, inputs["sample_rows"], _axis(0)))
        logits = self._linear(sampled, "lm_head" if "lm_head.weight" in self._weights else "embed")
        if spec.final_softcap is not None:
            logits = softcap(logits, spec.final_softcap)
        result = ops.result(logits)
        result.output(0).get_tensor().set_names({"logits"})
        return ov.Model([result, *self._attention.results()], list(inputs.values()), "farrier")

    def _rope(self, index: int, positions: Any) -> tuple[Any, Any]:
        """cos and sin of this step's positions, each `[T, 1, 1, rotary_dim]`."""
        cos, sin = (
            ops.gather(ops.constant(np.concatenate([t, t], axis=1)[:, None, None, :]), positions, _axis(0))
            for t in self._spec.ropes[index].tables(self._max_seq_len)
        )
        return cos, sin

    def _layer(self, index: int, layer: LayerSpec, hidden: Any, rope: tuple[Any, Any]) -> Any:
        p = f"layers.{index}."
        attended = self._attend(index, layer, self._norm(p + "attn_norm", hidden), rope)
        if self._spec.sandwich_norms:
            attended = self._norm(p + "attn_post_norm", attended)
        hidden = ops.add(hidden, attended)
        normed = self._norm(p + "mlp_norm", hidden)
        out = self._experts(p, normed) if layer.moe else self._mlp(p, normed)
        if self._spec.sandwich_norms:
            out = self._norm(p + "mlp_post_norm", out)
        return ops.add(hidden, out)

    def _norm(self, name: str, x: Any) -> Any:
        # This very chain of operations is what the plugin fuses into one RMS kernel.
        mean = ops.reduce_mean(ops.power(x, _float(2.0)), _axis(-1), keep_dims=True)
        inverse = ops.power(ops.sqrt(ops.add(mean, _float(self._spec.norm_eps))), _float(-1.0))
        return ops.multiply(ops.multiply(x, inverse), self._weights.matrix(name + ".weight"))

    def _linear(self, x: Any, name: str) -> Any:
        y = ops.matmul(x, self._weights.matrix(name + ".weight"), False, True)
        if name + ".bias" in self._weights:
            y = ops.add(y, self._weights.matrix(name + ".bias"))
        return y

    def _products(self, x: Any, prefix: str, fused: str, names: Sequence[str], sizes: Sequence[int]) -> list[Any]:
        """Several products of one input: a single one when the build packed their weights together."""
        if f"{prefix}{fused}.weight" not in self._weights:
            return [self._linear(x, prefix + name).output(0) for name in names]
        split = ops.variadic_split(self._linear(x, prefix + fused), _axis(1), _ints(*sizes))
        return list(split.outputs())

    def _attend(self, index: int, layer: LayerSpec, x: Any, rope: tuple[Any, Any]) -> Any:
        spec, p = self._spec, f"layers.{index}."
        q, k, v = self._products(x, p, "qkv", ("q", "k", "v"), (spec.q_size, spec.kv_size, spec.kv_size))
        rotary_dim = spec.ropes[layer.rope].rotary_dim
        rotated = []
        for name, rows, heads in (("q", q, spec.num_heads), ("k", k, spec.num_kv_heads)):
            rows = ops.reshape(rows, _ints(-1, heads, 1, spec.head_dim), False)
            if spec.qk_norm:
                rows = self._norm(f"{p}{name}_norm", rows)
            rows = self._rotate(rows, rope, rotary_dim)
            rotated.append(ops.reshape(rows, _ints(-1, heads * spec.head_dim), False).output(0))
        return self._linear(self._attention.attend(index, layer, rotated[0], rotated[1], v), p + "o")

    def _rotate(self, x: Any, rope: tuple[Any, Any], rotary_dim: int) -> Any:
        """x `[T, heads, 1, head_dim]`. The plugin fuses this chain into one RoPE kernel; it wants axis 3 spelled so."""
        if rotary_dim != self._spec.head_dim:
            turning, still = ops.variadic_split(
                x, _axis(3), _ints(rotary_dim, self._spec.head_dim - rotary_dim)
            ).outputs()
            return ops.concat([self._rotate_whole(turning, rope, rotary_dim), still], -1)
        return self._rotate_whole(x, rope, rotary_dim)

    @staticmethod
    def _rotate_whole(x: Any, rope: tuple[Any, Any], rotary_dim: int) -> Any:
        first, second = ops.variadic_split(x, _axis(3), _ints(rotary_dim // 2, rotary_dim // 2)).outputs()
        minus_one = ops.constant(np.full((1, 1, 1, 1), -1.0, np.float32))
        turned = ops.concat([ops.multiply(second, minus_one), first], -1)
        return ops.add(ops.multiply(x, rope[0]), ops.multiply(turned, rope[1]))

    def _activate(self, x: Any) -> Any:
        return ops.swish(x) if self._spec.activation == "silu" else ops.gelu(x, "tanh")

    def _mlp(self, prefix: str, x: Any) -> Any:
        size = self._spec.intermediate_size
        gate, up = self._products(x, prefix, "gate_up", ("gate", "up"), (size, size))
        return self._linear(ops.multiply(self._activate(gate), up), prefix + "down")

    def _experts(self, prefix: str, x: Any) -> Any:
        """Mixture of experts over `[T, hidden]`: every expert over every token, and scattered routing weights decide
        what counts. Exact, but it computes experts nobody chose."""
        assert self._spec.experts is not None
        experts = self._spec.experts
        logits = ops.matmul(x, self._weights.matrix(prefix + "router.weight"), False, True)
        routing = ops.softmax(logits, -1)
        top = ops.topk(routing, _axis(experts.top_k), -1, "max", "value", "i32")
        chosen, indices = top.outputs()
        if experts.normalize_top_k:
            chosen = ops.divide(chosen, ops.reduce_sum(chosen, _axis(-1), True)).output(0)
        zeros = ops.broadcast(_float(0.0), ops.shape_of(routing, "i32"))
        scattered = ops.scatter_elements_update(zeros, indices, chosen, _axis(1))
        weight = ops.unsqueeze(ops.transpose(scattered, _ints(1, 0)), _axis(2))  # [E, T, 1]
        tokens = ops.tile(ops.unsqueeze(x, _axis(0)), _ints(experts.num_experts, 1, 1))  # [E, T, hidden]
        gate = ops.matmul(tokens, self._weights.matrix(prefix + "experts.gate.weight"), False, True)
        up = ops.matmul(tokens, self._weights.matrix(prefix + "experts.up.weight"), False, True)
        down = self._weights.matrix(prefix + "experts.down.weight")
        out = ops.matmul(ops.multiply(self._activate(gate), up), down, False, True)  # [E, T, hidden]
        return ops.reduce_sum(ops.multiply(out, weight), _axis(0), False)
