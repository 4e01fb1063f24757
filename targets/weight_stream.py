"""A source weight, read in blocks of rows so that memory stays small, and brought to another type."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from farrier.targets.bfloat16 import to_bfloat16
from farrier.targets.errors import CheckpointError
from farrier.targets.hf_formats import Block
from farrier.targets.hf_source import QuantizedRows, Source, SourceRows
from farrier.targets.quantize import unpacked
from farrier.targets.safetensors_file import fill
from farrier.targets.tensorfile import NUMPY_TYPES, to_float32

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_BLOCK_VALUES = 1 << 20


def blocks(source: SourceRows) -> Iterator[Array]:
    """Rows `[n, columns]` as stored, in consecutive blocks. Raises CheckpointError."""
    dtype = NUMPY_TYPES[source.tensor.dtype]
    rows = max(1, _BLOCK_VALUES // source.columns)
    try:
        with source.tensor.path.open("rb", buffering=0) as file:
            file.seek(source.tensor.start + source.first_row * source.row_bytes)
            for first in range(0, source.rows, rows):
                block = np.empty((min(rows, source.rows - first), source.columns), dtype)
                fill(memoryview(block.data).cast("B"), file, source.tensor.path)
                yield block
    except OSError as error:
        raise CheckpointError(f"cannot read {source.tensor.path}: {error.strerror}") from error


def quantized_blocks(name: str, source: QuantizedRows) -> Iterator[Block]:
    """Consecutive blocks of rows as farrier stores them. Raises CheckpointError, which calls the weight `name`."""
    rows = range(source.first_row, source.first_row + source.rows)
    return source.format.blocks(name, source.parts, rows, source.columns)


def float_blocks(name: str, source: Source) -> Iterator[Float32]:
    """Consecutive blocks of rows `[n, columns]` in f32, whose numbers are those that the source stands for."""
    if isinstance(source, SourceRows):
        for rows in blocks(source):
            yield to_float32(rows, source.tensor.dtype)
        return
    for block in quantized_blocks(name, source):
        values = unpacked(block.values, source.format.kind)
        if block.zero is not None:
            values -= block.zero[:, source.groups]
        values *= block.scale[:, source.groups]
        yield values


def cast(name: str, values: Float32, dtype: str) -> Array:
    """`values` rounded to safetensors' `dtype`. Raises CheckpointError when one is too large for it."""
    if dtype == "F32":
        return values
    with np.errstate(over="ignore"):
        rounded = to_bfloat16(values) if dtype == "BF16" else values.astype(np.float16)
    if (np.isinf(to_float32(rounded, dtype)) & np.isfinite(values)).any():
        raise CheckpointError(
            f"the weight '{name}' holds values too large for {dtype.lower()}; choose another precision"
        )
    return rounded


def finite(name: str, values: Float32) -> Float32:
    """`values`, which are about to be quantized. Raises CheckpointError when one has no finite value."""
    if not np.isfinite(values).all():
        raise CheckpointError(f"the weight '{name}' holds NaN or infinity, which cannot be quantized")
    return values
