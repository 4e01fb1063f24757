"""The engine file of a GPU: weights in kernel layout, rotary tables, compiled kernels and the launch plan."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farrier.plugins.gemv import repack_int4
from farrier.targets.backend import Progress
from farrier.targets.bfloat16 import from_bfloat16, to_bfloat16
from farrier.targets.decoder import DecoderSpec
from farrier.targets.packing import Packed, plan
from farrier.targets.safetensors_file import DTYPE_SIZES, SafetensorsWriter
from farrier.targets.tensorfile import Tensor

_EXPERT_PARTS = {"gate_up": ("gate", "up"), "down": ("down",)}
_FLOATS = ("F32", "F16", "BF16")
_SAFETENSORS_TYPES = {"bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class Item:
    """A tensor of the engine file. `packed` says what it is made of; a table carries its `values`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    packed: Packed | None = None
    values: npt.NDArray[Any] | None = None
    repeats: int = 1
    """How often each of a row's scales or zero points is repeated."""

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]


def items(spec: DecoderSpec, tensors: Mapping[str, Tensor], activation: str, max_seq_len: int) -> list[Item]:
    """Everything but kernels and plan. Matrices that are not quantized, and biases, get the activations' type."""
    result = []
    for packed in plan(spec, tensors, _EXPERT_PARTS):
        dtype, shape = packed.dtype, packed.shape
        if packed.name.endswith("router.weight"):
            dtype = "F32"  # who is chosen hangs on it
        elif dtype in _FLOATS and not packed.name.endswith(("norm.weight", ".scale")):
            dtype = _SAFETENSORS_TYPES[activation]
        if ".experts." in packed.name:
            shape = (shape[0] * shape[1], *shape[2:])
        repeats = 1
        if packed.name.endswith((".scale", ".zero")) and len(shape) == 2:
            repeats = _repeats(tensors[packed.sources[0].rpartition(".")[0] + ".weight"], shape[1])
            shape = (shape[0], shape[1] * repeats)
        result.append(Item(packed.name, dtype, shape, packed, repeats=repeats))
    for index, rope in enumerate(spec.ropes):
        for name, table in zip(("cos", "sin"), rope.tables(max_seq_len), strict=True):
            result.append(Item(f"rope.{index}.{name}", "F32", table.shape, values=table))
    return result


def _repeats(weight: Tensor, groups: int) -> int:
    """By how much smaller groups have to be for the kernels, which take powers of two."""
    size = weight.shape[-1] * (2 if weight.dtype == "U8" else 1) // groups
    return size // (size & -size)


def blob(name: str, content: bytes) -> Item:
    """Bytes as a tensor."""
    return Item(name, "U8", (len(content),), values=np.frombuffer(content, np.uint8))


def write_engine_file(
    path: Path, content: list[Item], tensors: Mapping[str, Tensor], progress: Progress | None
) -> None:
    """Writes the engine file, one source tensor at a time."""
    total, done = sum(item.size for item in content), 0
    with SafetensorsWriter(path, {item.name: (item.dtype, item.shape) for item in content}) as writer:
        for item in content:
            position = 0
            for chunk in _chunks(item, tensors):
                writer.write(item.name, position, np.ascontiguousarray(chunk))
                position += chunk.nbytes
            done += position
            if progress is not None:
                progress(done, total)


def item_values(item: Item, tensors: Mapping[str, Tensor]) -> npt.NDArray[Any]:
    """All of it, as the engine file holds it."""
    whole = np.concatenate([chunk.reshape(-1) for chunk in _chunks(item, tensors)])
    return np.reshape(whole, item.shape)


def _chunks(item: Item, tensors: Mapping[str, Tensor]) -> Iterator[npt.NDArray[Any]]:
    if item.packed is None:
        assert item.values is not None
        yield item.values
        return
    is_int4 = item.dtype == "U8"
    for chunk in item.packed.chunks(tensors):
        stored = repack_int4(chunk) if is_int4 else _converted(chunk, item.packed.dtype, item.dtype)
        yield stored if item.repeats == 1 else np.repeat(stored, item.repeats, axis=-1)


def _converted(values: npt.NDArray[Any], have: str, want: str) -> npt.NDArray[Any]:
    if have == want:
        return values
    wide = from_bfloat16(values) if have == "BF16" else np.asarray(values, np.float32)
    if want == "F32":
        return wide
    return to_bfloat16(wide) if want == "BF16" else wide.astype(np.float16)
