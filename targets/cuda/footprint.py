"""How much device memory an engine takes, before any of it is taken."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from farrier.targets.cuda.plan import TYPE_BYTES, Plan, Size
from farrier.targets.errors import InsufficientResourcesError

WORKSPACE_BYTES = 32 << 20
"""What cuBLASLt's own heuristics want on Hopper."""
RESERVE_BYTES = 256 << 20
"""Left free beside the KV pool: the driver's own needs grow with graphs and modules."""
ALIGNMENT = 256
"""Of each weight."""


@dataclass(frozen=True)
class Footprint:
    """Bytes. `buffers`: what steps read and write beside weights and KV cache, cuBLASLt's workspace included."""

    weights: int
    buffers: int
    kv_block: int

    def check_load(self, free: int) -> None:
        """Raises InsufficientResourcesError when weights, buffers and one KV block would not fit into `free` bytes."""
        needed = self.weights + self.buffers + self.kv_block + RESERVE_BYTES
        if needed > free:
            raise InsufficientResourcesError(
                f"The engine needs {needed} bytes of GPU memory (weights {self.weights}, buffers {self.buffers}, "
                f"one KV block {self.kv_block}, the driver {RESERVE_BYTES}), {free} are free; free some, or build "
                "it with a smaller --precision, --max-num-tokens or --max-batch-size."
            )

    def max_blocks(self, free: int) -> int:
        """How many KV blocks fit beside the rest, once the weights are loaded and `free` bytes are left."""
        return max(0, free - self.buffers - RESERVE_BYTES) // self.kv_block

    def check_pool(self, num_blocks: int, free: int) -> None:
        """Raises InsufficientResourcesError when so many KV blocks and the buffers would not fit into `free` bytes."""
        pool = num_blocks * self.kv_block
        if pool + self.buffers > free:
            raise InsufficientResourcesError(
                f"A KV pool of {num_blocks} blocks needs {pool} bytes of GPU memory, and the engine's buffers "
                f"{self.buffers}; {free} are free, enough for {self.max_blocks(free)} blocks; ask for so many or fewer."
            )


def buffer_bytes(plan: Plan, rows: Mapping[Size, int]) -> int:
    """Of all buffers of a plan; `rows`: the most each size can be."""
    return sum(
        (buffer.rows if isinstance(buffer.rows, int) else rows[buffer.rows]) * buffer.columns * TYPE_BYTES[buffer.type]
        for buffer in plan.buffers
    )


def weight_bytes(sizes: Iterable[int]) -> int:
    """Of tensors of these sizes, one after the other on the device."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
