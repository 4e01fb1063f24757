"""The engine file of the CPU: weights as OpenVINO reads them from the map.

int4 is stored as levels from 0 to 15, with zero at 8 or at 8 + `.zero`: at batch 1 the plugin's products of unsigned
levels are faster by a fifth.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from farrier.targets.backend import Progress
from farrier.targets.packing import Packed, packed_bytes
from farrier.targets.safetensors_file import SafetensorsWriter
from farrier.targets.tensorfile import Tensor


def write_engine_file(
    path: Path, items: list[Packed], tensors: Mapping[str, Tensor], progress: Progress | None
) -> None:
    """Writes the engine file, one source tensor at a time."""
    total, done = packed_bytes(items), 0
    with SafetensorsWriter(path, {item.name: (item.dtype, item.shape) for item in items}) as writer:
        for item in items:
            position = 0
            for chunk in item.chunks(tensors):
                # Two levels in a byte, 8 added to each.
                stored = chunk ^ np.uint8(0x88) if item.dtype == "U8" else np.ascontiguousarray(chunk)
                writer.write(item.name, position, stored)
                position += stored.nbytes
            done += position
            if progress is not None:
                progress(done, total)
