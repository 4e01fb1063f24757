"""The streaming product for few rows, in Gluon: weights are read once, straight into registers, with no barrier on the
way. `gemv.Gemv` describes its variants and arguments.

Each thread reads VECTOR bytes of a weight row at a time. Tensors of a tile have the dimensions rows of x, rows of the
weights, unrolled loads, lanes along K, values (or words) of one load; x and the weights lie in slices of one layout,
so that they meet in registers. All values of a thread are summed in the thread; lanes and warps meet once, at the end.

Formats of a byte or less are multiplied in packed fp16: a vector of x is scaled by a power of two so that its greatest
magnitude lies in [8, 16), at most four products of 8-bit or eight of 4-bit weights are chained in fp16 (below
4·16·448 = 28672), and the sum is scaled back in fp32. So no magnitude of x overflows or vanishes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# In all of these an fp16 pair holds the earlier weight (or value of x) in its lower half.
_PAIR = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
_FP8_PAIRS = gl.constexpr("""{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}""")
# A byte put below 0x64 is the fp16 number 1024 + byte.
_INT8_PAIRS = gl.constexpr("""{
.reg .b32 biased, magic, offset;
mov.b32 magic, 0x64646464;
mov.b32 offset, 0x64806480;
xor.b32 biased, $2, 0x80808080;
prmt.b32 $0, biased, magic, 0x4140;
prmt.b32 $1, biased, magic, 0x4342;
sub.rn.f16x2 $0, $0, offset;
sub.rn.f16x2 $1, $1, offset;
}""")
# A nibble n in the lowest bits of 0x6400 is 1024 + n, in the next four 1024 + 16·n; n is the weight + 8.
_INT4_PAIRS = gl.constexpr("""{
.reg .b32 shifted, magic, offset, sixteenth, high_offset;
mov.b32 magic, 0x64006400;
mov.b32 offset, 0x64086408;
mov.b32 sixteenth, 0x2c002c00;
mov.b32 high_offset, 0xd480d480;
shr.u32 shifted, $4, 8;
lop3.b32 $0, $4, 0x000f000f, magic, 0xea;
lop3.b32 $1, $4, 0x00f000f0, magic, 0xea;
lop3.b32 $2, shifted, 0x000f000f, magic, 0xea;
lop3.b32 $3, shifted, 0x00f000f0, magic, 0xea;
sub.rn.f16x2 $0, $0, offset;
fma.rn.f16x2 $1, $1, sixteenth, high_offset;
sub.rn.f16x2 $2, $2, offset;
fma.rn.f16x2 $3, $3, sixteenth, high_offset;
}""")
# Two words of weights times x; even and odd products are summed apart.
_DOT8 = gl.constexpr("""{
.reg .b32 sum;
.reg .b16 low, high;
mul.rn.f16x2 sum, $2, $6;
fma.rn.f16x2 sum, $4, $8, sum;
fma.rn.f16x2 sum, $3, $7, sum;
fma.rn.f16x2 sum, $5, $9, sum;
mov.b32 {low, high}, sum;
cvt.f32.f16 $0, low;
cvt.f32.f16 $1, high;
}""")
_DOT4 = gl.constexpr("""{
.reg .b32 sum;
.reg .b16 low, high;
mul.rn.f16x2 sum, $2, $10;
fma.rn.f16x2 sum, $4, $12, sum;
fma.rn.f16x2 sum, $6, $14, sum;
fma.rn.f16x2 sum, $8, $16, sum;
fma.rn.f16x2 sum, $3, $11, sum;
fma.rn.f16x2 sum, $5, $13, sum;
fma.rn.f16x2 sum, $7, $15, sum;
fma.rn.f16x2 sum, $9, $17, sum;
mov.b32 {low, high}, sum;
cvt.f32.f16 $0, low;
cvt.f32.f16 $1, high;
}""")


@gluon.jit
def gemv(
    x,
    rows,
    norm_weight,
    weight,
    scale,
    zero,
    bias,
    out,
    ROWS: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    FORMAT: gl.constexpr,
    GROUP: gl.constexpr,
    EPILOGUE: gl.constexpr,
    ACTIVATION: gl.constexpr,
    NORM_EPS: gl.constexpr,
    SOFTCAP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    LANES: gl.constexpr,
    UNROLL: gl.constexpr,
    STEPS: gl.constexpr,
    TAIL: gl.constexpr,
    UNITS: gl.constexpr,
    VALUES: gl.constexpr,
    TILE: gl.constexpr,
    X_TILE: gl.constexpr,
    RESULT: gl.constexpr,
    PDL: gl.constexpr,
):
    """UNITS: elements of `weight` (values, or words of packed formats) that a thread loads at a time, VALUES: weights
    therein. K is STEPS tiles of UNROLL loads and one of TAIL loads, if TAIL is not 0. TILE: layout over UNITS, X_TILE:
    the same over VALUES, RESULT: of [ROWS, BLOCK_N]."""
    GATED: gl.constexpr = EPILOGUE == "gated"
    HALVES: gl.constexpr = 2 if GATED else 1
    SPAN: gl.constexpr = LANES * VALUES * UNROLL
    RAGGED: gl.constexpr = STEPS * SPAN + TAIL * LANES * VALUES != K
    SUMS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, TILE))
    SQUARES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(1, X_TILE)))
    W_ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(0, TILE))))
    X_ROWS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(1, X_TILE))))

    if PDL:
        gdc_launch_dependents()
    first = gl.program_id(0) * BLOCK_N
    # Gate and up rows alternate, so that the two of a column end in one thread.
    places = gl.arange(0, BLOCK_N * HALVES, W_ROWS)
    w_rows = (gl.minimum(first + places // HALVES, N - 1) + places % HALVES * N).to(gl.int64)
    x_rows = gl.arange(0, ROWS, X_ROWS)
    if rows is not None:
        x_rows = gl.maximum(gl.load(rows + x_rows), 0)
    x_rows = x_rows.to(gl.int64)

    HEAD: gl.constexpr = UNROLL if STEPS > 0 else TAIL
    tile, scales, zeros = _weights(
        weight, scale, zero, w_rows, 0, K, GROUP, LANES, HEAD, UNITS, VALUES, TILE, RAGGED and STEPS == 0
    )
    factors = _norm_factors(norm_weight, 0, K, LANES, HEAD, VALUES, X_TILE, RAGGED and STEPS == 0)
    columns = first + gl.arange(0, BLOCK_N, gl.SliceLayout(0, RESULT))
    inside = columns < N
    columns = gl.minimum(columns, N - 1)
    scale_of = gl.to_tensor(1.0)
    up_scale_of = scale_of
    if scale is not None and GROUP is None:
        scale_of = gl.load(scale + columns)[None, :]
        if GATED:
            up_scale_of = gl.load(scale + N + columns)[None, :]
    bias_of = gl.to_tensor(0.0)
    up_bias_of = bias_of
    if bias is not None:
        bias_of = gl.load(bias + columns).to(gl.float32)[None, :]
        if GATED:
            up_bias_of = gl.load(bias + N + columns).to(gl.float32)[None, :]
    out += gl.arange(0, ROWS, gl.SliceLayout(1, RESULT))[:, None] * N + columns[None, :]

    if PDL:
        gdc_wait()
    residual = gl.to_tensor(0.0)
    if EPILOGUE == "add":
        residual = gl.load(out)
    sums = gl.zeros([ROWS, BLOCK_N * HALVES, LANES], gl.float32, SUMS)
    squares = gl.zeros([ROWS, LANES], gl.float32, SQUARES)
    if STEPS > 1:
        for step in range(1, STEPS):
            ahead, ahead_scales, ahead_zeros = _weights(
                weight, scale, zero, w_rows, step * SPAN, K, GROUP, LANES, UNROLL, UNITS, VALUES, TILE, False
            )
            _issue()
            x_tile = _x_tile(x, x_rows, (step - 1) * SPAN, K, LANES, UNROLL, VALUES, X_TILE, False)
            values, squares = _normed(x_tile, factors, squares, NORM_EPS)
            sums += _products(tile, scales, zeros, values, FORMAT, GROUP is not None, zero is not None, TILE, X_TILE)
            tile, scales, zeros = ahead, ahead_scales, ahead_zeros
            factors = _norm_factors(norm_weight, step * SPAN, K, LANES, UNROLL, VALUES, X_TILE, False)
    if STEPS > 0 and TAIL > 0:
        END: gl.constexpr = STEPS * SPAN
        last, last_scales, last_zeros = _weights(
            weight, scale, zero, w_rows, END, K, GROUP, LANES, TAIL, UNITS, VALUES, TILE, RAGGED
        )
        _issue()
        x_tile = _x_tile(x, x_rows, END - SPAN, K, LANES, UNROLL, VALUES, X_TILE, False)
        values, squares = _normed(x_tile, factors, squares, NORM_EPS)
        sums += _products(tile, scales, zeros, values, FORMAT, GROUP is not None, zero is not None, TILE, X_TILE)
        factors = _norm_factors(norm_weight, END, K, LANES, TAIL, VALUES, X_TILE, RAGGED)
        x_tile = _x_tile(x, x_rows, END, K, LANES, TAIL, VALUES, X_TILE, RAGGED)
        values, squares = _normed(x_tile, factors, squares, NORM_EPS)
        sums += _products(
            last, last_scales, last_zeros, values, FORMAT, GROUP is not None, zero is not None, TILE, X_TILE
        )
    else:
        START: gl.constexpr = (STEPS - 1) * SPAN if STEPS > 0 else 0
        x_tile = _x_tile(x, x_rows, START, K, LANES, HEAD, VALUES, X_TILE, RAGGED)
        values, squares = _normed(x_tile, factors, squares, NORM_EPS)
        sums += _products(tile, scales, zeros, values, FORMAT, GROUP is not None, zero is not None, TILE, X_TILE)

    y = gl.sum(sums, 2)
    if NORM_EPS is not None:
        mean = gl.convert_layout(gl.sum(squares, 1), gl.SliceLayout(1, RESULT)) / K
        scale_of = scale_of * gl.rsqrt(mean + NORM_EPS)[:, None]
        up_scale_of = up_scale_of * gl.rsqrt(mean + NORM_EPS)[:, None]
    if GATED:
        gate, up = gl.split(gl.reshape(y, [ROWS, BLOCK_N, 2]))
        gate = gl.convert_layout(gate, RESULT) * scale_of + bias_of
        up = gl.convert_layout(up, RESULT) * up_scale_of + up_bias_of
        if ACTIVATION == "silu":
            y = gate / (1 + gl.exp(-gate)) * up
        else:
            y = gate * (0.5 + 0.5 * _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))) * up
    else:
        y = gl.convert_layout(y, RESULT) * scale_of + bias_of
    if SOFTCAP is not None:
        y = SOFTCAP * _tanh(y / SOFTCAP)
    if EPILOGUE == "add":
        y += residual
    gl.store(out, y.to(out.dtype.element_ty), inside[None, :])


@gluon.jit
def _issue():
    """Keeps loads written above it ahead of those below and of what needs these: to save registers, ptxas would move
    loads down to their use. No thread waits."""
    gl.inline_asm_elementwise("bar.warp.sync 0xffffffff; // $0", "=r", [], gl.int32, False, 1)


@gluon.jit
def _tanh(x):
    return 1 - 2 / (1 + gl.exp(2 * x))


@gluon.jit
def _offsets(LANES: gl.constexpr, LOADS: gl.constexpr, SIZE: gl.constexpr, PARENT: gl.constexpr):
    """Offsets [LOADS, LANES, SIZE] in a row of what the threads load, `SIZE` at a time."""
    loads = gl.arange(0, LOADS, gl.SliceLayout(1, gl.SliceLayout(2, PARENT)))[:, None, None]
    lanes = gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(2, PARENT)))[None, :, None]
    each = gl.arange(0, SIZE, gl.SliceLayout(0, gl.SliceLayout(1, PARENT)))[None, None, :]
    return loads * (LANES * SIZE) + lanes * SIZE + each


@gluon.jit
def _weights(
    weight,
    scale,
    zero,
    rows,
    start,
    K: gl.constexpr,
    GROUP: gl.constexpr,
    LANES: gl.constexpr,
    LOADS: gl.constexpr,
    UNITS: gl.constexpr,
    VALUES: gl.constexpr,
    TILE: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Weights [rows, LOADS, LANES, UNITS] from column `start` on; scales and zeros of groups [rows, LOADS, LANES]."""
    SLICE: gl.constexpr = gl.SliceLayout(0, TILE)
    WIDTH: gl.constexpr = K // (VALUES // UNITS)
    offsets = _offsets(LANES, LOADS, UNITS, gl.SliceLayout(0, SLICE)) + start // (VALUES // UNITS)
    pointers = weight + ((rows * WIDTH)[:, None, None, None] + offsets[None, :, :, :])
    if MASKED:
        tile = gl.load(pointers, (offsets < WIDTH)[None, :, :, :], other=0, eviction_policy="evict_first")
    else:
        tile = gl.load(pointers, eviction_policy="evict_first")
    scales = gl.to_tensor(1.0)
    zeros = gl.to_tensor(0.0)
    if GROUP is not None:
        LOAD: gl.constexpr = gl.SliceLayout(3, SLICE)
        loads = gl.arange(0, LOADS, gl.SliceLayout(0, gl.SliceLayout(2, LOAD)))[None, :, None]
        lanes = gl.arange(0, LANES, gl.SliceLayout(0, gl.SliceLayout(1, LOAD)))[None, None, :]
        groups = (start + (loads * LANES + lanes) * VALUES) // GROUP
        groups = gl.minimum(groups, K // GROUP - 1) + (rows * (K // GROUP))[:, None, None]
        PRODUCTS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(4, TILE))
        scales = gl.convert_layout(gl.load(scale + groups), PRODUCTS, assert_trivial=True)
        if zero is not None:
            zeros = gl.convert_layout(gl.load(zero + groups), PRODUCTS, assert_trivial=True)
    return tile, scales, zeros


@gluon.jit
def _x_tile(
    x,
    rows,
    start,
    K: gl.constexpr,
    LANES: gl.constexpr,
    LOADS: gl.constexpr,
    VALUES: gl.constexpr,
    X_TILE: gl.constexpr,
    MASKED: gl.constexpr,
):
    """x [rows, LOADS, LANES, VALUES] from column `start` on."""
    offsets = start + _offsets(LANES, LOADS, VALUES, gl.SliceLayout(0, gl.SliceLayout(1, X_TILE)))
    pointers = x + ((rows * K)[:, None, None, None] + offsets[None, :, :, :])
    return gl.load(pointers, (offsets < K)[None, :, :, :], other=0) if MASKED else gl.load(pointers)


@gluon.jit
def _norm_factors(
    norm_weight,
    start,
    K: gl.constexpr,
    LANES: gl.constexpr,
    LOADS: gl.constexpr,
    VALUES: gl.constexpr,
    X_TILE: gl.constexpr,
    MASKED: gl.constexpr,
):
    """The norm's weight [LOADS, LANES, VALUES] from column `start` on; 1 without a norm."""
    factors = gl.to_tensor(1.0)
    if norm_weight is not None:
        offsets = start + _offsets(LANES, LOADS, VALUES, gl.SliceLayout(0, gl.SliceLayout(1, X_TILE)))
        pointers = norm_weight + offsets
        factors = gl.load(pointers, offsets < K, other=0) if MASKED else gl.load(pointers)
    return factors


@gluon.jit
def _normed(values, factors, squares, NORM_EPS: gl.constexpr):
    """x times the norm's weight, in fp32; its squares added to `squares`."""
    values = values.to(gl.float32)
    if NORM_EPS is not None:
        squares += gl.sum(gl.sum(values * values, 3), 1)
        values *= factors[None, :, :, :]
    return values, squares


@gluon.jit
def _products(
    tile,
    scales,
    zeros,
    values,
    FORMAT: gl.constexpr,
    GROUPED: gl.constexpr,
    ZEROS: gl.constexpr,
    TILE: gl.constexpr,
    X_TILE: gl.constexpr,
):
    """What each thread's weights and x sum up to, [rows of x, rows of weights, LANES]."""
    if FORMAT == "fp16":
        sums = gl.sum(tile.to(gl.float32)[None, :, :, :, :] * values[:, None, :, :, :], 4)
    elif FORMAT == "bf16":
        # Two weights of a word become fp32 in an instruction each; Triton's own conversion takes three for the two.
        pairs = gl.join((tile << 16).to(gl.float32, bitcast=True), (tile & -65536).to(gl.float32, bitcast=True))
        weights = gl.reshape(pairs, [tile.shape[0], tile.shape[1], tile.shape[2], values.shape[3]])
        weights = gl.convert_layout(weights, gl.SliceLayout(0, X_TILE), assert_trivial=True)
        sums = gl.sum(weights[None, :, :, :, :] * values[:, None, :, :, :], 4)
        sums = gl.convert_layout(sums, gl.SliceLayout(4, TILE), assert_trivial=True)
    else:
        LOADS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(4, TILE))
        exponents = gl.max(gl.abs(values), 3).to(gl.int32, bitcast=True) & 0x7F800000
        exponents = gl.minimum(gl.maximum(exponents, 0x02000000), 0x7F000000)
        scaled = values * (0x7F000000 - exponents + 0x01800000).to(gl.float32, bitcast=True)[:, :, :, None]
        back = gl.convert_layout((exponents - 0x01800000).to(gl.float32, bitcast=True), LOADS, assert_trivial=True)
        sums = gl.sum(_packed_products(tile, scaled, FORMAT, TILE), 4) * back[:, None, :, :]
    if ZEROS:
        totals = gl.convert_layout(gl.sum(values, 3), LOADS, assert_trivial=True)
        sums -= totals[:, None, :, :] * zeros.to(gl.float32)[None, :, :, :]
    if GROUPED:
        sums *= scales.to(gl.float32)[None, :, :, :]
    return gl.sum(sums, 2)


@gluon.jit
def _packed_products(tile, values, FORMAT: gl.constexpr, TILE: gl.constexpr):
    """Sums over two words of weights times x: even products [..., 0], odd ones [..., 1]."""
    WORDS: gl.constexpr = gl.SliceLayout(1, TILE)
    if FORMAT == "int4":
        x0, x1, x2, x3 = _x_pairs4(values, tile.shape[3], WORDS)
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            _INT4_PAIRS, "=&r,=&r,=&r,=&r,r", [tile], (gl.int32, gl.int32, gl.int32, gl.int32), True, 1
        )
        products = gl.inline_asm_elementwise(
            _DOT4,
            "=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [
                w0[None, :, :, :, :],
                w1[None, :, :, :, :],
                w2[None, :, :, :, :],
                w3[None, :, :, :, :],
                x0[:, None, :, :, :],
                x1[:, None, :, :, :],
                x2[:, None, :, :, :],
                x3[:, None, :, :, :],
            ],
            gl.float32,
            True,
            2,
        )
    else:
        x0, x1 = _x_pairs2(values, tile.shape[3], WORDS)
        w0, w1 = gl.inline_asm_elementwise(
            _FP8_PAIRS if FORMAT == "fp8" else _INT8_PAIRS, "=&r,=&r,r", [tile], (gl.int32, gl.int32), True, 1
        )
        products = gl.inline_asm_elementwise(
            _DOT8,
            "=f,=f,r,r,r,r,r,r,r,r",
            [w0[None, :, :, :, :], w1[None, :, :, :, :], x0[:, None, :, :, :], x1[:, None, :, :, :]],
            gl.float32,
            True,
            2,
        )
    return products


@gluon.jit
def _x_pairs2(values, WORDS_PER_LOAD: gl.constexpr, WORDS: gl.constexpr):
    """x as fp16 pairs: the first and the second pair of each word of four weights."""
    M: gl.constexpr = values.shape[0]
    U: gl.constexpr = values.shape[1]
    L: gl.constexpr = values.shape[2]
    even, odd = gl.split(gl.reshape(values, [M, U, L, WORDS_PER_LOAD, 2, 2]))
    first, second = gl.split(gl.inline_asm_elementwise(_PAIR, "=r,f,f", [even, odd], gl.int32, True, 1))
    return gl.convert_layout(first, WORDS, assert_trivial=True), gl.convert_layout(second, WORDS, assert_trivial=True)


@gluon.jit
def _x_pairs4(values, WORDS_PER_LOAD: gl.constexpr, WORDS: gl.constexpr):
    """x as fp16 pairs: the four pairs of each word of eight weights."""
    M: gl.constexpr = values.shape[0]
    U: gl.constexpr = values.shape[1]
    L: gl.constexpr = values.shape[2]
    even, odd = gl.split(gl.reshape(values, [M, U, L, WORDS_PER_LOAD, 2, 2, 2]))
    x02, x13 = gl.split(gl.inline_asm_elementwise(_PAIR, "=r,f,f", [even, odd], gl.int32, True, 1))
    x0, x2 = gl.split(x02)
    x1, x3 = gl.split(x13)
    return (
        gl.convert_layout(x0, WORDS, assert_trivial=True),
        gl.convert_layout(x1, WORDS, assert_trivial=True),
        gl.convert_layout(x2, WORDS, assert_trivial=True),
        gl.convert_layout(x3, WORDS, assert_trivial=True),
    )
