"""Safetensors files, read through a memory map and written as a stream.

The container of checkpoints and engines. The `safetensors` package reads whole files well; what it does not give
is a writer that never holds more than one tensor, and a map whose pages can be handed back while it stays open.
"""

import json
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from farrier.targets.errors import CheckpointError

# bf16 has no numpy type: it is seen as its bits.
NUMPY_TYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER = 100_000_000
_ALIGNMENT = 64
_TRIM_SECONDS = 0.02


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: safetensors dtype name, and its elements (bf16 as uint16 bits)."""

    dtype: str
    array: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


class TensorFile:
    """A memory-mapped safetensors file. Arrays are views of the map and die with `close`."""

    def __init__(self, path: Path, map_: mmap.mmap, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self.path = path
        self.tensors: Mapping[str, Tensor] = tensors
        self.metadata = metadata
        self._map = map_

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Raises CheckpointError when the file is missing, truncated or not safetensors."""
        try:
            with path.open("rb") as file:
                entries, metadata, start = read_header(path, file)
                map_ = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
        data = np.frombuffer(map_, np.uint8)
        tensors = {
            name: Tensor(
                entry.dtype, data[start + entry.begin : start + entry.end].view(entry.numpy).reshape(entry.shape)
            )
            for name, entry in entries.items()
        }
        return cls(path, map_, tensors, metadata)

    @contextmanager
    def trimmed(self) -> Iterator[None]:
        """While this is open, mapped pages are handed back as they are read, so that a reader which makes its own
        copy of every tensor does not hold the file twice. They come back from the page cache when touched."""
        stop = threading.Event()

        def trim() -> None:
            while not stop.wait(_TRIM_SECONDS):
                self._map.madvise(mmap.MADV_DONTNEED)

        thread = threading.Thread(target=trim, name="farrier-trim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self.tensors = {}
        with suppress(BufferError):  # somebody still holds a view: the map goes with the last of them
            self._map.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `begin:end` of the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numpy(self) -> Any:
        return NUMPY_TYPES[self.dtype]


def read_header(path: Path, file: BinaryIO) -> tuple[dict[str, Entry], dict[str, str], int]:
    """Entries, metadata and the data section's offset. Raises CheckpointError on anything that does not add up."""

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path} is not a whole safetensors file ({what}); fetch it again.")

    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise bad("its header is cut off")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", None) or {}
        entries = {str(name): _entry(value) for name, value in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise bad(f"its header is damaged: {error}") from error
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise bad(f"tensor {name} does not begin where the previous one ends")
        end = entry.end
    if 8 + length + end != size:
        raise bad(f"{size} bytes, but its header speaks of {8 + length + end}")
    return entries, metadata, 8 + length


def _entry(value: dict[str, Any]) -> Entry:
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in NUMPY_TYPES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("a shape or offset is not a natural number")
    if end - begin != nbytes(dtype, shape):
        raise ValueError(f"{end - begin} bytes for shape {list(shape)} of {dtype}")
    return Entry(dtype, shape, begin, end)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count * int(np.dtype(NUMPY_TYPES[dtype]).itemsize)


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in the order in which they were announced.

    `layout` maps names to (dtype, shape); `write` must then be called once per name, in that order. The file is
    complete, and synced, only when the `with` block ends without an error.
    """

    def __init__(
        self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._layout = dict(layout)
        self._pending = iter(layout)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, (dtype, shape) in layout.items():
            size = nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        padding = -(8 + len(encoded)) % _ALIGNMENT
        self._file = path.open("xb")
        self._file.write((len(encoded) + padding).to_bytes(8, "little") + encoded + b" " * padding)

    def write(self, name: str, chunks: Iterator[npt.NDArray[Any]] | npt.NDArray[Any]) -> None:
        """One tensor's elements, whole or in consecutive pieces."""
        expected = next(self._pending, None)
        if name != expected:
            raise ValueError(f"{name} written where {expected} was announced")
        dtype, shape = self._layout[name]
        written = 0
        for chunk in [chunks] if isinstance(chunks, np.ndarray) else chunks:
            if chunk.dtype != NUMPY_TYPES[dtype]:
                raise ValueError(f"{name} is {chunk.dtype}, announced as {dtype}")
            written += self._file.write(np.ascontiguousarray(chunk).data.cast("B") if chunk.size else b"")
        if written != nbytes(dtype, shape):
            raise ValueError(f"{written} bytes written for {name} {list(shape)} of {dtype}")

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                missing = next(self._pending, None)
                if missing is not None:
                    raise ValueError(f"{missing} was announced but never written")
                self._file.flush()
                os.fsync(self._file.fileno())
