"""What the matrix products share: weight tiles brought to the activations' type, the loop over K, what follows it.

Everything is computed as its transpose: the rows of W are the rows of the tensor cores' first operand, which may come
from registers (a converted weight is used where it was converted), and x rows are the columns, of which 16 do.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# An integer under the mantissa of 2^23: float32 without a conversion instruction, which runs at a quarter of the rate.
_BIASED_8 = tl.constexpr(0x4B000080)
_BIAS_8 = tl.constexpr(8388608.0 + 128)
_BIASED_4 = tl.constexpr(0x4B000000)
_BIAS_4 = tl.constexpr(8388608.0 + 8)


@triton.jit
def after_earlier_kernels(PDL: tl.constexpr):
    """Lets the next kernel start, and waits for what the ones before have written."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def tile_of(program, tiles_m, TILES_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Where a program's tile lies: one after the other go through GROUP_M tiles of rows of x with each tile of W."""
    group_first = program // (GROUP_M * TILES_N) * GROUP_M
    group_size = tl.minimum(tiles_m - group_first, GROUP_M)
    within = program % (GROUP_M * TILES_N)
    return group_first + within % group_size, within // group_size


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")  # by tanh; (1 + tanh u) / 2 = sigmoid(2u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def _grouped(values, groups, GROUPS: tl.constexpr, SUBTRACT: tl.constexpr):
    """values [N, C] combined with groups [N, GROUPS] of C / GROUPS neighbours each."""
    rows: tl.constexpr = values.shape[0]
    columns: tl.constexpr = values.shape[1]
    split = tl.reshape(values, (rows, GROUPS, columns // GROUPS))
    split = split - groups[:, :, None] if SUBTRACT else split * groups[:, :, None]
    return tl.reshape(split, (rows, columns))


@triton.jit
def weight_tile(
    weight,
    scale,
    zero,
    first,
    rows,
    k,
    TYPE: tl.constexpr,
    WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """W[first + rows, k : k + BLOCK_K] as TYPE, [BLOCK_N, BLOCK_K]; past K it is zero. A scale per row is left out."""
    PACKED: tl.constexpr = 2 if WEIGHT == "int4" else 1
    WIDTH: tl.constexpr = BLOCK_K // PACKED
    PITCH: tl.constexpr = K // PACKED
    if TMA:
        raw = weight.load([first, k // PACKED])
    else:
        column = k // PACKED + tl.arange(0, WIDTH)[None, :]
        place = weight + first.to(tl.int64) * PITCH + (rows[:, None] * PITCH + column)
        raw = tl.load(place) if K % BLOCK_K == 0 else tl.load(place, mask=column < PITCH, other=0.0)
    if WEIGHT == "int8":
        value = (raw.to(tl.uint8, bitcast=True).to(tl.uint32) ^ _BIASED_8).to(tl.float32, bitcast=True) - _BIAS_8
    elif WEIGHT == "int4":
        bits = raw.to(tl.uint32)
        low = ((bits & 15) ^ _BIASED_4).to(tl.float32, bitcast=True) - _BIAS_4
        high = ((bits >> 4) ^ _BIASED_4).to(tl.float32, bitcast=True) - _BIAS_4
        # A word's bytes hold 0 2, 4 6, 1 3 and 5 7.
        value = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K // 8, 2, 4))
        value = tl.reshape(tl.permute(value, 0, 1, 3, 2), (BLOCK_N, BLOCK_K))
    else:
        value = raw
    if GROUP > 0:
        GROUPS: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
        group = k // GROUP + tl.arange(0, GROUPS)[None, :]
        place = first.to(tl.int64) * (K // GROUP) + (rows[:, None] * (K // GROUP) + group)
        inside = group < K // GROUP
        if zero is not None:
            value = _grouped(value, tl.load(zero + place, mask=inside, other=0).to(tl.float32), GROUPS, True)
        scales = tl.load(scale + place, mask=inside, other=0.0).to(tl.float32)
        value = _grouped(value.to(tl.float32), scales, GROUPS, False)
    return value.to(TYPE)


@triton.jit
def product(
    x,
    x_first,
    x_rows,
    weight,
    scale,
    zero,
    first,
    rows,
    UP: tl.constexpr,
    TYPE: tl.constexpr,
    WEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    X_TMA: tl.constexpr,
    TMA: tl.constexpr,
):
    """W[first + rows] · x[x_rows]^T and, where UP > 0, the same with W[first + UP + rows]: float32
    [BLOCK_N, BLOCK_M] each. K is walked in order, so that a row's sum depends on nothing but that row and the tile.

    With TMA `rows`, and with X_TMA `x_rows`, are not looked at: the descriptors' blocks start at `first` and `x_first`.
    """
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        if X_TMA:
            tokens = x.load([x_first, k])
        else:
            column = k + tl.arange(0, BLOCK_K)[None, :]
            place = x + x_rows.to(tl.int64)[:, None] * K + column
            tokens = tl.load(place) if K % BLOCK_K == 0 else tl.load(place, mask=column < K, other=0.0)
        tokens = tl.trans(tokens)
        if WEIGHT == "fp32":
            tokens = tokens.to(tl.float32)
        tile = weight_tile(weight, scale, zero, first, rows, k, TYPE, WEIGHT, GROUP, K, BLOCK_N, BLOCK_K, TMA)
        sums = tl.dot(tile, tokens, sums, input_precision="ieee")
        if UP > 0:
            tile = weight_tile(weight, scale, zero, first + UP, rows, k, TYPE, WEIGHT, GROUP, K, BLOCK_N, BLOCK_K, TMA)
            up = tl.dot(tile, tokens, up, input_precision="ieee")
    return sums, up


@triton.jit
def scaled(sums, x_scales, scale, bias, first, rows, ROW_SCALE: tl.constexpr):
    """sums [BLOCK_N, BLOCK_M] times the rows' scales, x_scales [BLOCK_M] (or None), plus the rows' bias."""
    if ROW_SCALE:
        sums *= tl.load(scale + first + rows)[:, None]
    if x_scales is not None:
        sums *= x_scales[None, :]
    if bias is not None:
        sums += tl.load(bias + first + rows).to(tl.float32)[:, None]
    return sums
