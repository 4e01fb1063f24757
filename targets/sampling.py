"""What sampling means, in numpy: every backend is tested against `sample`, and CPU backends use it as it is.

Per row: mask, logit bias, penalties (repetition, then frequency and presence); temperature 0 takes the likeliest
token. Otherwise divide by the temperature, then keep the top-k, of those the top-p nucleus, of those what reaches
min-p times the likeliest; then draw by inverse CDF in token-id order with one uniform number that depends on the
row's seed and step alone. Equal logits rank by token id, lowest first, everywhere.
"""

import numpy as np
import numpy.typing as npt

from farrier.targets.engine import Float32, RowLogprobs, SamplingArrays, StepResult

UInt64 = npt.NDArray[np.uint64]

NO_TOKEN = -1
"""Sampled from a row that offers no token: every logit is -inf (masked, biased), or one is NaN or +inf."""

_NOTHING = np.float32(-np.inf)
_LOWEST = np.finfo(np.float32).min
_CHUNK = 256


def sample(logits: Float32, arrays: SamplingArrays) -> StepResult:
    """Samples one token from each row of `logits` `[S, V]`, which stays untouched.

    Logprobs are of the untouched logits. A row that offers no token yields NO_TOKEN and no logprobs.
    """
    # Greedy rows must cost no more than argmax, and copying or exponentiating 16 rows of 128k logits costs more.
    untouched = arrays.masks is None and not len(arrays.history_ids) and not len(arrays.bias_ids)
    if untouched and not arrays.temperature.any():
        token_ids = np.argmax(logits, axis=1)
        chosen = np.take_along_axis(logits, token_ids[:, None], axis=1)[:, 0]
        token_ids[~np.isfinite(chosen)] = NO_TOKEN
    else:
        token_ids = np.empty(len(logits), np.int64)
        draws = uniforms(arrays.seed, arrays.step)
        for row, raw in enumerate(logits):
            adjusted = raw if untouched else _adjust(raw, row, arrays)
            token_ids[row] = _choose(adjusted, row, arrays, draws[row])
    logprobs = {
        row: _logprobs(logits[row], int(token_ids[row]), int(arrays.num_logprobs[row]))
        for row in np.flatnonzero(arrays.num_logprobs >= 0).tolist()
        if token_ids[row] != NO_TOKEN
    }
    return StepResult(token_ids.astype(np.int32), logprobs)


def uniforms(seed: UInt64, step: UInt64) -> npt.NDArray[np.float64]:
    """One number in [0, 1) each: the splitmix64 stream that starts at the mixed `seed`, at position `step`."""
    bits = _mix(_mix(seed) + (step + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53, np.float64)


def _mix(z: UInt64) -> UInt64:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _adjust(raw: Float32, row: int, arrays: SamplingArrays) -> Float32:
    """Mask, bias and penalties; a copy, unless nothing applies to this row."""
    x = raw
    if arrays.masks is not None and (words := arrays.masks[row]).min() != 0xFFFFFFFF:
        allowed = np.unpackbits(words.view(np.uint8), count=len(x), bitorder="little").view(np.bool_)
        x = np.where(allowed, x, _NOTHING)
    start, end = arrays.bias_starts[row : row + 2]
    if end > start:
        x = raw.copy() if x is raw else x
        np.add.at(x, arrays.bias_ids[start:end], arrays.bias_values[start:end])
    start, end = arrays.history_starts[row : row + 2]
    if end > start:
        x = raw.copy() if x is raw else x
        # Where a token repeats, the same value is written twice; only the frequency penalty adds up.
        history, output = arrays.history_ids[start:end], arrays.history_ids[arrays.output_starts[row] : end]
        factor = arrays.repetition_penalty[row]
        x[history] = np.where(x[history] > 0, x[history] / factor, x[history] * factor)
        x[output] = x[output] - arrays.presence_penalty[row]
        np.subtract.at(x, output, arrays.frequency_penalty[row])
    return x


def _choose(x: Float32, row: int, arrays: SamplingArrays, draw: float) -> int:
    likeliest = int(np.argmax(x))
    if not np.isfinite(x[likeliest]):
        return NO_TOKEN
    temperature = arrays.temperature[row]
    if temperature == 0:
        return likeliest
    top_k, top_p, min_p = int(arrays.top_k[row]), float(arrays.top_p[row]), arrays.min_p[row]
    ids = np.sort(_top(x, top_k)) if 0 < top_k < len(x) else None
    values = x if ids is None else x[ids]
    # Relative to the likeliest token's, weights neither overflow nor need a normalization.
    with np.errstate(over="ignore"):  # a tiny temperature: exp(-inf) is right
        weights = np.exp((values - x[likeliest]) / temperature)
    if top_p < 1:
        weights = _nucleus(weights, top_p)
    if min_p > 0:
        weights[weights < min_p] = 0
    position = _inverse_cdf(weights, draw)
    return position if ids is None else int(ids[position])


def _top(x: Float32, count: int) -> npt.NDArray[np.int64]:
    """Ids of the `count` largest values above -inf, largest first, equal ones by id."""
    if count == 0:
        return np.empty(0, np.int64)
    bound = _LOWEST
    groups = len(x) // 64
    if count <= groups:
        # The count-th largest maximum of disjoint groups bounds the count-th largest value from below: far
        # cheaper than partitioning, and it leaves few values to sort.
        maxima = x[: groups * 64].reshape(64, groups).max(axis=0)
        bound = max(bound, np.partition(maxima, groups - count)[groups - count])
    ids = np.flatnonzero(x >= bound)
    return ids[np.argsort(-x[ids], kind="stable")[:count]]


def _nucleus(weights: Float32, top_p: float) -> Float32:
    """`weights` with zeros outside the smallest set of likeliest tokens that holds `top_p` of the mass."""
    mass = top_p * float(weights.sum(dtype=np.float64))
    # Only the likeliest tokens that surely hold the nucleus need be sorted.
    bound = 1.0
    while True:
        bound /= 16
        likely = weights[weights >= bound]
        if likely.sum(dtype=np.float64) >= mass:
            break
    ranked = np.sort(likely)[::-1]
    size = min(int(np.searchsorted(np.cumsum(ranked, dtype=np.float64), mass)) + 1, len(ranked))
    threshold = ranked[size - 1]
    nucleus = np.where(weights >= threshold, weights, np.float32(0))
    surplus = np.count_nonzero(nucleus) - size
    if surplus > 0:
        nucleus[np.flatnonzero(weights == threshold)[-surplus:]] = 0
    return nucleus


def _inverse_cdf(weights: Float32, draw: float) -> int:
    """First index whose cumulative weight exceeds `draw` of the total."""
    # Sums of chunks first: a running sum over the whole vocabulary cannot be vectorized.
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _CHUNK)), dtype=np.float64)
    target = draw * sums[-1]
    chunk = _first_above(sums, target)
    if chunk > 0:
        target -= sums[chunk - 1]
    start = chunk * _CHUNK
    return start + _first_above(np.cumsum(weights[start : start + _CHUNK], dtype=np.float64), target)


def _first_above(cumulative: npt.NDArray[np.float64], target: float) -> int:
    # Where rounding puts the target at the very end, the last index that adds weight is meant.
    last = np.searchsorted(cumulative, cumulative[-1], side="left")
    return int(min(np.searchsorted(cumulative, target, side="right"), last))


def _logprobs(raw: Float32, token_id: int, count: int) -> RowLogprobs:
    best = raw.max()
    normalizer = best + np.log(np.exp(raw - best).sum())
    top = _top(raw, min(count, len(raw)))
    return RowLogprobs(float(raw[token_id] - normalizer), top.astype(np.int32), raw[top] - normalizer)
