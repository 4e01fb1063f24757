"""A canonical weight as rows of what a Hugging Face model's files hold: of one tensor, or of a quantized matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from farrier.targets.errors import CheckpointError
from farrier.targets.hf_formats import Format, Part, Parts
from farrier.targets.quantize import Quantization
from farrier.targets.safetensors_file import TensorInfo, read_bytes

_GROUP_INDEX = "g_idx"


@dataclass(frozen=True)
class SourceRows:
    """Consecutive rows of a tensor, seen as `[rows, columns]`. A vector's rows have one column."""

    tensor: TensorInfo
    first_row: int
    rows: int
    columns: int

    @property
    def row_bytes(self) -> int:
        return self.columns * self.tensor.itemsize

    @property
    def num_bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class QuantizedRows:
    """Consecutive rows of a quantized matrix `[matrix_rows, columns]`, which lies in several tensors, its `parts`."""

    format: Format
    parts: Parts
    matrix_rows: int
    first_row: int
    rows: int
    columns: int

    @property
    def num_bytes(self) -> int:
        """Of its share of all parts."""
        return sum(info.stop - info.start for info in self.parts.values()) * self.rows // self.matrix_rows

    @cached_property
    def groups(self) -> npt.NDArray[np.int64]:
        """`[columns]`: which group of scales each column belongs to."""
        size = self.format.group_size(self.columns)
        regular = np.arange(self.columns) // size
        if _GROUP_INDEX not in self.parts:
            return regular
        stored = np.frombuffer(read_bytes(self.parts[_GROUP_INDEX]), np.int32).astype(np.int64)
        if stored.min() < 0 or stored.max() > regular[-1]:
            raise CheckpointError(
                f"a '{_GROUP_INDEX}' in {self.parts[_GROUP_INDEX].path} names groups that do not exist; the model is"
                " damaged, fetch it again"
            )
        return stored

    @cached_property
    def obstacle(self) -> str | None:
        """Why farrier cannot store it without rounding."""
        size = self.format.group_size(self.columns)
        if self.columns % size:
            return f"groups of {size} do not divide its {self.columns} columns"
        if not np.array_equal(self.groups, np.arange(self.columns) // size):
            return "its columns are grouped in order of activation ('desc_act')"
        return None

    @property
    def quantization(self) -> Quantization | None:
        """How farrier stores it without rounding; None if there is an `obstacle`."""
        if self.obstacle is not None:
            return None
        size = self.format.group_size(self.columns)
        in_groups = size != self.columns or self.format.kind == "int4" or self.format.zero_points
        return Quantization(self.format.kind, size if in_groups else None, self.format.zero_points)


Source = SourceRows | QuantizedRows


@dataclass(frozen=True)
class Candidate:
    """A name under which a weight may be stored, as the rows from `first_row` on of something of that shape."""

    name: str
    shape: tuple[int, ...]
    first_row: int = 0

    def find(
        self, tensors: Mapping[str, TensorInfo], rows: int, quantized: Format | None
    ) -> tuple[Source, set[str]] | None:
        """The weight, of so many rows, and the names of all tensors it is made of; None if there is nothing of that
        name. Raises CheckpointError when there is something else."""
        if quantized is not None and self._is_quantized(tensors, quantized):
            return self._find_quantized(tensors, rows, quantized)
        info = tensors.get(self.name)
        if info is None:
            return None
        if info.shape != self.shape:
            raise _other_shape(self.name, info.shape, (self.shape,))
        columns = self.shape[-1] if len(self.shape) > 1 else 1
        return SourceRows(info, self.first_row, rows, columns), {self.name}

    def _is_quantized(self, tensors: Mapping[str, TensorInfo], quantized: Format) -> bool:
        suffix, dtype = quantized.marker
        marker = tensors.get(self._part(suffix))
        return self.name.endswith(".weight") and len(self.shape) == 2 and marker is not None and marker.dtype == dtype

    def _find_quantized(
        self, tensors: Mapping[str, TensorInfo], rows: int, quantized: Format
    ) -> tuple[Source, set[str]]:
        matrix_rows, columns = self.shape
        expected = quantized.parts(matrix_rows, columns, lambda suffix: self._part(suffix) in tensors)
        parts = {suffix: self._checked(tensors, self._part(suffix), part) for suffix, part in expected.items()}
        source = QuantizedRows(quantized, parts, matrix_rows, self.first_row, rows, columns)
        return source, {self._part(suffix) for suffix in expected}

    def _checked(self, tensors: Mapping[str, TensorInfo], name: str, part: Part) -> TensorInfo:
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(f"the model lacks the tensor '{name}' of shape {list(part.shapes[0])}")
        if info.shape not in part.shapes:
            raise _other_shape(name, info.shape, part.shapes)
        if info.dtype not in part.dtypes:
            raise CheckpointError(f"the tensor '{name}' is stored as {info.dtype}, not as {' or '.join(part.dtypes)}")
        return info

    def _part(self, suffix: str) -> str:
        return self.name.removesuffix("weight") + suffix


def _other_shape(name: str, found: tuple[int, ...], expected: tuple[Any, ...]) -> CheckpointError:
    wanted = " or ".join(str(list(shape)) for shape in expected)
    return CheckpointError(f"the tensor '{name}' has shape {list(found)}, config.json calls for {wanted}")
