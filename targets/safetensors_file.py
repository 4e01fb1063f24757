"""The safetensors format with plain file I/O: headers are checked before anything is read, files written in place.

Reading by `pread` instead of by mapping keeps the memory of a conversion small; the `safetensors` package maps.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farrier.targets.errors import CheckpointError

DTYPE_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes `start` to `stop` of `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def itemsize(self) -> int:
        return DTYPE_SIZES[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, by name. Raises CheckpointError unless they are whole, disjoint and fill the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(
                    f"{path} is not a safetensors file, or truncated: its header does not fit into it"
                )
            header = json.loads(file.read(length).decode(), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is corrupt: its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is corrupt: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, size, 8 + length, tensors)
    return tensors


def read_bytes(info: TensorInfo, start: int = 0, stop: int | None = None) -> bytearray:
    """Bytes `start` to `stop` of a tensor, all of them by default. Raises CheckpointError."""
    data = bytearray((info.stop - info.start if stop is None else stop) - start)
    try:
        with info.path.open("rb", buffering=0) as file:
            file.seek(info.start + start)
            fill(memoryview(data), file, info.path)
    except OSError as error:
        raise CheckpointError(f"cannot read {info.path}: {error.strerror}") from error
    return data


def fill(view: memoryview, file: Any, path: Path) -> None:
    """Fills a view of bytes from the unbuffered `file` at `path`, wherever that stands."""
    while len(view):
        size = file.readinto(view)
        if not size:
            raise CheckpointError(f"{path} became shorter while it was read")
        view = view[size:]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
        valid = all(type(number) is int and number >= 0 for number in numbers)
        valid = valid and isinstance(shape, list) and math.prod(shape) * DTYPE_SIZES[dtype] == stop - start
    except (TypeError, KeyError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"{path} is corrupt: the header's entry for '{name}' makes no sense")
    return TensorInfo(path, dtype, tuple(shape), data_start + start, data_start + stop)


def _check_layout(path: Path, size: int, data_start: int, tensors: Mapping[str, TensorInfo]) -> None:
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.stop > size:
            raise CheckpointError(f"{path} is truncated: '{name}' ends at byte {info.stop}, the file at byte {size}")
        if info.start != end:
            problem = "overlaps another tensor" if info.start < end else "leaves a hole before it"
            raise CheckpointError(f"{path} is corrupt: '{name}' {problem}")
        end = info.stop
    if end != size:
        raise CheckpointError(f"{path} is corrupt: it has {size - end} bytes more than its header says")


class SafetensorsWriter:
    """Writes one file: all tensors are declared first, then their bytes come in any order.

    Disk space is reserved at once, so that a full disk shows before the work is done (OSError ENOSPC).
    Tensors lie in the order of their item sizes, largest first, and so are aligned in a mapping of the file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._path = path
        self._tensors = tensors
        self._offsets: dict[str, int] = {}

    def __enter__(self) -> "SafetensorsWriter":
        header, offset = {}, 0
        for name, (dtype, shape) in sorted(self._tensors.items(), key=lambda item: -DTYPE_SIZES[item[1][0]]):
            stop = offset + math.prod(shape) * DTYPE_SIZES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, stop)}
            self._offsets[name] = offset
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        self._data_start = 8 + len(text)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.posix_fallocate(self._fd, 0, self._data_start + offset)
            self._write_at(len(text).to_bytes(8, "little") + text, 0)
        except OSError:
            os.close(self._fd)
            raise
        return self

    def write(self, name: str, position: int, data: Any) -> None:
        """Writes a C-contiguous buffer at byte `position` of tensor `name`."""
        self._write_at(data, self._data_start + self._offsets[name] + position)

    def __exit__(self, *error: object) -> None:
        try:
            if error[0] is None:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)

    def _write_at(self, data: Any, offset: int) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written
