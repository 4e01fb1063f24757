"""Weights from the mapped engine file to the device, through pinned memory, in overlapped chunks."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver
from cuda.core import Device, Stream

from farrier.targets.cuda.device import Array, DeviceMemory, PinnedMemory, check
from farrier.targets.cuda.footprint import ALIGNMENT
from farrier.targets.tensorfile import Tensor

_CHUNK_BYTES = 32 << 20
_WORKERS = 4
"""One core copies slower than PCI Express transfers."""
TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "I8": "i8", "U8": "u8", "F8_E4M3": "fp8e4nv"}


@dataclass(frozen=True)
class _Chunk:
    source: npt.NDArray[np.uint8]
    address: int


def upload(tensors: Mapping[str, Tensor], memory: DeviceMemory, device: Device) -> dict[str, Array]:
    """Copies every tensor to the device, into one allocation. Returns when all of it is there."""
    offsets, total = {}, 0
    for name, tensor in tensors.items():
        offsets[name] = total
        total += -(-tensor.array.nbytes // ALIGNMENT) * ALIGNMENT
    base = memory.allocate(total)
    arrays = {name: Array(base + offsets[name], TYPES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    chunks = list(_chunks(tensors, arrays))
    workers = [_Worker(device) for _ in range(min(_WORKERS, len(chunks)))]
    try:
        with ThreadPoolExecutor(len(workers)) as pool:
            for done in [
                pool.submit(worker.copy, chunks[index :: len(workers)]) for index, worker in enumerate(workers)
            ]:
                done.result()
    finally:
        for worker in workers:
            worker.close()
    return arrays


def _chunks(tensors: Mapping[str, Tensor], arrays: Mapping[str, Array]) -> Iterator[_Chunk]:
    for name, tensor in tensors.items():
        raw = tensor.array.reshape(-1).view(np.uint8)
        for start in range(0, len(raw), _CHUNK_BYTES):
            yield _Chunk(raw[start : start + _CHUNK_BYTES], arrays[name].address + start)


class _Worker:
    """Two pinned buffers: one is filled while the other is on its way."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream: Stream = device.create_stream()
        self._buffers = [PinnedMemory(_CHUNK_BYTES) for _ in range(2)]
        self._events: list[Any] = [None, None]

    def copy(self, chunks: list[_Chunk]) -> None:
        self._device.set_current()
        for index, chunk in enumerate(chunks):
            turn = index % 2
            if self._events[turn] is not None:
                self._events[turn].sync()
            size = len(chunk.source)
            np.copyto(self._buffers[turn].array[:size], chunk.source)
            check(driver.cuMemcpyHtoDAsync(chunk.address, self._buffers[turn].address, size, self._stream.handle))
            self._events[turn] = self._stream.record()
        self._stream.sync()

    def close(self) -> None:
        for buffer in self._buffers:
            buffer.close()
        self._stream.close()
