"""What a step reads beside weights and KV: int32 arrays, packed for one copy to fixed addresses on the device."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from farrier.plugins.tiles import attention_tiles
from farrier.targets.cuda.device import Array
from farrier.targets.engine import Batch, Ceilings, Int32

_ALIGNED = 32
"""Elements an array's start is rounded to: 128 bytes."""


@dataclass(frozen=True)
class InputLayout:
    """Where each array starts, in elements; the last one's length decides how much of a step is copied."""

    capacities: Mapping[str, int]

    @property
    def offsets(self) -> dict[str, int]:
        offsets, position = {}, 0
        for name, capacity in self.capacities.items():
            offsets[name] = position
            position += -(-capacity // _ALIGNED) * _ALIGNED
        return offsets

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        return 4 * sum(-(-capacity // _ALIGNED) * _ALIGNED for capacity in self.capacities.values())

    def arrays(self, address: int) -> dict[str, Array]:
        """The arrays when they lie at `address`."""
        return {
            name: Array(address + 4 * offset, "i32", (self.capacities[name],)) for name, offset in self.offsets.items()
        }


def decode_layout(ceilings: Ceilings, block_size: int, rows: int) -> InputLayout:
    """For up to `rows` sequences, padding included."""
    return InputLayout(
        {
            "token_ids": rows,
            "positions": rows,
            "context_lens": rows,
            "block_starts": rows + 1,
            "sample_rows": rows,
            "block_ids": _most_blocks(ceilings, block_size),
        }
    )


def mixed_layout(ceilings: Ceilings, block_size: int, tile_rows: int) -> InputLayout:
    rows, tokens = ceilings.max_batch_size, ceilings.max_num_tokens
    return InputLayout(
        {
            "token_ids": tokens,
            "positions": tokens,
            "slots": tokens,
            "query_starts": rows + 1,
            "context_lens": rows,
            "block_starts": rows + 1,
            "sample_rows": rows,
            "tiles": 2 * (tokens // tile_rows + rows),
            "block_ids": _most_blocks(ceilings, block_size),
        }
    )


def _most_blocks(ceilings: Ceilings, block_size: int) -> int:
    return ceilings.max_batch_size * -(-ceilings.max_seq_len // block_size)


def fill_decode(place: Mapping[str, Int32], batch: Batch, rows: int) -> int:
    """Writes a decode batch, padded to `rows` sequences that do nothing. Returns how many block ids there are."""
    count = batch.num_sequences
    for name, values, padding in (
        ("token_ids", batch.token_ids, 0),
        ("positions", batch.positions, 0),
        ("context_lens", batch.context_lens, -1),
        ("sample_rows", batch.sample_rows, 0),
    ):
        place[name][:count] = values
        place[name][count:rows] = padding
    place["block_starts"][: count + 1] = batch.block_starts
    place["block_starts"][count + 1 : rows + 1] = batch.block_starts[-1]
    place["block_ids"][: len(batch.block_ids)] = batch.block_ids
    return len(batch.block_ids)


def fill_mixed(place: Mapping[str, Int32], batch: Batch, block_size: int, tile_rows: int) -> tuple[int, int]:
    """Writes any batch. Returns how many block ids and attention tiles there are."""
    for name in ("token_ids", "positions", "query_starts", "context_lens", "block_starts", "sample_rows", "block_ids"):
        values = getattr(batch, name)
        place[name][: len(values)] = values
    pages = np.repeat(batch.block_starts[:-1], np.diff(batch.query_starts)) + batch.positions // block_size
    place["slots"][: batch.num_tokens] = batch.block_ids[pages] * block_size + batch.positions % block_size
    tiles = attention_tiles(batch.query_starts, tile_rows)
    place["tiles"][: tiles.size] = tiles.reshape(-1)
    return len(batch.block_ids), len(tiles)
