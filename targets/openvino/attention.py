"""Paged attention on the CPU: how it stands in the graph, and what its KV pool looks like to the host.

`PagedAttention` lowers to OpenVINO's PagedAttention operation. That operation has no logit soft cap, so the
models that need one (Gemma 2) take `SoftcapAttention`: plain operations over rows gathered from the same
kind of block pool, slower, with the same contract.
"""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset16 as ops
from openvino.op import _PagedAttentionExtension

from farrier.targets.decoder import DecoderSpec, LayerSpec
from farrier.targets.engine import Batch
from farrier.targets.openvino.layout import BLOCK_SIZE

Inputs = dict[str, npt.NDArray[Any]]


class Attention(Protocol):
    """One way to attend: the graph half (`declare`, `attend`) and the host half (`bind`, `inputs`, `after`)."""

    def declare(self) -> dict[str, ov.Node]:
        """Graph inputs, by name."""
        ...

    def attend(self, index: int, layer: LayerSpec, q: Any, k: Any, v: Any) -> Any:
        """q `[T, q_size]`, k and v `[T, kv_size]`, rotated → `[T, q_size]`."""
        ...

    def results(self) -> list[ov.Node]:
        """Graph results beside the logits."""
        ...

    def bytes_per_block(self, compiled: ov.CompiledModel) -> int: ...

    def bind(self, compiled: ov.CompiledModel, request: ov.InferRequest, num_blocks: int) -> None:
        """Allocates the pool and binds it to the request, once."""
        ...

    def inputs(self, batch: Batch) -> Inputs:
        """What this step's attention needs beside tokens and positions."""
        ...

    def after(self, batch: Batch) -> None:
        """Runs when the step is done."""
        ...


def attention_for(spec: DecoderSpec) -> Attention:
    return PagedAttention(spec) if spec.attention_softcap is None else SoftcapAttention(spec)


def parameter(name: str, dtype: Any, shape: list[int]) -> ov.Node:
    """A named graph input; -1 is a dynamic dimension, dtype None is left to the plugin."""
    element = ov.Type.dynamic if dtype is None else ov.Type(dtype)
    node = ops.parameter(ov.PartialShape(shape), element, name)
    node.output(0).get_tensor().set_names({name})
    return node


def _scalar(value: float, dtype: Any) -> Any:
    return ops.constant(np.array(value, dtype)).output(0)


def _empty(dtype: Any) -> Any:
    return ops.constant(np.zeros((0,), dtype)).output(0)


class PagedAttention:
    """OpenVINO's own PagedAttention: blocked cache tensors `[blocks, kv_heads, 32, head_dim]` a layer, typed and
    shaped by the plugin for the KV precision asked for."""

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec
        self._inputs: dict[str, ov.Node] = {}

    def declare(self) -> dict[str, ov.Node]:
        for name in ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins"):
            self._inputs[name] = parameter(name, np.int32, [-1])
        self._inputs["max_context_len"] = parameter("max_context_len", np.int32, [])
        for name in self._caches():
            self._inputs[name] = parameter(name, None, [-1, -1, -1, -1])
        return self._inputs

    def _caches(self) -> list[str]:
        return [f"{kind}.{i}" for i in range(len(self._spec.layers)) for kind in ("key_cache", "value_cache")]

    def attend(self, index: int, layer: LayerSpec, q: Any, k: Any, v: Any) -> Any:
        given = {name: node.output(0) for name, node in self._inputs.items()}
        node = _PagedAttentionExtension(
            [
                q,
                k,
                v,
                given[f"key_cache.{index}"],
                given[f"value_cache.{index}"],
                given["past_lens"],
                given["subsequence_begins"],
                given["block_indices"],
                given["block_indices_begins"],
                _scalar(self._spec.attention_scale, np.float32),
                _scalar(layer.window or 0, np.int32),
                _empty(np.float32),  # alibi_slopes
                given["max_context_len"],
                _empty(np.int32),  # score_aggregation_window
                _empty(np.int32),  # rotated_block_indices
                _empty(np.int32),  # rotation_deltas
                _empty(np.float32),  # rotation_trig_lut
                _empty(np.float32),  # xattention_threshold
                _scalar(0, np.int32),  # xattention_block_size
                _scalar(0, np.int32),  # xattention_stride
                _empty(np.float32),  # sinks
                _scalar(0, np.int32),  # adaptive_rkv_start_size
                _empty(np.int32),  # adaptive_rkv_evictable_sizes
                _empty(np.int32),  # adaptive_rkv_diversity_block_set_indices
                _empty(np.int32),  # adaptive_rkv_diversity_block_set_indices_begins
                _empty(np.int32),  # token_type_ids
                _empty(np.uint8),  # qq_bias
                _empty(np.int32),  # qq_bias_begins
            ]
        )
        info = node.get_rt_info()
        info["num_k_heads"] = info["num_v_heads"] = self._spec.num_kv_heads
        info["k_head_size"] = info["v_head_size"] = self._spec.head_dim
        return node.output(0)

    def results(self) -> list[ov.Node]:
        return []

    def bytes_per_block(self, compiled: ov.CompiledModel) -> int:
        total = 0
        for name in self._caches():
            port = compiled.input(name)
            total += int(np.prod(self._shape(port, 1))) * int(port.get_element_type().size)
        return total

    @staticmethod
    def _shape(port: Any, num_blocks: int) -> list[int]:
        return [num_blocks, *(dimension.get_length() for dimension in list(port.get_partial_shape())[1:])]

    def bind(self, compiled: ov.CompiledModel, request: ov.InferRequest, num_blocks: int) -> None:
        for name in self._caches():
            port = compiled.input(name)
            tensor = ov.Tensor(port.get_element_type(), ov.Shape(self._shape(port, num_blocks)))
            request.set_tensor(name, tensor)

    def inputs(self, batch: Batch) -> Inputs:
        lens = batch.context_lens + np.diff(batch.query_starts)
        return {
            "past_lens": batch.context_lens,
            "subsequence_begins": batch.query_starts,
            "block_indices": batch.block_ids,
            "block_indices_begins": batch.block_starts,
            "max_context_len": np.array(lens.max(), np.int32),
        }

    def after(self, batch: Batch) -> None:
        pass


class SoftcapAttention:
    """Attention with soft-capped logits. The pool is `[blocks * 32, kv_heads, head_dim]` f32 a layer; the graph
    gathers past rows by slot, and the host writes the new rows back after the step."""

    def __init__(self, spec: DecoderSpec) -> None:
        self._spec = spec
        self._inputs: dict[str, ov.Node] = {}
        self._results: list[ov.Node] = []
        self._pools: dict[str, npt.NDArray[np.float32]] = {}
        self._request: ov.InferRequest | None = None

    def declare(self) -> dict[str, ov.Node]:
        heads, dim = self._spec.num_kv_heads, self._spec.head_dim
        self._inputs["past_slots"] = parameter("past_slots", np.int32, [-1])
        for window in self._windows():
            self._inputs[f"mask.{window}"] = parameter(f"mask.{window}", np.float32, [-1, -1])
        for index in range(len(self._spec.layers)):
            for kind in ("key", "value"):
                name = f"{kind}_cache.{index}"
                self._inputs[name] = parameter(name, np.float32, [-1, heads, dim])
        return self._inputs

    def _windows(self) -> list[int]:
        return sorted({layer.window or 0 for layer in self._spec.layers})

    def attend(self, index: int, layer: LayerSpec, q: Any, k: Any, v: Any) -> Any:
        spec = self._spec
        heads, dim, group = spec.num_kv_heads, spec.head_dim, spec.num_heads // spec.num_kv_heads
        keys = self._history(f"key_cache.{index}", k)
        values = self._history(f"value_cache.{index}", v)
        q = ops.transpose(ops.reshape(q, np.array([-1, heads, group, dim], np.int32), False), [1, 2, 0, 3])
        scores = ops.multiply(ops.matmul(q, keys, False, True), _scalar(spec.attention_scale, np.float32))
        assert spec.attention_softcap is not None
        scores = softcap(scores, spec.attention_softcap)
        scores = ops.add(scores, self._inputs[f"mask.{layer.window or 0}"])
        attended = ops.matmul(ops.softmax(scores, -1), values, False, False)  # [kv_heads, group, T, dim]
        rows = ops.transpose(attended, [2, 0, 1, 3])
        return ops.reshape(rows, np.array([-1, spec.q_size], np.int32), False).output(0)

    def _history(self, name: str, new: Any) -> Any:
        """Past and new rows of one cache, `[kv_heads, 1, past + T, head_dim]`."""
        heads, dim = self._spec.num_kv_heads, self._spec.head_dim
        rows = ops.reshape(new, np.array([-1, heads, dim], np.int32), False)
        result = ops.result(rows)
        result.output(0).get_tensor().set_names({"new_" + name})
        self._results.append(result)
        past = ops.gather(self._inputs[name], self._inputs["past_slots"], ops.constant(np.int32(0)))
        together = ops.transpose(ops.concat([past, rows], 0), [1, 0, 2])
        return ops.unsqueeze(together, ops.constant(np.int32(1)))

    def results(self) -> list[ov.Node]:
        return self._results

    def bytes_per_block(self, compiled: ov.CompiledModel) -> int:
        return 2 * len(self._spec.layers) * BLOCK_SIZE * self._spec.kv_size * 4

    def bind(self, compiled: ov.CompiledModel, request: ov.InferRequest, num_blocks: int) -> None:
        shape = (num_blocks * BLOCK_SIZE, self._spec.num_kv_heads, self._spec.head_dim)
        self._request = request
        for index in range(len(self._spec.layers)):
            for kind in ("key", "value"):
                pool = self._pools[f"{kind}_cache.{index}"] = np.zeros(shape, np.float32)
                request.set_tensor(f"{kind}_cache.{index}", ov.Tensor(pool, shared_memory=True))

    def inputs(self, batch: Batch) -> Inputs:
        past = [self._slots(batch, b, 0, int(n)) for b, n in enumerate(batch.context_lens)]
        past_owner = np.repeat(np.arange(batch.num_sequences), batch.context_lens)
        past_position = np.concatenate([np.arange(n) for n in batch.context_lens])
        owner = np.repeat(np.arange(batch.num_sequences), np.diff(batch.query_starts))
        distance = batch.positions[:, None] - np.concatenate([past_position, batch.positions])[None, :]
        visible = (owner[:, None] == np.concatenate([past_owner, owner])[None, :]) & (distance >= 0)
        inputs: Inputs = {"past_slots": np.concatenate(past).astype(np.int32)}
        for window in self._windows():
            seen = visible & (distance < window) if window else visible
            inputs[f"mask.{window}"] = np.where(seen, np.float32(0), np.float32(-np.inf))
        return inputs

    @staticmethod
    def _slots(batch: Batch, sequence: int, start: int, stop: int) -> npt.NDArray[np.int32]:
        blocks = batch.block_ids[batch.block_starts[sequence] : batch.block_starts[sequence + 1]]
        positions = np.arange(start, stop)
        slots: npt.NDArray[np.int32] = blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        return slots

    def after(self, batch: Batch) -> None:
        assert self._request is not None
        lengths = np.diff(batch.query_starts)
        slots = np.concatenate(
            [self._slots(batch, b, int(n), int(n + lengths[b])) for b, n in enumerate(batch.context_lens)]
        )
        for name, pool in self._pools.items():
            pool[slots] = self._request.get_tensor("new_" + name).data


def softcap(x: Any, cap: float) -> Any:
    """`cap * tanh(x / cap)`"""
    return ops.multiply(ops.tanh(ops.divide(x, _scalar(cap, np.float32))), _scalar(cap, np.float32))
