"""Tiles worth timing for a matrix product. Which is best only the device tells; the first is good everywhere."""

from dataclasses import replace

from farrier.plugins.weight_form import FP8_CAPABILITY, GemmTile, WeightForm

_SHARED_BYTES = {80: 99 << 10, 87: 99 << 10, 90: 227 << 10}
"""On 8.x what every GPU of that generation has, not the 163 KiB of these two."""
_EPILOGUE_BYTES = 1 << 10
_FEW_ROWS = 64
_SUMS = 128
"""Registers of a thread for sums: half of what it has. With more it spills."""

# Rows up to which they serve, then block_m, block_n, block_k (of 16-bit activations), warps, stages, group_m.
_HOPPER = {
    16: (
        (16, 64, 128, 4, 6, 1),
        (16, 64, 128, 4, 4, 1),
        (16, 64, 256, 4, 4, 1),
        (16, 64, 64, 4, 8, 1),
        (16, 128, 128, 4, 4, 1),
        (16, 128, 64, 4, 6, 1),
        (16, 128, 128, 8, 4, 1),
        (16, 32, 128, 4, 6, 1),
        (16, 32, 256, 4, 4, 1),
    ),
    32: (
        (32, 64, 128, 4, 5, 1),
        (32, 64, 128, 4, 4, 1),
        (32, 64, 64, 4, 8, 1),
        (32, 128, 128, 4, 4, 1),
        (32, 128, 64, 4, 6, 1),
        (32, 32, 128, 4, 6, 1),
        (16, 64, 128, 4, 5, 2),
    ),
    64: (
        (64, 64, 128, 4, 5, 1),
        (64, 64, 128, 4, 4, 1),
        (64, 64, 64, 4, 8, 1),
        (64, 128, 128, 4, 4, 1),
        (64, 128, 64, 4, 6, 1),
        (64, 128, 128, 8, 4, 1),
        (64, 32, 128, 4, 5, 1),
        (32, 64, 128, 4, 5, 2),
    ),
    128: (
        (128, 64, 64, 4, 6, 1),
        (128, 64, 128, 4, 4, 1),
        (128, 128, 64, 4, 6, 1),
        (128, 128, 64, 8, 6, 1),
        (128, 128, 128, 8, 3, 1),
        (64, 64, 128, 4, 5, 2),
        (64, 128, 64, 4, 6, 2),
    ),
    256: (
        (128, 128, 64, 4, 6, 2),
        (128, 128, 64, 8, 6, 2),
        (128, 128, 64, 4, 4, 2),
        (256, 128, 64, 8, 4, 1),
        (256, 64, 64, 4, 4, 1),
        (256, 64, 64, 8, 5, 1),
        (128, 256, 64, 8, 4, 2),
        (128, 64, 64, 4, 6, 2),
        (128, 128, 128, 8, 3, 2),
        (64, 128, 64, 4, 6, 4),
    ),
    1 << 30: (
        (256, 128, 64, 8, 4, 8),
        (128, 128, 64, 8, 4, 8),
        (256, 128, 64, 8, 3, 8),
        (256, 128, 64, 8, 4, 4),
        (256, 128, 64, 8, 4, 16),
        (128, 256, 64, 8, 4, 8),
        (128, 256, 64, 8, 4, 16),
        (128, 128, 64, 4, 4, 8),
        (128, 128, 64, 4, 6, 8),
        (128, 128, 128, 8, 3, 8),
    ),
}
_AMPERE = {
    16: (
        (16, 64, 128, 4, 4, 1),
        (16, 64, 64, 4, 6, 1),
        (16, 64, 128, 4, 3, 1),
        (16, 32, 128, 4, 4, 1),
        (16, 32, 256, 4, 3, 1),
        (16, 128, 64, 4, 4, 1),
        (16, 128, 128, 4, 3, 1),
    ),
    32: (
        (32, 64, 128, 4, 4, 1),
        (32, 64, 64, 4, 5, 1),
        (32, 32, 128, 4, 4, 1),
        (32, 128, 64, 4, 4, 1),
        (16, 64, 128, 4, 4, 2),
    ),
    64: (
        (64, 64, 64, 4, 4, 1),
        (64, 64, 64, 4, 3, 1),
        (64, 64, 128, 4, 3, 1),
        (64, 32, 128, 4, 3, 1),
        (64, 128, 64, 4, 3, 1),
        (64, 128, 32, 4, 4, 1),
        (32, 64, 128, 4, 3, 2),
    ),
    256: (
        (128, 64, 64, 4, 3, 2),
        (128, 64, 32, 4, 4, 2),
        (128, 128, 32, 8, 4, 2),
        (128, 128, 32, 4, 4, 2),
        (128, 128, 64, 8, 3, 2),
        (64, 128, 64, 4, 3, 4),
        (64, 64, 64, 4, 4, 4),
    ),
    1 << 30: (
        (128, 128, 32, 8, 4, 8),
        (128, 128, 32, 4, 4, 8),
        (128, 128, 64, 8, 3, 8),
        (128, 256, 32, 8, 3, 8),
        (256, 128, 32, 8, 3, 8),
        (128, 64, 32, 4, 4, 8),
        (64, 256, 32, 8, 4, 8),
    ),
}


def gemm_tiles(form: WeightForm, gated: bool, rows: int, capability: int) -> tuple[GemmTile, ...]:
    """For products of up to `rows` rows at once on compute capability 80, 87 or 90; the first is the default.

    Raises ValueError for fp8 where the hardware has none.
    """
    if form.format == "fp8" and capability < FP8_CAPABILITY:
        raise ValueError(f"sm_{capability} has no fp8: convert to int8 or int4 instead.")
    table = _HOPPER if capability >= 90 else _AMPERE
    rows_bound = min(bound for bound in table if bound >= rows)
    tiles = [_suited(GemmTile(*tile), form, gated, capability) for tile in table[rows_bound]]
    if gated and rows <= _FEW_ROWS and capability >= 90:
        # A stage is nearly twice as large as without gates: with half as many of them, two programs share a processor
        # and the last ones of a matrix leave fewer idle.
        tiles = [replace(tile, stages=tile.stages // 2) for tile in tiles if tile.stages >= 6] + tiles
        tiles.sort(key=lambda tile: 2 * _shared_bytes(tile, form, gated) > _SHARED_BYTES[capability])
    return tuple(dict.fromkeys(tile for tile in tiles if _fits(tile, form, gated, capability)))


def _suited(tile: GemmTile, form: WeightForm, gated: bool, capability: int) -> GemmTile:
    # Rows of shared memory of 128 bytes and more. A gated tile has twice the rows of W; Hopper multiplies no less
    # than 64 of them at a time.
    block_k = tile.block_k * 2 if form.x_type == "fp8e4nv" else tile.block_k
    smallest = 64 if capability >= 90 else 32
    return replace(tile, block_k=block_k, block_n=max(tile.block_n // 2, smallest) if gated else tile.block_n)


def _fits(tile: GemmTile, form: WeightForm, gated: bool, capability: int) -> bool:
    sums = tile.block_m * tile.block_n * (2 if gated else 1) // (32 * tile.warps)
    most = _SUMS // 2 if gated and form.format == "int4" and capability < 90 else _SUMS
    return sums <= most and _shared_bytes(tile, form, gated) <= _SHARED_BYTES[capability]


def _shared_bytes(tile: GemmTile, form: WeightForm, gated: bool) -> int:
    return form.shared_bytes(tile, 2 if gated else 1) + _EPILOGUE_BYTES
