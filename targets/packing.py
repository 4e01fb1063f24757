"""From canonical checkpoint tensors to an engine's: what shares an input becomes one matrix.

Fused names beside the canonical ones: `layers.N.qkv`, `layers.N.gate_up`, and `layers.N.experts.*`, stacked
`[experts, rows, columns]`. Norms and biases are f32, a norm's unit offset already added. Quantized
weights are handed on as the checkpoint has them: how they are to lie in memory is each backend's own.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from farrier.targets.bfloat16 import from_bfloat16
from farrier.targets.decoder import DecoderSpec
from farrier.targets.errors import BuildError
from farrier.targets.safetensors_file import DTYPE_SIZES
from farrier.targets.tensorfile import Tensor

_FUSED = (("qkv", ("q", "k", "v")), ("gate_up", ("gate", "up")))


@dataclass(frozen=True)
class Packed:
    """One tensor of the engine file: its sources' rows one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    offset: float = 0.0

    def chunks(self, tensors: Mapping[str, Tensor]) -> Iterator[npt.NDArray[Any]]:
        for source in self.sources:
            tensor = tensors[source]
            as_is = tensor.dtype == self.dtype and not self.offset
            yield tensor.array if as_is else _float32(tensor) + np.float32(self.offset)


def plan(spec: DecoderSpec, tensors: Mapping[str, Tensor], expert_parts: Mapping[str, tuple[str, ...]]) -> list[Packed]:
    """What the engine file will hold, in order. `expert_parts`: names of the experts' matrices, and which of an
    expert's parts follow each other in each. Raises BuildError when a layer's experts differ in precision."""
    fused: dict[str, tuple[str, tuple[str, ...]]] = {}
    for index, layer in enumerate(spec.layers):
        p = f"layers.{index}."
        if layer.moe:
            for name, parts in expert_parts.items():
                members = tuple(f"{p}experts.{e}.{part}" for e in _experts(spec) for part in parts)
                if not _alike(tensors, members):
                    raise BuildError(f"All experts of layer {index} need one precision; override them together.")
                fused[members[0]] = (f"{p}experts.{name}", members)
        for name, parts in _FUSED:
            members = tuple(p + part for part in parts)
            if members[0] + ".weight" in tensors and _alike(tensors, members):
                fused[members[0]] = (p + name, members)
    taken = {member for _, members in fused.values() for member in members}
    packed: list[Packed] = []
    for full in tensors:
        base, _, kind = full.rpartition(".")
        if base in fused:
            name, members = fused[base]
            packed.append(_pack(spec, f"{name}.{kind}", tuple(f"{m}.{kind}" for m in members), tensors))
        elif base not in taken:
            packed.append(_pack(spec, full, (full,), tensors))
    return packed


def _experts(spec: DecoderSpec) -> range:
    assert spec.experts is not None
    return range(spec.experts.num_experts)


def _alike(tensors: Mapping[str, Tensor], members: tuple[str, ...]) -> bool:
    """Whether the members' weights can stand in one matrix: same dtype, same columns, scales of the same kind,
    and all with zero points, or none."""

    def kind(member: str) -> tuple[Any, ...]:
        weight, scale = tensors[member + ".weight"], tensors.get(member + ".scale")
        others = (member + ".zero" in tensors, member + ".bias" in tensors)
        return (weight.dtype, weight.shape[1:], scale and (scale.dtype, scale.shape[1:]), *others)

    return len({kind(member) for member in members}) == 1


def _pack(spec: DecoderSpec, name: str, sources: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Packed:
    first = tensors[sources[0]]
    rows = sum(tensors[source].shape[0] for source in sources)
    shape: tuple[int, ...] = (rows, *first.shape[1:])
    if ".experts." in name:
        assert spec.experts is not None
        experts = spec.experts.num_experts
        shape = (experts, rows // experts, *first.shape[1:])
    is_norm = name.endswith("norm.weight")
    dtype = "F32" if is_norm or name.endswith(".bias") else first.dtype
    return Packed(name, dtype, shape, sources, 1.0 if is_norm and spec.norm_unit_offset else 0.0)


def _float32(tensor: Tensor) -> npt.NDArray[np.float32]:
    return from_bfloat16(tensor.array) if tensor.dtype == "BF16" else np.asarray(tensor.array, np.float32)


def packed_bytes(items: list[Packed]) -> int:
    return sum(math.prod(item.shape) * DTYPE_SIZES[item.dtype] for item in items)
