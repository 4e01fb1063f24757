"""A source weight, read in blocks of rows so that memory stays small, and brought to another type."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from farrier.targets.bfloat16 import from_bfloat16, to_bfloat16
from farrier.targets.errors import CheckpointError
from farrier.targets.hf_weights import SourceRows
from farrier.targets.tensorfile import NUMPY_TYPES

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_BLOCK_VALUES = 1 << 20


def blocks(source: SourceRows) -> Iterator[tuple[int, Array]]:
    """(first row, rows `[n, columns]` as stored) of consecutive blocks of rows. Raises CheckpointError."""
    dtype = NUMPY_TYPES[source.tensor.dtype]
    rows = max(1, _BLOCK_VALUES // source.columns)
    try:
        with source.tensor.path.open("rb", buffering=0) as file:
            file.seek(source.tensor.start + source.first_row * source.row_bytes)
            for first in range(0, source.rows, rows):
                block = np.empty((min(rows, source.rows - first), source.columns), dtype)
                _fill(block, file, source)
                yield first, block
    except OSError as error:
        raise CheckpointError(f"cannot read {source.tensor.path}: {error.strerror}") from error


def _fill(block: Array, file: Any, source: SourceRows) -> None:
    view = memoryview(block.data).cast("B")
    while len(view):
        size = file.readinto(view)
        if not size:
            raise CheckpointError(f"{source.tensor.path} became shorter while it was read")
        view = view[size:]


def to_float32(block: Array, dtype: str) -> Float32:
    """Values, exact, of a block of F32, BF16 or F16."""
    return from_bfloat16(block) if dtype == "BF16" else block.astype(np.float32, copy=False)


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
