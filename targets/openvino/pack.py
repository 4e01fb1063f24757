"""The engine file of a CPU: fused weights, with experts as `experts.{gate,up,down}`.

int4 is stored as levels from 0 to 15, with zero at 8 or at 8 + `.zero`: with zero points, the plugin multiplies in
integers only if the levels are unsigned, twice as fast and more from batch 8 on.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from farrier.targets.backend import Progress
from farrier.targets.packing import Packed, packed_bytes
from farrier.targets.safetensors_file import SafetensorsWriter
from farrier.targets.tensorfile import Tensor

EXPERT_PARTS = {part: (part,) for part in ("gate", "up", "down")}


def write_engine_file(
    path: Path, items: list[Packed], tensors: Mapping[str, Tensor], progress: Progress | None
) -> None:
    """Writes the engine file, one source tensor at a time."""
    total, done = packed_bytes(items), 0
    with SafetensorsWriter(path, {item.name: (item.dtype, item.shape) for item in items}) as writer:
        for item in items:
            position = 0
            for chunk in item.chunks(tensors):
                if item.dtype == "U8":
                    chunk = chunk ^ np.uint8(0x88)  # two levels in a byte, 8 added to each
                writer.write(item.name, position, np.ascontiguousarray(chunk))
                position += chunk.nbytes
            done += position
            if progress is not None:
                progress(done, total)
