"""The kernels around a mixture of experts against numpy."""

import numpy as np
import pytest

from farrier.plugins.routing import Align, Combine, TopK, align, top_k
from tests.kernels.weights import bits_of, values_of


@pytest.mark.parametrize(("experts", "count"), [(8, 2), (128, 8), (60, 4), (5, 3), (1, 1)])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
def test_top_k(run, experts, count, renormalize, tokens):
    rng = np.random.default_rng(experts)
    logits = (3 * rng.standard_normal((tokens, experts))).astype(np.float32)
    logits[0, 1:] = logits[0, 0]  # all equal
    slots = np.arange(tokens, dtype=np.int32)
    slots[4:5] = -1
    variant = TopK(experts, count, renormalize)
    ids, weights = np.full((tokens, count), 7, np.int32), np.zeros((tokens, count), np.float32)
    run(variant.source(), variant.grid(tokens), logits, slots, ids, weights, tokens)
    expected_ids, expected_weights = top_k(logits, count, renormalize)
    expected_ids[4:5], expected_weights[4:5] = -1, 0
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)


def test_top_k_names_experts_that_exist_whatever_comes(run):
    variant = TopK(5, 2, True)
    logits = np.full((3, 5), np.nan, np.float32)
    logits[1] = -np.inf
    logits[2] = [np.inf, 0, 0, 0, 0]
    ids, weights = np.full((3, 2), 7, np.int32), np.zeros((3, 2), np.float32)
    run(variant.source(), variant.grid(3), logits, np.zeros(3, np.int32), ids, weights, 3)
    assert ((ids >= 0) & (ids < 5)).all()


@pytest.mark.parametrize(("experts", "count", "block"), [(8, 2, 16), (128, 8, 16), (60, 4, 64), (3, 1, 32)])
@pytest.mark.parametrize("tokens", [1, 6, 300, 1300])
def test_align(run, experts, count, block, tokens):
    rng = np.random.default_rng(tokens)
    ids = rng.integers(-1, experts, (tokens, count), np.int32)
    variant = Align(experts, count, block)
    blocks = variant.blocks.count(tokens)
    got, block_experts = np.full((blocks, block), 9, np.int32), np.full(blocks, 9, np.int32)
    run(variant.source(), variant.grid(tokens), ids, got, block_experts, tokens)
    expected, expected_experts = align(ids.reshape(-1), experts, block)
    np.testing.assert_array_equal(got[: len(expected)], expected)
    np.testing.assert_array_equal(block_experts[: len(expected)], expected_experts)
    assert (block_experts[len(expected) :] == -1).all()
    assert (got[len(expected) :] == 9).all()


@pytest.mark.parametrize(("experts", "count", "block"), [(3, 1, 16), (3, 2, 16), (8, 3, 32), (1, 1, 16)])
def test_blocks_suffice_for_the_worst_choices(experts, count, block):
    blocks = Align(experts, count, block).blocks
    for tokens in range(1, 400):
        pairs = tokens * count
        # Every expert but the first has a single pair more than fills its blocks.
        single = min(experts, pairs)
        assert (pairs - single) // block + single <= blocks.count(tokens)


@pytest.mark.parametrize(
    ("y_type", "out_type", "epilogue"),
    [("fp32", "fp32", "add"), ("bf16", "fp32", "add"), ("fp16", "fp16", "store"), ("fp32", "bf16", "store")],
)
def test_combine(run, y_type, out_type, epilogue):
    rng = np.random.default_rng(3)
    variant = Combine(3, 700, y_type, out_type, epilogue)
    y = bits_of(rng.standard_normal((15, 700)).astype(np.float32), y_type)
    before = rng.standard_normal((5, 700)).astype(np.float32)
    out = bits_of(before, out_type)
    run(variant.source(), variant.grid(5), y, out, 5)
    expected = values_of(y, y_type).reshape(5, 3, 700).sum(1) + (before if epilogue == "add" else 0)
    off = {"fp32": 1e-6, "fp16": 2**-11, "bf16": 2**-8}[out_type]  # half a unit in the last place
    np.testing.assert_allclose(values_of(out, out_type), expected, rtol=off, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [(lambda: TopK(4, 5, True), "cannot be chosen"), (lambda: Combine(2, 64, "bf16", "bf16"), "residual")],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
