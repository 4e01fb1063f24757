"""Engine tensors as OpenVINO constants over the memory-mapped engine file: nothing is copied."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset16 as ops

from farrier.targets.tensorfile import Tensor

_TYPES = {"F32": ov.Type.f32, "F16": ov.Type.f16, "BF16": ov.Type.bf16, "I8": ov.Type.i8}


class EngineWeights:
    """Tensors of an engine file by name. The mapping must outlive every model built from it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def matrix(self, name: str) -> Any:
        scale = self._tensors.get(name.removesuffix(".weight") + ".scale")
        if scale is None:
            return self._plain(name)
        if self._tensors[name].dtype == "I8":
            return self._int8(name, scale)
        return self._int4(name, scale)

    def rows(self, name: str, ids: Any) -> Any:
        # Converted after the gather: converting the table first would unfold a second copy of it.
        gathered = ops.gather(self._constant(name), ids, ops.constant(np.int32(0)))
        return gathered if self._tensors[name].dtype == "F32" else ops.convert(gathered, "f32")

    def _plain(self, name: str) -> Any:
        constant = self._constant(name)
        if self._tensors[name].dtype == "F32":
            return constant
        widened = ops.convert(constant, "f32")
        # Without this mark the plugin unfolds an f32 copy of the matrix while it compiles: ten times slower, and
        # twice the weights in memory.
        widened.get_rt_info()["decompression_0"] = ""
        return widened

    def _int8(self, name: str, scale: Tensor) -> Any:
        """`[..., N, K]` int8, one scale per row."""
        per_row = ops.constant(np.asarray(scale.array, np.float32)[..., None])
        return ops.multiply(ops.convert(self._constant(name), "f32"), per_row)

    def _int4(self, name: str, scale: Tensor) -> Any:
        """`[..., N, K / 2]` packed bytes, low nibble first, one scale per group of K."""
        packed = self._tensors[name]
        *rows, halves = packed.shape
        groups = scale.shape[-1]
        shape = [*rows, groups, 2 * halves // groups]
        constant = ops.constant(ov.Tensor(packed.array, ov.Shape(shape), ov.Type.i4), shared_memory=True)
        per_group = ops.constant(np.asarray(scale.array, np.float32)[..., None])
        weight = ops.multiply(ops.convert(constant, "f32"), per_group)
        return ops.reshape(weight, np.array([*rows, 2 * halves], np.int32), False)

    def _constant(self, name: str) -> Any:
        tensor = self._tensors[name]
        shared = ov.Tensor(tensor.array, ov.Shape(tensor.shape), _TYPES[tensor.dtype])
        return ops.constant(shared, shared_memory=True)
