"""Draws tokens: temperature, top-k, top-p, min-p, inverse CDF. One program for each row.

Thresholds are searched for, not sorted for: each pass over the row counts what is above seven candidates at once.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from farrier.plugins.kernel import KernelSource, PerRows, Variant
from farrier.plugins.sampling import NOTHING_KEY, order_key, padded_vocab, tile_of

_ONE = tl.constexpr(0x3F800000)
"""The bits of 1.0, the largest weight."""
_ANY_ID = tl.constexpr(0x7FFFFFFF)


@dataclass(frozen=True)
class Draw(Variant):
    """Draws the token of each row that is not greedy.

    Arguments: work fp32 `[S, padded_vocab(vocab_size)]` from `Adjust`, overwritten; temperature fp32, top_k i32,
    top_p fp32, min_p fp32, draws fp64, all `[S]`: draws are uniform numbers in [0, 1); sampled i32 `[S]` from
    `Adjust`, replaced where the temperature is above 0 and there is a token at all.
    """

    vocab_size: int
    pdl: bool = False

    def source(self) -> KernelSource:
        tile = tile_of(self.vocab_size)
        return KernelSource(
            _draw,
            {
                "work": "*fp32",
                "temperature": "*fp32",
                "top_k": "*i32",
                "top_p": "*fp32",
                "min_p": "*fp32",
                "draws": "*fp64",
                "sampled": "*i32",
            },
            {"VOCAB": self.vocab_size, "STRIDE": padded_vocab(self.vocab_size), "TILE": tile, "PDL": self.pdl},
            num_warps=tile // 256,
            pdl=self.pdl,
        )

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(),)


@triton.jit
def _draw(
    work,
    temperature,
    top_k,
    top_p,
    min_p,
    draws,
    sampled,
    VOCAB: tl.constexpr,
    STRIDE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0)
    divisor = tl.load(temperature + row)
    count = tl.load(top_k + row)
    share = tl.load(top_p + row).to(tl.float64)
    if PDL:
        gdc_wait()
    likeliest = tl.load(sampled + row)
    if (likeliest >= 0) & (divisor > 0):
        x = work + row.to(tl.int64) * STRIDE
        best = tl.load(x + likeliest)
        bound = NOTHING_KEY + 1
        last = _ANY_ID
        if (count > 0) & (count < VOCAB):
            bound, last = _top(x, count, order_key(best), STRIDE, TILE)
        mass = _weigh(x, best, divisor, bound, last, STRIDE, TILE)
        bound = 1
        last = _ANY_ID
        if share < 1:
            bound, last = _nucleus(x, mass, share, STRIDE, TILE)
        token = _inverse_cdf(x, bound, last, tl.load(min_p + row), tl.load(draws + row), STRIDE, TILE)
        tl.store(sampled + row, token)


@triton.jit
def _columns(start, TILE: tl.constexpr):
    """Ids of a tile `[TILE / 4, 4]`: four neighbours lie in one thread, so that adding them up is free."""
    return start + (tl.arange(0, TILE // 4) * 4)[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _key(x, MASS: tl.constexpr):
    return x.to(tl.int32, bitcast=True) if MASS else order_key(x)


@triton.jit
def _above(x, keys, bound, MASS: tl.constexpr):
    above = keys >= bound
    return tl.sum(tl.where(above, x, 0.0), 1) if MASS else tl.sum(above.to(tl.int32), 1)


@triton.jit
def _candidate(low, high, eighths: tl.constexpr):
    return low + ((high - low) * eighths + 7) // 8


@triton.jit
def _narrow(low, high, at_low, above_high, candidate, lanes, target, MASS: tl.constexpr):
    measure = tl.sum(lanes.to(tl.float64), 0) if MASS else tl.sum(lanes, 0)
    reached = measure >= target
    first_miss = (measure < target) & (candidate <= high)
    return (
        tl.where(reached, candidate, low),
        tl.where(first_miss, candidate - 1, high),
        tl.where(reached, measure, at_low),
        tl.where(first_miss, measure, above_high),
    )


@triton.jit
def _threshold(x, low, high, target, at_low, MASS: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """The largest key from `low` to `high` for which those at or above it reach `target`: a number of them, or a mass
    of weights. `at_low`: no less than what `low` reaches, for masses.

    Returns a threshold that keeps the same tokens, and whether it is known to keep no more of them than it must.
    """
    above_high = at_low * 0
    exact = low > high
    while low < high:
        c1 = _candidate(low, high, 1)
        c2 = _candidate(low, high, 2)
        c3 = _candidate(low, high, 3)
        c4 = _candidate(low, high, 4)
        c5 = _candidate(low, high, 5)
        c6 = _candidate(low, high, 6)
        c7 = _candidate(low, high, 7)
        n1 = tl.zeros([TILE // 4], tl.float32 if MASS else tl.int32)
        n2 = n1
        n3 = n1
        n4 = n1
        n5 = n1
        n6 = n1
        n7 = n1
        for start in range(0, STRIDE, TILE):
            values = tl.load(x + _columns(start, TILE))
            keys = _key(values, MASS)
            n1 += _above(values, keys, c1.to(tl.int32), MASS)
            n2 += _above(values, keys, c2.to(tl.int32), MASS)
            n3 += _above(values, keys, c3.to(tl.int32), MASS)
            n4 += _above(values, keys, c4.to(tl.int32), MASS)
            n5 += _above(values, keys, c5.to(tl.int32), MASS)
            n6 += _above(values, keys, c6.to(tl.int32), MASS)
            n7 += _above(values, keys, c7.to(tl.int32), MASS)
        low, high, at_low, above_high = _narrow(low, high, at_low, above_high, c1, n1, target, MASS)
        low, high, at_low, above_high = _narrow(low, high, at_low, above_high, c2, n2, target, MASS)
        low, high, at_low, above_high = _narrow(low, high, at_low, above_high, c3, n3, target, MASS)
        low, high, at_low, above_high = _narrow(low, high, at_low, above_high, c4, n4, target, MASS)
        low, high, at_low, above_high = _narrow(low, high, at_low, above_high, c5, n5, target, MASS)
        low, high, at_low, above_high = _narrow(low, high, at_low, above_high, c6, n6, target, MASS)
        low, high, at_low, above_high = _narrow(low, high, at_low, above_high, c7, n7, target, MASS)
        if MASS:
            # Less than two of the smallest weights: one token.
            smallest = low.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
            exact = at_low - above_high < 1.5 * smallest
        else:
            exact = at_low == target
        high = tl.where(exact, low, high)
    return low.to(tl.int32), exact


@triton.jit
def _ties(x, key, MASS: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """What is above `key`, as `_threshold` measures it, and how many are equal to it."""
    above = tl.zeros([TILE // 4], tl.float32 if MASS else tl.int32)
    equal = tl.zeros([TILE // 4], tl.int32)
    for start in range(0, STRIDE, TILE):
        values = tl.load(x + _columns(start, TILE))
        keys = _key(values, MASS)
        above += _above(values, keys, key + 1, MASS)
        equal += tl.sum((keys == key).to(tl.int32), 1)
    return tl.sum(above.to(tl.float64) if MASS else above, 0), tl.sum(equal, 0)


@triton.jit
def _nth_equal(x, key, nth, MASS: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """Id of the nth token, counted from 1, whose key is `key`."""
    found = _ANY_ID
    start = 0
    while (start < STRIDE) & (nth > 0):
        columns = start + tl.arange(0, TILE)
        equal = (_key(tl.load(x + columns), MASS) == key).to(tl.int32)
        here = tl.sum(equal, 0)
        if here >= nth:
            found = tl.min(tl.where((equal > 0) & (tl.cumsum(equal, 0) == nth), columns, _ANY_ID), 0)
        nth -= here
        start += TILE
    return found


@triton.jit
def _top(x, count, best, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """Key of the count-th largest logit, and the last id that counts among those equal to it."""
    low = best.to(tl.int64) * 0 + (NOTHING_KEY + 1)
    bound, exact = _threshold(x, low, best.to(tl.int64), count, count * 0, False, STRIDE, TILE)
    last = _ANY_ID
    if not exact:
        above, equal = _ties(x, bound, False, STRIDE, TILE)
        if above + equal > count:
            last = _nth_equal(x, bound, count - above, False, STRIDE, TILE)
    return bound, last


@triton.jit
def _weigh(x, best, divisor, bound, last, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """Replaces logits by weights relative to the likeliest token's, those that are not kept by 0. Returns their sum."""
    lanes = tl.zeros([TILE // 4], tl.float32)
    for start in range(0, STRIDE, TILE):
        columns = _columns(start, TILE)
        values = tl.load(x + columns)
        keys = order_key(values)
        kept = (keys > bound) | ((keys == bound) & (columns <= last))
        exponents = tl.div_rn(values - best, divisor + tl.zeros_like(values))
        weights = tl.where(kept, tl.exp(exponents), 0.0)
        tl.store(x + columns, weights)
        lanes += tl.sum(weights, 1)
    tl.debug_barrier()
    return tl.sum(lanes.to(tl.float64), 0)


@triton.jit
def _nucleus(x, total, share, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """Bits of the smallest weight in the nucleus, and the last id that counts among those equal to it."""
    mass = share * total
    # All weights below this one together are less than what the nucleus may leave out.
    negligible = ((total - mass) * (0.5 / STRIDE)).to(tl.float32)
    low = tl.maximum(negligible.to(tl.int32, bitcast=True), 1).to(tl.int64)
    bound, exact = _threshold(x, low, low * 0 + _ONE, mass, total, True, STRIDE, TILE)
    last = _ANY_ID
    if not exact:
        above, equal = _ties(x, bound, True, STRIDE, TILE)
        need = tl.maximum(tl.ceil((mass - above) / bound.to(tl.float32, bitcast=True).to(tl.float64)), 1.0)
        if need < equal:
            last = _nth_equal(x, bound, need.to(tl.int32), True, STRIDE, TILE)
    return bound, last


@triton.jit
def _kept(weights, columns, bound, last, smallest):
    bits = weights.to(tl.int32, bitcast=True)
    kept = (bits > bound) | ((bits == bound) & (columns <= last))
    return tl.where(kept & (weights >= smallest), weights, 0.0)


@triton.jit
def _tile_mass(x, start, bound, last, smallest, TILE: tl.constexpr):
    columns = _columns(start, TILE)
    weights = _kept(tl.load(x + columns), columns, bound, last, smallest)
    return tl.sum(tl.sum(weights, 1).to(tl.float64), 0)


@triton.jit
def _inverse_cdf(x, bound, last, smallest, draw, STRIDE: tl.constexpr, TILE: tl.constexpr):
    """First id at which the kept weights up to it exceed `draw` of them all."""
    total = draw * 0
    for start in range(0, STRIDE, TILE):
        total += _tile_mass(x, start, bound, last, smallest, TILE)
    target = draw * total
    # Where rounding puts the target at the very end, the last id that adds weight is meant.
    cumulative = draw * 0
    before = draw * 0
    chosen = 0
    start = 0
    while (start < STRIDE) & (cumulative <= target):
        mass = _tile_mass(x, start, bound, last, smallest, TILE)
        if mass > 0:
            chosen = start
            before = cumulative
        cumulative += mass
        start += TILE
    columns = chosen + tl.arange(0, TILE)
    weights = _kept(tl.load(x + columns), columns, bound, last, smallest)
    sums = before + tl.cumsum(weights.to(tl.float64), 0)
    reached = tl.min(tl.where((sums > target) & (weights > 0), columns, _ANY_ID), 0)
    final = tl.max(tl.where(weights > 0, columns, 0), 0)
    return tl.minimum(reached, final)
