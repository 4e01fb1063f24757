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
        return self._plain(name) if scale is None else self._quantized(name, scale)

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

    def _quantized(self, name: str, scale: Tensor) -> Any:
        """int8 `[..., N, K]`, or int4 as levels from 0 to 15 `[..., N, K / 2]`, low nibble first, with a scale, and
        perhaps a zero point, per row or per group of K."""
        stored = self._tensors[name]
        is_int4 = stored.dtype == "U8"
        *rows, columns = [*stored.shape[:-1], stored.shape[-1] * (2 if is_int4 else 1)]
        in_groups = scale.array.ndim == stored.array.ndim
        shape = [*rows, scale.shape[-1], columns // scale.shape[-1]] if in_groups else [*rows, columns]
        shared = ov.Tensor(stored.array, ov.Shape(shape), ov.Type.u4 if is_int4 else ov.Type.i8)
        levels = ops.convert(ops.constant(shared, shared_memory=True), "f32")
        zero = self._tensors.get(name.removesuffix(".weight") + ".zero")
        if is_int4:
            middle = np.full((1,) * len(shape), 8, np.uint8)
            zeros = middle if zero is None else (zero.array[..., None] + np.int8(8)).view(np.uint8)
            levels = ops.subtract(levels, ops.convert(ops.constant(zeros), "f32"))
        elif zero is not None:
            levels = ops.subtract(levels, ops.convert(ops.constant(zero.array[..., None]), "f32"))
        weight = ops.multiply(levels, ops.constant(np.asarray(scale.array, np.float32)[..., None]))
        return ops.reshape(weight, np.array([*rows, columns], np.int32), False) if in_groups else weight

    def _constant(self, name: str) -> Any:
        tensor = self._tensors[name]
        shared = ov.Tensor(tensor.array, ov.Shape(tensor.shape), _TYPES[tensor.dtype])
        return ops.constant(shared, shared_memory=True)
