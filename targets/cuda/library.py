"""Matrix products by cuBLASLt, for many rows."""

from typing import Any

import numpy as np
from cuda.core import Stream
from nvmath.bindings import cublasLt

from farrier.targets.cuda.device import Array, DeviceMemory
from farrier.targets.cuda.footprint import WORKSPACE_BYTES
from farrier.targets.errors import EngineError

_CUDA_TYPES = {"fp32": 0, "fp16": 2, "bf16": 14}
_COMPUTE_F32 = 68
_TRANSPOSE = 1
_MAX_SHAPES = 4096

_Key = tuple[int, int, int, str, str, bool, bool]


class Library:
    """cuBLASLt with one workspace: products run one after the other on one stream."""

    def __init__(self, memory: DeviceMemory) -> None:
        try:
            self._handle = cublasLt.create()
        except Exception as error:  # nvmath-python raises different types by what is missing
            raise EngineError(f"cuBLASLt cannot be loaded; install farrier[cuda] again: {error}") from error
        self._workspace = memory.allocate(WORKSPACE_BYTES)
        self._shapes: dict[_Key, _Product] = {}

    def multiply(
        self, x: Array, weight: Array, bias: Array | None, out: Array, rows: int, *, accumulate: bool, stream: Stream
    ) -> None:
        """out[rows, n] (+)= x[rows, k] @ weight[n, k]ᵀ (+ bias[n]); all row-major."""
        n, k = weight.shape
        key = (rows, n, k, x.type, out.type, accumulate, bias is not None)
        product = self._shapes.get(key)
        if product is None:
            if len(self._shapes) >= _MAX_SHAPES:
                self._shapes.pop(next(iter(self._shapes))).close()
            product = self._shapes[key] = _Product(self._handle, key)
        product.run(self._handle, x, weight, bias, out, self._workspace, int(stream.handle))

    def close(self) -> None:
        for product in self._shapes.values():
            product.close()
        self._shapes.clear()
        if self._handle:
            cublasLt.destroy(self._handle)
            self._handle = 0


class _Product:
    """One shape: descriptors and the algorithm cuBLASLt's heuristics put first.

    cuBLAS thinks in columns: what is row-major here is transposed there, so it computes outᵀ = weight · xᵀ.
    """

    def __init__(self, handle: int, key: _Key) -> None:
        rows, n, k, type_, out_type, accumulate, has_bias = key
        in_type, result_type = _CUDA_TYPES[type_], _CUDA_TYPES[out_type]
        self._one = np.ones(1, np.float32)
        self._beta = np.full(1, accumulate, np.float32)
        self._operation = cublasLt.matmul_desc_create(_COMPUTE_F32, _CUDA_TYPES["fp32"])
        attributes = cublasLt.MatmulDescAttribute
        self._set(attributes.TRANSA, np.array([_TRANSPOSE], np.int32))
        if has_bias:
            self._set(attributes.EPILOGUE, np.array([int(cublasLt.Epilogue.BIAS)], np.int32))
        self._layouts = (
            cublasLt.matrix_layout_create(in_type, k, n, k),
            cublasLt.matrix_layout_create(in_type, k, rows, k),
            cublasLt.matrix_layout_create(result_type, n, rows, n),
        )
        preference = cublasLt.matmul_preference_create()
        try:
            size = np.array([WORKSPACE_BYTES], np.uint64)
            name = cublasLt.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES
            cublasLt.matmul_preference_set_attribute(preference, name, size.ctypes.data, size.nbytes)
            self._algorithm = np.zeros(1, cublasLt.matmul_heuristic_result_dtype)
            found = np.zeros(1, np.int32)
            a, b, c = self._layouts
            cublasLt.matmul_algo_get_heuristic(
                handle, self._operation, a, b, c, c, preference, 1, self._algorithm.ctypes.data, found.ctypes.data
            )
        finally:
            cublasLt.matmul_preference_destroy(preference)
        if not found[0]:
            raise EngineError(f"cuBLASLt has no product of [{rows}, {k}] and [{n}, {k}] in {type_}.")

    def _set(self, attribute: Any, value: "np.typing.NDArray[Any]") -> None:
        cublasLt.matmul_desc_set_attribute(self._operation, attribute, value.ctypes.data, value.nbytes)

    def run(
        self, handle: int, x: Array, weight: Array, bias: Array | None, out: Array, workspace: int, stream: int
    ) -> None:
        if bias is not None:
            self._set(cublasLt.MatmulDescAttribute.BIAS_POINTER, np.array([bias.address], np.uint64))
        a, b, c = self._layouts
        cublasLt.matmul(
            handle,
            self._operation,
            self._one.ctypes.data,
            weight.address,
            a,
            x.address,
            b,
            self._beta.ctypes.data,
            out.address,
            c,
            out.address,
            c,
            self._algorithm.ctypes.data,
            workspace,
            WORKSPACE_BYTES,
            stream,
        )

    def close(self) -> None:
        cublasLt.matmul_desc_destroy(self._operation)
        for layout in self._layouts:
            cublasLt.matrix_layout_destroy(layout)
