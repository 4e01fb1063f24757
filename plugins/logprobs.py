"""Log-probabilities of the model's own distribution: the sampled token's and the likeliest tokens'."""

from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from farrier.plugins.kernel import KernelSource, PerRows, Variant
from farrier.plugins.sampling import arrived_last, id_of, ranked

MAX_LOGPROBS = 20
_SLOTS = tl.constexpr(32)
_ABSENT = tl.constexpr(-0x8000000000000000)
_BLOCK = 4096


@dataclass(frozen=True)
class Logprobs(Variant):
    """Logprobs of the rows that ask for them; the others' outputs stay as they are.

    Arguments: logits fp32 `[S, vocab_size]`; num_logprobs i32 `[S]`, at most 20, -1 for a row that asks for none;
    sampled i32 `[S]`, negative for a row without a token, which gets no logprobs; partials i64 `[S, parts, 32]`, sums
    fp32 `[S, parts, 2]`, counters i32 `[S]` (zeros, and zeros again afterwards). Out: sampled_logprob fp32 `[S]`,
    top_ids i32 and top_values fp32 `[S, 20]`: the first num_logprobs of a row, likeliest first, equal ones by id; id -1
    where there are no more tokens above -inf.
    """

    vocab_size: int
    pdl: bool = False

    @property
    def parts(self) -> int:
        """Programs for each row."""
        return int(triton.cdiv(self.vocab_size, self._block))

    def source(self) -> KernelSource:
        return KernelSource(
            _logprobs,
            {
                "logits": "*fp32",
                "num_logprobs": "*i32",
                "sampled": "*i32",
                "partials": "*i64",
                "sums": "*fp32",
                "counters": "*i32",
                "sampled_logprob": "*fp32",
                "top_ids": "*i32",
                "top_values": "*fp32",
            },
            {
                "VOCAB": self.vocab_size,
                "BLOCK": self._block,
                "PARTS": self.parts,
                "LIMIT": MAX_LOGPROBS,
                "PDL": self.pdl,
            },
            num_warps=max(1, self._block // 512),
            pdl=self.pdl,
        )

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (self.parts, PerRows())

    @property
    def _block(self) -> int:
        return min(_BLOCK, int(triton.next_power_of_2(self.vocab_size)))


@triton.jit
def _logprobs(
    logits,
    num_logprobs,
    sampled,
    partials,
    sums,
    counters,
    sampled_logprob,
    top_ids,
    top_values,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    part = tl.program_id(0)
    row = tl.program_id(1)
    count = tl.minimum(tl.load(num_logprobs + row), LIMIT)
    if PDL:
        gdc_wait()
    token = tl.load(sampled + row)
    if (count >= 0) & (token >= 0):
        raw = logits + row.to(tl.int64) * VOCAB
        columns = part * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(raw + columns, columns < VOCAB, other=-float("inf"))
        best = tl.max(x, 0)
        tl.store(sums + (row * PARTS + part) * 2, best)
        shift = tl.where(best > -float("inf"), best, 0.0)
        tl.store(sums + (row * PARTS + part) * 2 + 1, tl.sum(tl.exp(x - shift), 0))
        ranks = tl.where(x > -float("inf"), ranked(x, columns), _ABSENT)
        for place in range(0, count):
            top = tl.max(ranks, 0)
            tl.store(partials + (row * PARTS + part) * _SLOTS + place, top)
            ranks = tl.where(ranks == top, _ABSENT, ranks)
        if arrived_last(counters + row, PARTS):
            _merge(
                raw, count, token, row, partials, sums, sampled_logprob, top_ids, top_values, PARTS=PARTS, LIMIT=LIMIT
            )


@triton.jit
def _merge(
    raw,
    count,
    token,
    row,
    partials,
    sums,
    sampled_logprob,
    top_ids,
    top_values,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    WIDTH: tl.constexpr = triton.next_power_of_2(PARTS)
    parts = tl.arange(0, WIDTH)
    pairs = sums + (row * PARTS + parts) * 2
    maxima = tl.load(pairs, parts < PARTS, other=-float("inf"), cache_modifier=".cg")
    masses = tl.load(pairs + 1, parts < PARTS, other=0, cache_modifier=".cg")
    best = tl.max(maxima, 0)
    normalizer = best + tl.log(tl.sum(masses * tl.exp(maxima - best), 0))
    tl.store(sampled_logprob + row, tl.load(raw + token) - normalizer)
    slots = tl.arange(0, WIDTH * _SLOTS)
    filled = (slots < PARTS * _SLOTS) & (slots % _SLOTS < count)
    ranks = tl.load(partials + row * PARTS * _SLOTS + slots, filled, other=_ABSENT, cache_modifier=".cg")
    for place in range(0, count):
        top = tl.max(ranks, 0)
        present = top != _ABSENT
        id_ = tl.where(present, id_of(top), -1)
        value = tl.load(raw + id_, present, other=-float("inf"))
        tl.store(top_ids + row * LIMIT + place, id_)
        tl.store(top_values + row * LIMIT + place, value - normalizer)
        ranks = tl.where(ranks == top, _ABSENT, ranks)
