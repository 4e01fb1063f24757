"""A memory-mapped safetensors file as numpy views: how checkpoints and engines are read back."""

import mmap
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farrier.targets.bfloat16 import from_bfloat16
from farrier.targets.errors import CheckpointError
from farrier.targets.safetensors_file import read_header

# bf16 and fp8 have no numpy types: they are seen as their bits.
NUMPY_TYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I8": np.int8,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
}
_TRIM_SECONDS = 0.02


def to_float32(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """The numbers, exact, of stored F32, BF16 or F16."""
    return from_bfloat16(values) if dtype == "BF16" else values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class Tensor:
    """A stored tensor: safetensors dtype name, and its elements (bf16 and fp8 as bits, in uint16 and uint8)."""

    dtype: str
    array: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


class TensorFile:
    """A mapped file. The arrays are views of the map: nobody may use them after `close`."""

    def __init__(self, map_: mmap.mmap, tensors: dict[str, Tensor]) -> None:
        self.tensors: Mapping[str, Tensor] = tensors
        self._map = map_

    @classmethod
    def open(cls, path: Path) -> "TensorFile":
        """Raises CheckpointError when the file is missing, truncated, corrupt or of unexpected types."""
        entries = read_header(path)
        for name, entry in entries.items():
            if entry.dtype not in NUMPY_TYPES:
                raise CheckpointError(f"{path} holds '{name}' as {entry.dtype}, which farrier does not write")
        try:
            with path.open("rb") as file:
                map_ = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot map {path}: {error}") from error
        data = np.frombuffer(map_, np.uint8)
        tensors = {
            name: Tensor(e.dtype, data[e.start : e.stop].view(NUMPY_TYPES[e.dtype]).reshape(e.shape))
            for name, e in entries.items()
        }
        return cls(map_, tensors)

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
