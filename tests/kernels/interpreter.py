"""Runs `KernelSource`s on the CPU under Triton's interpreter, over numpy arrays.

The interpreter takes torch tensors, knows no bf16 arithmetic in `tl.dot` and no Gluon; what is missing is added here.
bf16 arrays are uint16 bits, fp8 arrays uint8 bits.
"""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, interpreter_builder
from triton.tools.tensor_descriptor import TensorDescriptor

from farrier.plugins.kernel import KernelSource

_TYPE_NAMES = {
    "fp64": "float64",
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8e4nv": "float8_e4m3fn",
    "i1": "bool",
    "i8": "int8",
    "u8": "uint8",
    "i16": "int16",
    "i32": "int32",
    "u32": "uint32",
    "i64": "int64",
    "u64": "uint64",
}


def run(source: KernelSource, grid: tuple[int, ...], *arguments: Any) -> None:
    """Runs every program of `grid` one after the other. `arguments` as `source.arguments` names them: numpy arrays
    (contiguous; written in place) for pointers and tensor descriptors, numbers for the rest. None stands for a null
    pointer."""
    assert len(arguments) == len(source.arguments), f"expected {list(source.arguments)}"
    given: dict[str, Any] = dict(source.constants)
    for (name, type_), value in zip(source.arguments.items(), arguments, strict=True):
        if type_.startswith("*"):
            array = np.zeros(16, np.uint8) if value is None else value
            assert array.flags.c_contiguous, f"{name} is not contiguous"
            given[name] = _Pointer(array, _TYPE_NAMES[type_[1:]])
        elif type_.startswith("tensordesc"):
            given[name] = _descriptor(value, type_)
        else:
            given[name] = value
    with _patched(), np.errstate(all="ignore"):  # a GPU does not warn
        _interpreted(source.function).run(grid=grid, warmup=False, **given)


class _TypeName(str):
    itemsize: int


class _Pointer:
    """As much of a torch tensor as the interpreter asks for."""

    def __init__(self, array: Any, type_name: str) -> None:
        self._array = array
        self.dtype = _TypeName(type_name)
        self.dtype.itemsize = array.itemsize

    def data_ptr(self) -> int:
        return int(self._array.ctypes.data)

    def untyped_storage(self) -> "_Pointer":
        return self

    def cpu(self) -> "_Pointer":
        return self

    def new_empty(self, _: int, device: str) -> "_Pointer":
        return _Pointer(self._array, self.dtype)

    def set_(self, *_: Any) -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    def stride(self) -> tuple[int, ...]:
        return ()

    def copy_(self, _: Any) -> None:
        pass


def _descriptor(array: Any, type_: str) -> TensorDescriptor:
    """`type_`: tensordesc<element[block]>."""
    element, _, block = type_.removeprefix("tensordesc<").removesuffix("]>").partition("[")
    strides = [stride // array.itemsize for stride in array.strides]
    return TensorDescriptor(
        _Pointer(array, _TYPE_NAMES[element]), list(array.shape), strides, [int(size) for size in block.split(",")]
    )


def _interpreted(function: Any) -> Any:
    return _without_layouts(function, {}) if isinstance(function, GluonJITFunction) else function


def _without_layouts(function: GluonJITFunction[Any], done: dict[Any, Any]) -> InterpretedFunction[Any]:
    """A Gluon kernel says of every tensor where it lies; of what it computes, that says nothing."""
    if function in done:
        return done[function]
    original = function.fn
    namespace = dict(original.__globals__)
    namespace["tl"] = tl  # where the interpreter looks for what it replaces
    copied = types.FunctionType(original.__code__, namespace, original.__name__, original.__defaults__)
    copied.__annotations__ = original.__annotations__
    done[function] = _Interpreted(copied)
    for name, value in original.__globals__.items():
        if isinstance(value, GluonJITFunction):
            namespace[name] = _without_layouts(value, done)
        elif value is gl:
            namespace[name] = _GLUON
    return done[function]


class _Interpreted(InterpretedFunction[Any]):
    def rewrite(self) -> Any:
        function = super().rewrite()
        function.__annotations__ = self.fn.__annotations__  # Triton recognizes `tl.constexpr`, not `gl.constexpr`
        return function


class _GluonLanguage:
    """`gl` with layouts taken away: everything else is Triton's own."""

    _LAYOUTS = ("BlockedLayout", "SliceLayout", "DotOperandLayout", "DistributedLinearLayout", "AutoLayout")

    def __getattr__(self, name: str) -> Any:
        if name in self._LAYOUTS:
            return lambda *_, **__: None
        return getattr(tl, name)

    @staticmethod
    def arange(start: Any, end: Any, layout: Any = None) -> Any:
        return tl.arange(start, end)

    @staticmethod
    def zeros(shape: Any, dtype: Any, layout: Any = None) -> Any:
        return tl.zeros(shape, dtype)

    @staticmethod
    def full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Any:
        return tl.full(shape, value, dtype)

    @staticmethod
    def convert_layout(value: Any, layout: Any, assert_trivial: bool = False) -> Any:
        return value

    @staticmethod
    def num_warps() -> int:
        return 1

    @staticmethod
    def to_tensor(value: Any) -> Any:
        return value

    @staticmethod
    def inline_asm_elementwise(asm: Any, constraints: Any, args: Any, dtype: Any, is_pure: Any, pack: Any) -> Any:
        from tests.kernels.ptx import inline_asm

        types_ = dtype if isinstance(dtype, tuple | tl.tuple) else (dtype,)
        results = inline_asm(_plain(asm), len(types_), [argument.handle.data for argument in args], _plain(pack))
        tensors = [
            tl.tensor(TensorHandle(bits.view(_NUMPY[type_]), type_), tl.block_type(type_, list(bits.shape)))
            for bits, type_ in zip(results, types_, strict=True)
        ]
        return tl.tuple(tensors) if types_ is dtype else tensors[0]


_GLUON = _GluonLanguage()
_NUMPY = {tl.int32: np.int32, tl.uint32: np.uint32, tl.float32: np.float32}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, tl.constexpr) else value


@contextmanager
def _patched() -> Iterator[None]:
    """The interpreter multiplies bf16 and fp8 matrices by their bits, and truncates where the GPU rounds."""
    original = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)  # numpy 2.4 makes no int of an array of one number
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(_float32(a), _float32(b), dtype=np.float32) + d.data
        return TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(src.data).view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return TensorHandle(rounded.astype(np.uint16), target)
        return original[1](self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.float8e4nv:
            return TensorHandle(float8(src.data), tl.float8e4nv)
        return original[2](self, src, dst_type, rounding_mode)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    interpreter._patch_lang_tensor = patch_lang_tensor
    try:
        yield
    finally:
        interpreter._patch_lang_tensor = patch_tensor
        (
            InterpreterBuilder.create_dot,
            InterpreterBuilder.cast_impl,
            InterpreterBuilder.create_fp_to_fp,
        ) = original


def _float32(handle: Any) -> Any:
    type_ = handle.dtype.scalar
    if type_ in (tl.bfloat16, tl.float8e4nv):
        return interpreter_builder.create_fp_to_fp(handle, tl.float32, None).data.reshape(handle.data.shape)
    return handle.data.astype(np.float32)


def bfloat16(values: Any) -> Any:
    """float32 values as bf16 bits, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def float32(bits: Any) -> Any:
    """bf16 bits as float32 values."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def float8(values: Any) -> Any:
    """float32 values as e4m3 bits, rounded to nearest even, saturating; NaN stays NaN."""
    values = np.asarray(values, np.float32)
    finite = float8_values(np.arange(127, dtype=np.uint8))
    magnitude = np.abs(values)
    above = np.clip(np.searchsorted(finite, magnitude), 1, 126)
    to_next, to_last = finite[above] - magnitude, magnitude - finite[above - 1]
    bits = np.where((to_last < to_next) | ((to_last == to_next) & (above % 2 == 1)), above - 1, above)
    bits = np.where(np.isnan(values), 127, bits)
    return (bits | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def float8_values(bits: Any) -> Any:
    """e4m3 bits as float32 values."""
    bits = np.asarray(bits, np.uint8).astype(np.int32)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude = np.where((bits & 127) == 127, np.nan, magnitude)
    return np.where(bits & 128, -magnitude, magnitude).astype(np.float32)
