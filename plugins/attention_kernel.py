"""The two kernels of `attention`: rows of a tile are the query heads of one KV head.

Scores are kept as `x` with `x * FACTOR` the logit in powers of two; see `_capped`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from farrier.plugins.rope import cached, rotated, rotation

# Finite, so that rows that see nothing of a tile need no guard against inf - inf: what they add up there is
# multiplied by an exact 0 once they see a token.
_UNSEEN: tl.constexpr = tl.constexpr(-1e30)


@triton.jit
def _capped(x, CAP_FACTOR: tl.constexpr):
    """`tanh(scale·x / cap)`; CAP_FACTOR is `2·log2(e)·scale/cap`."""
    return 1.0 - 2.0 / (tl.exp2(x * CAP_FACTOR) + 1.0)


@triton.jit
def _scores(q, k, CAP_FACTOR: tl.constexpr):
    """`q·k`, or with a soft cap its `_capped` form."""
    x = tl.dot(q, k)
    if CAP_FACTOR is not None:
        x = _capped(x, CAP_FACTOR)
    return x


@triton.jit
def _accumulate(x, v, peak, total, acc, FACTOR: tl.constexpr):
    """One step of the online softmax. `peak` is rounded, so that a tile that does not raise it leaves `acc` as it is
    to the bit; the explicit fma keeps every copy of this code alike."""
    raised = tl.maximum(peak, tl.max(x, 1) * FACTOR)
    decay = tl.exp2(peak - raised)
    p = tl.exp2(tl.fma(x, tl.full(x.shape, FACTOR, tl.float32), tl.broadcast_to(-raised[:, None], x.shape)))
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None])
    return raised, total * decay + tl.sum(p, 1), acc


@triton.jit
def _page(table, token, seen):
    return tl.load(table + token // 32, mask=seen, other=0)


@triton.jit
def _row(page, token, kv_head, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where a token's head starts in the KV pool."""
    return ((page.to(tl.int64) * NUM_KV_HEADS + kv_head) * 32 + token % 32) * HEAD_DIM


@triton.jit
def _combine(
    partial_out,
    partial_stats,
    out,
    head,
    active,
    act: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    REDUCED: tl.constexpr,
):
    """What the active splits found for a group of heads, REDUCED splits at a time, past the L1 cache."""
    g = tl.arange(0, GROUP_PAD)
    d = tl.arange(0, HEAD_PAD)
    inside = d < HEAD_DIM
    peak = tl.full([GROUP_PAD], _UNSEEN, tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for start in tl.range(0, active, REDUCED):
        split = start + tl.arange(0, REDUCED)
        there = (g < GROUP)[:, None] & (split < active)[None, :]
        at = (head + g)[:, None] * SPLITS + split[None, :]
        peaks = tl.load(partial_stats + at * 2, mask=there, other=_UNSEEN, cache_modifier=".cg")
        totals = tl.load(partial_stats + at * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        parts_at = at.to(tl.int64)[:, :, None] * HEAD_DIM + d[None, None, :]
        mask = there[:, :, None] & inside[None, None, :]
        parts = tl.load(partial_out + parts_at, mask=mask, other=0.0, cache_modifier=".cg")
        raised = tl.maximum(peak, tl.max(peaks, 1))
        decay = tl.exp2(peak - raised)
        weights = tl.exp2(peaks - raised[:, None])
        total = total * decay + tl.sum(totals * weights, 1)
        acc = acc * decay[:, None] + tl.sum(parts * weights[:, :, None], 1)
        peak = raised
    total = tl.where(g < GROUP, total, 1.0)
    result = (acc / total[:, None]).to(act)
    tl.store(out + g[:, None] * HEAD_DIM + d[None, :], result, mask=(g < GROUP)[:, None] & inside[None, :])


@triton.jit
def decode_attention(
    qkv,
    context_lens,
    block_ids,
    block_starts,
    cos,
    sin,
    q_norm,
    k_norm,
    k_cache,
    v_cache,
    partial_out,
    partial_stats,
    counters,
    out,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    VECTOR: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    CAP_FACTOR: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    REDUCED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    act = out.dtype.element_ty
    pool = k_cache.dtype.element_ty

    context = tl.load(context_lens + sequence)
    table = block_ids + tl.load(block_starts + sequence)
    lowest = 0
    if WINDOW is not None:
        lowest = tl.maximum(context - (WINDOW - 1), 0)
    base = lowest // 32 * 32
    num_tiles = tl.cdiv(context + 1 - base, BLOCK_T)
    active = tl.minimum(num_tiles, SPLITS)
    if split >= active:  # a padded sequence has no tile
        if PDL:
            gdc_wait()
        return
    share = num_tiles // active
    odd = num_tiles % active
    first = split * share + tl.minimum(split, odd)
    count = share + (split < odd).to(tl.int32)

    # Downwards, so that only the tile loaded up here may reach beyond the past. None of these loads depends on this
    # step.
    t = tl.arange(0, BLOCK_T)
    d = tl.arange(0, HEAD_PAD)
    inside = d < HEAD_DIM
    token = base + (first + count - 1) * BLOCK_T + t
    past = (token >= lowest) & (token < context)
    page = _page(table, token, past)
    below = token - BLOCK_T
    next_page = _page(table, below, below >= lowest)
    newest = tl.load(table + context // 32)
    partner, c, s = rotation(cos, sin, context, d, ROTARY_DIM, VECTOR)
    # Over an axis of one: a reduction keeps Triton from rotating all of q in every warp, where the product wants it.
    c = tl.max(c[None, :], 0)
    at = _row(page, token, kv_head, NUM_KV_HEADS, HEAD_DIM)[:, None] + d[None, :]
    v = tl.load(v_cache + at, mask=past[:, None] & inside[None, :], other=0.0)
    k = tl.load(k_cache + at, mask=past[:, None] & inside[None, :], other=0.0)
    if PDL:
        gdc_wait()

    q_at = qkv + sequence.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    k_at = q_at + (NUM_HEADS + kv_head) * HEAD_DIM
    heads = tl.arange(0, ROWS)[:, None]
    one = tl.zeros([1, 1], tl.int32)
    new_v = tl.load(k_at + NUM_KV_HEADS * HEAD_DIM + one + d[None, :], mask=inside[None, :], other=0.0)
    new_k = rotated(k_at + one, one == 0, d, partner, c, s, k_norm, HEAD_DIM, EPS)
    q_at += (kv_head * GROUP + heads) * HEAD_DIM
    q = rotated(q_at, heads < GROUP, d, partner, c, s, q_norm, HEAD_DIM, EPS).to(act)
    new_k = cached(new_k, pool)
    new_v = cached(new_v.to(tl.float32), pool)

    # The last split has the new token, and begins with it.
    owner = split == active - 1
    new_x = tl.sum(q.to(tl.float32) * new_k.to(act).to(tl.float32), 1)
    if CAP_FACTOR is not None:
        new_x = _capped(new_x, CAP_FACTOR)
    peak = tl.where(owner, new_x * FACTOR, _UNSEEN)
    total = tl.where(owner, 1.0, 0.0) + tl.zeros([ROWS], tl.float32)
    acc = tl.where(owner, new_v.to(act).to(tl.float32), 0.0) + tl.zeros([ROWS, HEAD_PAD], tl.float32)
    k = k.to(act)
    v = v.to(act)
    x = tl.where(past[None, :], _scores(q, tl.trans(k), CAP_FACTOR), _UNSEEN)
    peak, total, acc = _accumulate(x, v, peak, total, acc, FACTOR)

    for _ in tl.range(1, count, num_stages=STAGES):
        token = below
        seen = token >= lowest
        at = _row(next_page, token, kv_head, NUM_KV_HEADS, HEAD_DIM)[:, None] + d[None, :]
        k = tl.load(k_cache + at, mask=seen[:, None] & inside[None, :], other=0.0).to(act)
        v = tl.load(v_cache + at, mask=seen[:, None] & inside[None, :], other=0.0).to(act)
        below = token - BLOCK_T
        next_page = _page(table, below, below >= lowest)
        x = tl.where(seen[None, :], _scores(q, tl.trans(k), CAP_FACTOR), _UNSEEN)
        peak, total, acc = _accumulate(x, v, peak, total, acc, FACTOR)

    if owner:
        new_at = _row(newest, context, kv_head, NUM_KV_HEADS, HEAD_DIM) + d[None, :]
        tl.store(k_cache + new_at, new_k, mask=inside[None, :])
        tl.store(v_cache + new_at, new_v, mask=inside[None, :])

    head = sequence * NUM_HEADS + kv_head * GROUP
    out += head.to(tl.int64) * HEAD_DIM
    if SPLITS == 1 or active == 1:
        result = acc / total[:, None]
        tl.store(out + heads * HEAD_DIM + d[None, :], result.to(act), mask=(heads < GROUP) & inside[None, :])
        return

    if SPLITS > 1:
        rows = (head + heads) * SPLITS + split
        part = rows.to(tl.int64) * HEAD_DIM + d[None, :]
        tl.store(partial_out + part, acc, mask=(heads < GROUP) & inside[None, :])
        tl.store(partial_stats + rows * 2, peak[:, None], mask=heads < GROUP)
        tl.store(partial_stats + rows * 2 + 1, total[:, None], mask=heads < GROUP)
        tl.debug_barrier()  # all of this program's stores, then the one thread that announces them
        counter = counters + sequence * NUM_KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") != active - 1:
            return
        tl.store(counter, 0)
        _combine(
            partial_out, partial_stats, out, head, active, act, GROUP, GROUP_PAD, HEAD_DIM, HEAD_PAD, SPLITS, REDUCED
        )


@triton.jit
def _attend(
    q,
    position,
    k_cache,
    v_cache,
    table,
    kv_head,
    begin,
    end,
    length,
    peak,
    total,
    acc,
    MASKED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    FACTOR: tl.constexpr,
    CAP_FACTOR: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The tiles [begin, end) of BLOCK_T tokens each, counted from the sequence's start."""
    act = q.dtype
    d = tl.arange(0, HEAD_PAD)
    token = begin * BLOCK_T + tl.arange(0, BLOCK_T)
    page = _page(table, token, token < length)
    for _ in tl.range(begin, end, num_stages=STAGES):
        at = _row(page, token, kv_head, NUM_KV_HEADS, HEAD_DIM)[:, None] + d[None, :]
        if MASKED:
            mask = (token < length)[:, None] & (d < HEAD_DIM)[None, :]
            k = tl.load(k_cache + at, mask=mask, other=0.0).to(act)
            v = tl.load(v_cache + at, mask=mask, other=0.0).to(act)
        elif HEAD_PAD != HEAD_DIM:
            k = tl.load(k_cache + at, mask=(d < HEAD_DIM)[None, :], other=0.0).to(act)
            v = tl.load(v_cache + at, mask=(d < HEAD_DIM)[None, :], other=0.0).to(act)
        else:
            k = tl.load(k_cache + at).to(act)
            v = tl.load(v_cache + at).to(act)
        x = _scores(q, tl.trans(k), CAP_FACTOR)
        if MASKED:
            seen = token[None, :] <= position[:, None]
            if WINDOW is not None:
                seen = seen & (token[None, :] > position[:, None] - WINDOW)
            x = tl.where(seen, x, _UNSEEN)
        token += BLOCK_T
        page = _page(table, token, token < length)
        peak, total, acc = _accumulate(x, v, peak, total, acc, FACTOR)
    return peak, total, acc


@triton.jit
def prefill_attention(
    q,
    k_cache,
    v_cache,
    tiles,
    query_starts,
    context_lens,
    block_ids,
    block_starts,
    out,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    FACTOR: tl.constexpr,
    CAP_FACTOR: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tiles + 2 * tile)
    first_row = tl.load(tiles + 2 * tile + 1)
    start = tl.load(query_starts + sequence)
    num_rows = tl.load(query_starts + sequence + 1) - start
    context = tl.load(context_lens + sequence)
    table = block_ids + tl.load(block_starts + sequence)
    if PDL:
        gdc_wait()
    if context < 0:
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_PAD)
    query = first_row + m // GROUP
    valid = (m < BLOCK_Q * GROUP) & (query < num_rows)
    begin_at = start.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + kv_head * GROUP * HEAD_DIM
    at = (query * NUM_HEADS + m % GROUP) * HEAD_DIM
    mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    rows = tl.load(q + begin_at + at[:, None] + d[None, :], mask=mask, other=0.0)
    position = context + query

    # Tiles of tokens lie at multiples of BLOCK_T whatever the chunk: a row's sum is always taken in the same order.
    # In [inner, outer) every row sees every token.
    lowest = context + first_row
    highest = context + tl.minimum(first_row + BLOCK_Q, num_rows) - 1
    length = highest + 1
    end = tl.cdiv(length, BLOCK_T)
    begin = 0
    inner = 0
    if WINDOW is not None:
        begin = tl.maximum(lowest - (WINDOW - 1), 0) // BLOCK_T
        inner = tl.minimum(tl.cdiv(tl.maximum(highest - (WINDOW - 1), 0), BLOCK_T), end)
    outer = tl.maximum((lowest + 1) // BLOCK_T, inner)

    peak = tl.full([BLOCK_M], _UNSEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    for part in tl.static_range(3):
        if part != 0 or WINDOW is not None:
            peak, total, acc = _attend(
                rows,
                position,
                k_cache,
                v_cache,
                table,
                kv_head,
                begin if part == 0 else (inner if part == 1 else outer),
                inner if part == 0 else (outer if part == 1 else end),
                length,
                peak,
                total,
                acc,
                part != 1,
                NUM_KV_HEADS,
                HEAD_DIM,
                HEAD_PAD,
                FACTOR,
                CAP_FACTOR,
                WINDOW,
                BLOCK_T,
                STAGES,
            )
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + begin_at + at[:, None] + d[None, :], result, mask=mask)
