from dataclasses import replace

import numpy as np
import pytest

from farrier.plugins.attention import AttentionShape, DecodeAttention, PrefillAttention
from farrier.plugins.reference import attention as reference
from farrier.plugins.tiles import attention_tiles
from tests.kernels.conftest import ON_DEVICE
from tests.kernels.paged import TYPES, pool, rotary_tables

full_size = pytest.mark.skipif(not ON_DEVICE, reason="too slow in the interpreter; FARRIER_DEVICE=1 runs it on the GPU")

# q, k, v and the weights are rounded to 8 (bf16) or 11 bits (fp16), the result too; values are about 1.
TOLERANCE = {"bf16": 0.02, "fp16": 0.003}


def shape(heads=4, kv_heads=2, head_dim=64, **options):
    return AttentionShape(heads, kv_heads, head_dim, scale=head_dim**-0.5, **options)


def decode(run, variant, contexts, seed=0):
    """Runs one decode step, checks all it wrote; returns `out`."""
    random = np.random.default_rng(seed)
    s = variant.shape
    contexts = np.array(contexts, np.int32)
    batch = len(contexts)
    pages = pool(contexts, np.ones(batch, int), s.num_kv_heads, s.head_dim, s.kv_type, random)
    encode_qkv, decode_qkv = TYPES[variant.qkv_type]
    encode_act, decode_act = TYPES[s.act_type]
    qkv = encode_qkv(random.normal(size=(batch, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim)))
    eps = variant.qk_norm_eps
    norms = [random.uniform(0.5, 1.5, s.head_dim).astype(np.float32) for _ in range(2)] if eps else []
    cos, sin = rotary_tables(int(contexts.max()) + 1, variant.rotary_dim)
    partial_out = np.full((batch, s.num_heads, variant.splits, s.head_dim), np.nan, np.float32)
    partial_stats = np.full((batch, s.num_heads, variant.splits, 2), np.nan, np.float32)
    counters = np.zeros((batch, s.num_kv_heads), np.int32)
    buffers = (partial_out, partial_stats, counters) if variant.splits > 1 else (None, None, None)
    out = encode_act(np.full((batch, s.num_heads * s.head_dim), 7.0))
    before = pages.keys.copy(), pages.values.copy()
    steps = (qkv, contexts, pages.block_ids, pages.block_starts, cos, sin, *norms)
    run(variant.source(), variant.grid(batch), *steps, pages.keys, pages.values, *buffers, out)

    q, k, v = reference.rope_qkv(
        decode_qkv(qkv), np.maximum(contexts, 0), cos, sin, s.num_heads, s.num_kv_heads, (*norms, eps) if eps else None
    )
    got = decode_act(out).reshape(batch, s.num_heads, s.head_dim)
    assert not counters.any()
    expected_caches = before
    for b, context in enumerate(contexts):
        if context < 0:
            assert (got[b] == 7.0).all()
            continue
        slot = pages.slots(b, context)
        caches = []
        for cache, expected, new in zip((pages.keys, pages.values), expected_caches, (k, v), strict=True):
            stored = cache[slot // 32, :, slot % 32]
            exact = 2**-3 if s.kv_type == "fp8e4nv" else 2**-7
            np.testing.assert_allclose(pages.decode(stored), new[b], rtol=exact, atol=2**-8)
            expected[slot // 32, :, slot % 32] = stored
            caches.append(reference.history(pages.decode(cache), pages.blocks(b), context + 1))
        expected = reference.attention(q[b : b + 1], *caches, np.array([context]), s.scale, s.window, s.softcap)
        np.testing.assert_allclose(got[b], expected[0], rtol=0, atol=TOLERANCE[s.act_type])
    np.testing.assert_array_equal(pages.keys, expected_caches[0])
    np.testing.assert_array_equal(pages.values, expected_caches[1])
    return out


CONTEXTS = [0, 31, -1, 63, 100]


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (7, 1), (8, 1)])
@pytest.mark.parametrize("splits", [1, 3])
def test_decode_groups(run, heads, kv_heads, splits):
    variant = DecodeAttention(shape(heads, kv_heads, 32), 32, splits=splits, block_t=32)
    decode(run, variant, CONTEXTS)


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (96, 96), (128, 128), (256, 256)])
def test_decode_head_sizes(run, head_dim, rotary_dim):
    decode(run, DecodeAttention(shape(head_dim=head_dim), rotary_dim, splits=2, block_t=64), [-1, 40, 70])


@pytest.mark.parametrize("window", [1, 2, 33, 64, 96, 1000])
@pytest.mark.parametrize("splits", [1, 4])
def test_decode_window(run, window, splits):
    variant = DecodeAttention(shape(2, 1, 32, window=window), 32, splits=splits, block_t=32)
    decode(run, variant, [0, 1, 32, 95, 96, 130])


@pytest.mark.parametrize("block_t", [32, 64, 128])
def test_decode_more_splits_than_tiles(run, block_t):
    decode(run, DecodeAttention(shape(2, 1, 32), 32, splits=16, block_t=block_t), CONTEXTS)


def test_decode_reduces_many_splits_in_turns(run):
    variant = DecodeAttention(shape(16, 1, 64), 64, splits=9, block_t=32, warps=1)
    assert variant.source().constants["REDUCED"] < 9
    decode(run, variant, [290, 100])


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"softcap": 2.0}, {}),
        ({"softcap": 30.0, "window": 40}, {"splits": 2}),
        ({"kv_type": "fp8e4nv"}, {"splits": 2}),
        ({"kv_type": "fp8e4nv", "act_type": "fp16"}, {"qkv_type": "fp32"}),
        ({"act_type": "fp16", "kv_type": "fp16"}, {"qkv_type": "fp16", "qk_norm_eps": 1e-6}),
        ({}, {"qkv_type": "fp32", "qk_norm_eps": 1e-6, "splits": 2}),
    ],
)
def test_decode_options(run, options, fields):
    decode(run, DecodeAttention(shape(4, 2, 32, **options), 32, block_t=32, **fields), CONTEXTS)


def test_decode_default_and_candidates_cover_the_measured_shapes():
    layer = DecodeAttention(shape(32, 8, 128), 128)
    for batch, context in ((1, 300), (1, 4096), (1, 32768), (16, 1024), (64, 300), (64, 4096), (256, 300)):
        default = layer.default(batch, context)
        candidates = layer.candidates(batch, context)
        assert candidates[0] == default
        assert len(set(candidates)) == len(candidates) <= 24
        assert default.splits <= -(-context // default.block_t)
    assert layer.default(64, 4096).splits == 1


def prefill(run, variant, contexts, lengths, seed=0):
    """Runs one step of chunks, checks it; returns `out [T, q_size]`."""
    random = np.random.default_rng(seed)
    s = variant.shape
    contexts, lengths = np.array(contexts, np.int32), np.array(lengths)
    filled = np.where(contexts < 0, -1, contexts + lengths)
    pages = pool(filled, 0 * filled, s.num_kv_heads, s.head_dim, s.kv_type, random)
    encode, decode_act = TYPES[s.act_type]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    q = encode(random.normal(size=(starts[-1], s.num_heads * s.head_dim)))
    out = attend(run, variant, q, pages, starts, contexts)
    got = decode_act(out).reshape(-1, s.num_heads, s.head_dim)
    heads = decode_act(q).reshape(got.shape)
    for b, context in enumerate(contexts):
        rows = slice(starts[b], starts[b + 1])
        if context < 0:
            assert (got[rows] == 7.0).all()
            continue
        caches = [reference.history(pages.decode(c), pages.blocks(b), filled[b]) for c in (pages.keys, pages.values)]
        positions = context + np.arange(lengths[b])
        expected = reference.attention(heads[rows], *caches, positions, s.scale, s.window, s.softcap)
        np.testing.assert_allclose(got[rows], expected, rtol=0, atol=TOLERANCE[s.act_type])


def attend(run, variant, q, pages, starts, contexts):
    found = attention_tiles(starts, variant.block_q)
    out = TYPES[variant.shape.act_type][0](np.full(q.shape, 7.0))
    tables = (found, starts, contexts, pages.block_ids, pages.block_starts)
    run(variant.source(), variant.grid(len(found)), q, pages.keys, pages.values, *tables, out)
    return out


MIXED = ([0, 37, 0, -1, 64, 90], [40, 1, 1, 2, 33, 70])


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (7, 1), (8, 1)])
def test_prefill_groups(run, heads, kv_heads):
    prefill(run, PrefillAttention(shape(heads, kv_heads, 32), block_m=64, block_t=32), *MIXED)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_prefill_head_sizes(run, head_dim):
    prefill(run, PrefillAttention(shape(head_dim=head_dim)), *MIXED)


@pytest.mark.parametrize("window", [1, 2, 33, 64, 1000])
@pytest.mark.parametrize("block_t", [32, 64])
def test_prefill_window(run, window, block_t):
    prefill(run, PrefillAttention(shape(2, 1, 32, window=window), block_m=32, block_t=block_t), *MIXED)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"softcap": 30.0, "window": 40},
        {"kv_type": "fp8e4nv"},
        {"kv_type": "fp8e4nv", "act_type": "fp16"},
        {"act_type": "fp16", "kv_type": "fp16"},
    ],
)
def test_prefill_options(run, options):
    prefill(run, PrefillAttention(shape(4, 2, 32, **options), block_m=32, block_t=64), *MIXED)


def check_chunking(run, variant, length, cuts, rows):
    random = np.random.default_rng(1)
    s = variant.shape
    pages = pool([length], [0], s.num_kv_heads, s.head_dim, s.kv_type, random)
    q = TYPES[s.act_type][0](random.normal(size=(length, s.num_heads * s.head_dim)))
    nan = 0x7F if s.kv_type == "fp8e4nv" else 0x7FC0
    whole = attend(run, variant, q, pages, np.array([0, length], np.int32), np.array([0], np.int32))
    for begin, end in [
        *((0, cut) for cut in cuts),
        *((cut, length) for cut in cuts),
        *((row, row + 1) for row in rows),
    ]:
        # what lies beyond a chunk is not in the pool yet
        later = replace(pages, keys=pages.keys.copy(), values=pages.values.copy())
        for slot in pages.slots(0, np.arange(end, length)):
            later.keys[slot // 32, :, slot % 32] = later.values[slot // 32, :, slot % 32] = nan
        starts, contexts = np.array([0, end - begin], np.int32), np.array([begin], np.int32)
        part = attend(run, variant, q[begin:end].copy(), later, starts, contexts)
        np.testing.assert_array_equal(part, whole[begin:end])


@pytest.mark.parametrize("options", [{}, {"window": 41}, {"softcap": 5.0}, {"kv_type": "fp8e4nv"}])
@pytest.mark.parametrize("group", [1, 3])
def test_prefill_rows_do_not_depend_on_the_chunking(run, options, group):
    variant = PrefillAttention(shape(2 * group, 2, 32, **options), block_m=32, block_t=32)
    check_chunking(run, variant, 75, cuts=(1, 37, 64), rows=(0, 31, 70))


@full_size
@pytest.mark.parametrize("options", [{}, {"window": 300}, {"softcap": 5.0}, {"kv_type": "fp8e4nv"}])
@pytest.mark.parametrize(("heads", "head_dim"), [(32, 128), (28, 128), (16, 256)])
def test_rows_do_not_depend_on_the_chunking(run, options, heads, head_dim):
    variant = PrefillAttention(shape(heads, 4, head_dim, **options)).default(90)
    check_chunking(run, variant, 1000, cuts=(1, 128, 333, 512, 999), rows=(0, 127, 128, 640, 999))


@full_size
@pytest.mark.parametrize("options", [{}, {"window": 1000}, {"softcap": 30.0}, {"kv_type": "fp8e4nv"}])
@pytest.mark.parametrize(("batch", "context"), [(1, 300), (1, 4096), (16, 1024), (64, 300)])
def test_decode_candidates(run, options, batch, context):
    layer = DecodeAttention(shape(32, 8, 128, **options), 128)
    contexts = np.random.default_rng(2).integers(-1, context, batch)
    contexts[0] = context - 1
    for variant in layer.candidates(batch, context):
        decode(run, variant, contexts)


@full_size
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"softcap": 30.0}, {"kv_type": "fp8e4nv"}])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_prefill_candidates(run, options, head_dim):
    for variant in PrefillAttention(shape(8, 2, head_dim, **options)).candidates(90):
        prefill(run, variant, [0, 700, 300, -1], [513, 1, 300, 5])


def test_tiles_cover_every_row_once():
    starts = np.array([0, 1, 1, 40, 72], np.int32)
    found = attention_tiles(starts, 16)
    expected = [(3, 16), (3, 0), (2, 32), (2, 16), (2, 0), (0, 0)]
    assert found.dtype == np.int32
    assert [tuple(row) for row in found] == expected
