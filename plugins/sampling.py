"""The likeliest token of each row: of the model's own logits, or after masks, biases and penalties."""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from farrier.plugins.kernel import KernelSource, PerRows, Variant

INFINITE_KEY = tl.constexpr(0x7F800000)
"""The key of +inf. NaN's is above it."""
NOTHING_KEY = tl.constexpr(-0x7F800001)
"""The key of -inf."""
_BLOCK = 2048
_HISTORY = tl.constexpr(1024)


@dataclass(frozen=True)
class Greedy(Variant):
    """The likeliest token of each row; equal logits rank by token id, lowest first.

    Arguments: logits fp32 `[S, vocab_size]`, partials i64 `[S, parts]`, counters i32 `[S]` (zeros, and zeros again
    afterwards), sampled i32 `[S]`: -1 where the largest logit is not finite or one is NaN.
    """

    vocab_size: int
    pdl: bool = False

    @property
    def parts(self) -> int:
        """Programs for each row."""
        return int(triton.cdiv(self.vocab_size, self._block))

    def source(self) -> KernelSource:
        return KernelSource(
            _greedy,
            {"logits": "*fp32", "partials": "*i64", "counters": "*i32", "sampled": "*i32"},
            {"VOCAB": self.vocab_size, "BLOCK": self._block, "PARTS": self.parts, "PDL": self.pdl},
            num_warps=self._block // 256,
            pdl=self.pdl,
        )

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (self.parts, PerRows())

    @property
    def _block(self) -> int:
        return min(_BLOCK, padded_vocab(self.vocab_size))


@dataclass(frozen=True)
class Adjust(Variant):
    """Mask, logit bias and penalties, and the likeliest token after them. Leaves the logits as they are.

    Arguments, as `SamplingArrays` has them: logits fp32 `[S, vocab_size]`; masks u32 `[S, ceil(vocab_size / 32)]` if
    `masked`; bias_ids, bias_values, bias_starts `[S + 1]`; history_ids, history_starts `[S + 1]`, output_starts
    `[S]`; repetition_penalty, presence_penalty, frequency_penalty fp32 `[S]`. Then work fp32
    `[S, padded_vocab(vocab_size)]`: the adjusted logits, -inf behind them; and, as for `Greedy`, partials i64
    `[S, parts]`, counters i32 `[S]`, sampled i32 `[S]`.
    """

    vocab_size: int
    masked: bool = False
    pdl: bool = False

    @property
    def parts(self) -> int:
        """Programs for each row."""
        return padded_vocab(self.vocab_size) // self._block

    def source(self) -> KernelSource:
        masks = {"masks": "*u32"} if self.masked else {}
        arguments = {
            "logits": "*fp32",
            **masks,
            "bias_ids": "*i32",
            "bias_values": "*fp32",
            "bias_starts": "*i32",
            "history_ids": "*i32",
            "history_starts": "*i32",
            "output_starts": "*i32",
            "repetition_penalty": "*fp32",
            "presence_penalty": "*fp32",
            "frequency_penalty": "*fp32",
            "work": "*fp32",
            "partials": "*i64",
            "counters": "*i32",
            "sampled": "*i32",
        }
        constants: dict[str, Any] = {} if self.masked else {"masks": None}
        constants |= {"VOCAB": self.vocab_size, "BLOCK": self._block, "PARTS": self.parts, "PDL": self.pdl}
        # Counting takes registers, and half as many a thread with twice the warps.
        return KernelSource(_adjust, arguments, constants, num_warps=self._block // 128, pdl=self.pdl)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (self.parts, PerRows())

    @property
    def _block(self) -> int:
        return min(_BLOCK, padded_vocab(self.vocab_size))


def tile_of(vocab_size: int) -> int:
    """Tokens that a program looks at together."""
    return max(1024, min(8192, int(triton.next_power_of_2(vocab_size))))


def padded_vocab(vocab_size: int) -> int:
    """Length of a row of adjusted logits: whole tiles."""
    tile = tile_of(vocab_size)
    return int(triton.cdiv(vocab_size, tile)) * tile


@triton.jit
def order_key(x):
    """i32 that rank as the fp32 do: -0 equals 0, and every NaN is above +inf."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def ranked(x, ids):
    """i64 whose maximum is the largest value's, of equal ones the lowest id's."""
    return (order_key(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def id_of(rank):
    return (0x7FFFFFFF - (rank & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def arrived_last(counter, PARTS: tl.constexpr):
    """Whether the other programs of this row have written what they had to; the last one sets the counter back."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _likeliest(x, columns, row, part, partials, counters, sampled, PARTS: tl.constexpr):
    tl.store(partials + row * PARTS + part, tl.max(ranked(x, columns), 0))
    if arrived_last(counters + row, PARTS):
        parts = tl.arange(0, triton.next_power_of_2(PARTS))
        ranks = tl.load(partials + row * PARTS + parts, parts < PARTS, other=-0x8000000000000000, cache_modifier=".cg")
        best = tl.max(ranks, 0)
        key = (best >> 32).to(tl.int32)
        tl.store(sampled + row, tl.where((key < INFINITE_KEY) & (key > NOTHING_KEY), id_of(best), -1))


@triton.jit
def _greedy(
    logits,
    partials,
    counters,
    sampled,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    part = tl.program_id(0)
    row = tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
    x = tl.load(logits + row.to(tl.int64) * VOCAB + columns, columns < VOCAB, other=-float("inf"))
    _likeliest(x, columns, row, part, partials, counters, sampled, PARTS)


@triton.jit
def _counts(ids, start, end, first, BLOCK: tl.constexpr):
    """How often each of the BLOCK ids from `first` on is among `ids[start:end]`."""
    counts = tl.zeros([BLOCK], tl.int32)
    for tile in range(start, end, _HISTORY):
        places = tile + tl.arange(0, _HISTORY)
        local = tl.load(ids + places, places < end, other=-1) - first
        here = (local >= 0) & (local < BLOCK) & (places < end)
        counts += tl.histogram(tl.where(here, local, 0), BLOCK, mask=here)
    return counts


@triton.jit
def _adjust(
    logits,
    masks,
    bias_ids,
    bias_values,
    bias_starts,
    history_ids,
    history_starts,
    output_starts,
    repetition_penalty,
    presence_penalty,
    frequency_penalty,
    work,
    partials,
    counters,
    sampled,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    part = tl.program_id(0)
    row = tl.program_id(1)
    first = part * BLOCK
    columns = first + tl.arange(0, BLOCK)
    inside = columns < VOCAB
    history = tl.load(history_starts + row)
    output = tl.load(output_starts + row)
    end = tl.load(history_starts + row + 1)
    penalized = end > history
    if penalized:
        outputs = _counts(history_ids, output, end, first, BLOCK)
        seen = (_counts(history_ids, history, output, first, BLOCK) + outputs) > 0
    else:
        outputs = tl.zeros([BLOCK], tl.int32)
        seen = outputs > 0
    if PDL:
        gdc_wait()
    x = tl.load(logits + row.to(tl.int64) * VOCAB + columns, inside, other=-float("inf"))
    if masks is not None:
        WORDS: tl.constexpr = (VOCAB + 31) // 32
        words = tl.load(masks + row.to(tl.int64) * WORDS + columns // 32, inside, other=0)
        x = tl.where(((words >> (columns % 32).to(tl.uint32)) & 1) != 0, x, -float("inf"))
    for bias in range(tl.load(bias_starts + row), tl.load(bias_starts + row + 1)):
        biased = tl.load(bias_ids + bias)
        if (biased >= first) & (biased < first + BLOCK):
            x = tl.where(columns == biased, x + tl.load(bias_values + bias), x)
    if penalized:
        factor = tl.load(repetition_penalty + row)
        x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, factor + tl.zeros([BLOCK], tl.float32)), x * factor), x)
        x = tl.where(outputs > 0, x - tl.load(presence_penalty + row), x)
        # One subtraction for each occurrence rounds as the reference does.
        frequency = tl.load(frequency_penalty + row)
        for occurrence in range(0, tl.max(outputs, 0)):
            x = tl.where(occurrence < outputs, x - frequency, x)
    tl.store(work + row.to(tl.int64) * (PARTS * BLOCK) + columns, x)
    _likeliest(x, columns, row, part, partials, counters, sampled, PARTS)
