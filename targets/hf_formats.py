"""How models on the Hugging Face hub store quantized matrices, read in blocks of output rows as farrier stores them.

Nothing is rounded on the way: numbers are only moved, and zero points shifted by what makes unsigned numbers signed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from farrier.targets.errors import CheckpointError
from farrier.targets.float8 import is_nan
from farrier.targets.quantize import pack_int4
from farrier.targets.safetensors_file import TensorInfo, read_bytes
from farrier.targets.tensorfile import NUMPY_TYPES, to_float32

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Words = npt.NDArray[np.uint32]
Parts = Mapping[str, TensorInfo]
"""Suffix, such as `qweight`, → one of the tensors that make up a matrix."""

_BLOCK_VALUES = 1 << 20
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Part:
    """The types and the shapes that a tensor may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Block:
    """Rows of a matrix of G groups of columns; see `farrier.targets.quantize` for what the arrays mean.

    `values`: stored numbers `[n, …]`. `scale` and `zero`: `[n, G]`.
    """

    values: Array
    scale: Float32
    zero: Int8 | None


class Format(Protocol):
    """A way to store `[rows, columns]` matrices in several tensors."""

    @property
    def kind(self) -> Literal["int8", "int4", "fp8"]: ...

    @property
    def zero_points(self) -> bool: ...

    @property
    def marker(self) -> tuple[str, str]:
        """The suffix and the type of the tensor that shows that a matrix is stored so."""
        ...

    def group_size(self, columns: int) -> int:
        """Neighbouring columns that share a scale."""
        ...

    def parts(self, rows: int, columns: int, present: Callable[[str], bool]) -> dict[str, Part]:
        """The tensors that a matrix needs, by suffix; `present` says whether the model has one."""
        ...

    def blocks(self, name: str, parts: Parts, rows: range, columns: int) -> Iterator[Block]:
        """Consecutive blocks of those rows of the matrix. Raises CheckpointError, which calls the matrix `name`."""
        ...


@dataclass(frozen=True)
class Gptq:
    """`qweight` `[K / p, N]`, p numbers of a column in a word of 32 bits; `qzeros` `[K / group, N / p]`, p numbers of a
    row in a word; `scales` `[K / group, N]`; `g_idx` `[K]`, which group each of K belongs to.

    `zero_offset`: what is missing in the stored zero points. `group`: None for all of K.
    """

    bits: Literal[4, 8]
    group: int | None
    symmetric: bool
    zero_offset: int
    marker: ClassVar = ("qweight", "I32")

    @property
    def kind(self) -> Literal["int8", "int4"]:
        return "int4" if self.bits == 4 else "int8"

    @property
    def zero_points(self) -> bool:
        return not self.symmetric

    def group_size(self, columns: int) -> int:
        return self.group or columns

    def parts(self, rows: int, columns: int, present: Callable[[str], bool]) -> dict[str, Part]:
        groups, in_word = -(-columns // self.group_size(columns)), 32 // self.bits
        tensors = {
            "qweight": Part(("I32",), ((columns // in_word, rows),)),
            "qzeros": Part(("I32",), ((groups, rows // in_word),)),
            "scales": Part(_FLOATS, ((groups, rows),)),
        }
        return tensors | ({"g_idx": Part(("I32",), ((columns,),))} if present("g_idx") else {})

    def blocks(self, name: str, parts: Parts, rows: range, columns: int) -> Iterator[Block]:
        words, scale = _words(parts["qweight"]), _floats(parts["scales"]).T
        stored = _numbers(_words(parts["qzeros"]), np.arange(0, 32, self.bits), self.bits).T
        # Zero points wrap around: 0 was stored as the largest number.
        zeros = _signed(stored + np.uint8(self.zero_offset), self.bits)
        zero: Int8 | None = zeros
        if self.symmetric:
            if zeros.any():
                raise CheckpointError(
                    f"the weight '{name}' has zero points, though 'sym' in config.json's quantization_config says that"
                    " it has none; set it to false if they are meant"
                )
            zero = None
        for part in _spans(rows, columns):
            packed = np.ascontiguousarray(words[:, part].T).view(np.uint8)
            yield _block(name, _to_signed(packed, self.bits), scale, zero, part)


@dataclass(frozen=True)
class Awq:
    """`qweight` `[K, N / 8]`, `qzeros` `[K / group, N / 8]`, each eight numbers of a row in a word, the even ones
    first; `scales` `[K / group, N]`. `group`: None for all of K."""

    group: int | None
    kind: ClassVar[Literal["int4"]] = "int4"
    zero_points: ClassVar = True
    marker: ClassVar = ("qweight", "I32")

    def group_size(self, columns: int) -> int:
        return self.group or columns

    def parts(self, rows: int, columns: int, present: Callable[[str], bool]) -> dict[str, Part]:
        groups = -(-columns // self.group_size(columns))
        return {
            "qweight": Part(("I32",), ((columns, rows // 8),)),
            "qzeros": Part(("I32",), ((groups, rows // 8),)),
            "scales": Part(_FLOATS, ((groups, rows),)),
        }

    def blocks(self, name: str, parts: Parts, rows: range, columns: int) -> Iterator[Block]:
        shifts = 4 * np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where the numbers 0, 1, 2 … of a word stand
        words, scale = _words(parts["qweight"]), _floats(parts["scales"]).T
        zero = _signed(_numbers(_words(parts["qzeros"]), shifts, 4).T, 4)
        for part in _spans(rows, columns):
            first_word = part.start // 8
            numbers = _numbers(words[:, first_word : -(-part.stop // 8)], shifts, 4)
            inside = numbers[:, part.start - 8 * first_word : part.stop - 8 * first_word]
            yield _block(name, _to_signed(pack_int4(np.ascontiguousarray(inside.T)), 4), scale, zero, part)


@dataclass(frozen=True)
class PackedRows:
    """compressed-tensors' integers: `weight_packed` `[N, K / p]`, p numbers of a row in a word; `weight_scale`
    `[N, K / group]`; `weight_zero_point` `[N / p, K / group]`, p numbers of a column in a word. `group`: None for all
    of K."""

    bits: Literal[4, 8]
    group: int | None
    symmetric: bool
    marker: ClassVar = ("weight_packed", "I32")

    @property
    def kind(self) -> Literal["int8", "int4"]:
        return "int4" if self.bits == 4 else "int8"

    @property
    def zero_points(self) -> bool:
        return not self.symmetric

    def group_size(self, columns: int) -> int:
        return self.group or columns

    def parts(self, rows: int, columns: int, present: Callable[[str], bool]) -> dict[str, Part]:
        groups, in_word = -(-columns // self.group_size(columns)), 32 // self.bits
        tensors = {
            "weight_packed": Part(("I32",), ((rows, columns // in_word),)),
            "weight_scale": Part(_FLOATS, ((rows, groups),)),
        }
        zeros = Part(("I32",), ((-(-rows // in_word), groups),))
        return tensors if self.symmetric else {**tensors, "weight_zero_point": zeros}

    def blocks(self, name: str, parts: Parts, rows: range, columns: int) -> Iterator[Block]:
        scale = _floats(parts["weight_scale"])
        zero: Int8 | None = None
        if not self.symmetric:
            words = _words(parts["weight_zero_point"])
            zero = _signed(_numbers(words.T, np.arange(0, 32, self.bits), self.bits).T, self.bits)
        row_bytes = columns * self.bits // 8
        for part in _spans(rows, columns):
            packed = _bytes(parts["weight_packed"], part, row_bytes)
            yield _block(name, _to_signed(packed, self.bits), scale, zero, part)


@dataclass(frozen=True)
class Scaled:
    """A `weight` `[N, K]` of float8 or int8 with its scale beside it, by which it is multiplied: one number, one for
    each row, or one for each `block` (rows, columns). `scales`: names that the scale goes by."""

    kind: Literal["int8", "fp8"]
    scales: tuple[str, ...]
    block: tuple[int, int] | None
    zero_points: ClassVar = False

    @property
    def marker(self) -> tuple[str, str]:
        return "weight", "I8" if self.kind == "int8" else "F8_E4M3"

    def group_size(self, columns: int) -> int:
        return self.block[1] if self.block else columns

    def parts(self, rows: int, columns: int, present: Callable[[str], bool]) -> dict[str, Part]:
        shapes: tuple[tuple[int, ...], ...] = ((rows, 1), (rows,), (1,), ())
        if self.block:
            shapes = ((-(-rows // self.block[0]), -(-columns // self.block[1])),)
        scale = next((name for name in self.scales if present(name)), self.scales[0])
        return {"weight": Part((self.marker[1],), ((rows, columns),)), scale: Part(_FLOATS, shapes)}

    def blocks(self, name: str, parts: Parts, rows: range, columns: int) -> Iterator[Block]:
        info = parts["weight"]
        stored = _floats(next(tensor for suffix, tensor in parts.items() if suffix != "weight"))
        if self.block:
            scale = np.repeat(stored, self.block[0], axis=0)
        else:
            scale = np.broadcast_to(stored.reshape(-1, 1), (info.shape[0], 1))
        for part in _spans(rows, columns):
            values = _bytes(info, part, columns).view(NUMPY_TYPES[info.dtype])
            if self.kind == "fp8" and is_nan(values).any():
                raise CheckpointError(f"the weight '{name}' holds NaN; the model is damaged, fetch it again")
            yield _block(name, values, scale, None, part)


def _spans(rows: range, columns: int) -> Iterator[slice]:
    step = max(8, _BLOCK_VALUES // columns // 8 * 8)
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _block(name: str, values: Array, scale: Float32, zero: Int8 | None, rows: slice) -> Block:
    scales = np.ascontiguousarray(scale[rows])
    if not np.isfinite(scales).all():
        raise CheckpointError(f"a scale of the weight '{name}' is not finite; the model is damaged, fetch it again")
    return Block(values, scales, None if zero is None else np.ascontiguousarray(zero[rows]))


def _words(info: TensorInfo) -> Words:
    return np.frombuffer(read_bytes(info), np.uint32).reshape(info.shape)


def _floats(info: TensorInfo) -> Float32:
    return to_float32(np.frombuffer(read_bytes(info), NUMPY_TYPES[info.dtype]).reshape(info.shape), info.dtype)


def _bytes(info: TensorInfo, rows: slice, row_bytes: int) -> npt.NDArray[np.uint8]:
    """`[n, row_bytes]`"""
    return np.frombuffer(read_bytes(info, rows.start * row_bytes, rows.stop * row_bytes), np.uint8).reshape(
        -1, row_bytes
    )


def _numbers(words: Words, shifts: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """The unsigned numbers in words `[R, C]`, side by side in the order of `shifts`."""
    numbers = (words[:, :, None] >> shifts.astype(np.uint32)) & np.uint32((1 << bits) - 1)
    return numbers.astype(np.uint8).reshape(len(words), -1)


def _signed(numbers: npt.NDArray[np.uint8], bits: int) -> Int8:
    """Unsigned numbers of so many bits, one in a byte, less half of their range."""
    unsigned = numbers & np.uint8((1 << bits) - 1)
    return (unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


def _to_signed(packed: npt.NDArray[np.uint8], bits: int) -> Array:
    """Packed unsigned numbers, less half of their range: that flips the highest bit of each."""
    return packed ^ np.uint8(0x88) if bits == 4 else (packed ^ np.uint8(0x80)).view(np.int8)
