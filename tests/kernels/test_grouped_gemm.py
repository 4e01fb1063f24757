"""Matrix products of a mixture of experts against numpy."""

from dataclasses import replace

import numpy as np
import pytest

from farrier.plugins.grouped_gemm import GroupedGemm, grouped_gemm
from farrier.plugins.routing import Combine, TopK, top_k
from farrier.plugins.weight_form import GemmTile
from tests.kernels.test_gemm import BF16, FORMS
from tests.kernels.weights import bits_of, error_bound, random_activations, random_weights, values_of

TILE = GemmTile(16, 32, 64, 4, 2)
GATED = GroupedGemm(5, 2, 40, 64, BF16, TILE, "fp32", "gated", "silu")
WEIGHTED = GroupedGemm(5, 2, 40, 64, BF16, TILE, "fp32", "weighted")


def launch(run, variant, given, weights, ids, routing, out, biases=()):
    tokens = len(ids) // variant.top_k
    if variant.direct:
        order = [ids]
    else:
        blocks = variant.align.blocks.count(tokens)
        sorted_pairs = np.zeros((blocks, variant.tile.block_m), np.int32)
        block_experts = np.zeros(blocks, np.int32)
        run(variant.align.source(), variant.align.grid(tokens), ids, sorted_pairs, block_experts, tokens)
        order = [block_experts, sorted_pairs]
    routings = [routing] if variant.epilogue == "weighted" else []
    run(variant.source(), variant.grid(tokens), *given, *weights, *biases, *order, *routings, out, tokens)


def check(run, variant, tokens):
    rng = np.random.default_rng(tokens)
    pairs, experts = tokens * variant.top_k, variant.experts
    rows = variant.n * (2 if variant.epilogue == "gated" else 1)
    weights, w = random_weights(rng, variant.form, experts * rows, variant.k)
    given, x = random_activations(rng, variant.form, tokens if variant.epilogue == "gated" else pairs, variant.k)
    biases = [bits_of(rng.standard_normal(experts * rows), variant.bias)] if variant.bias else []
    # Expert 1 is nobody's; token 1 is padding, as is token 0's last choice.
    ids = rng.choice([0, *range(2, experts)], pairs).astype(np.int32)
    ids[variant.top_k - 1 : 2 * variant.top_k] = -1
    routing = rng.uniform(0, 1, pairs).astype(np.float32)
    out = bits_of(np.full((pairs, variant.n), 77, np.float32), variant.out_type)
    launch(run, variant, given, weights, ids, routing, out, biases)
    got = values_of(out, variant.out_type)
    w = w.reshape(experts, rows, variant.k)
    bias = [values_of(part, variant.bias).reshape(experts, rows) for part in biases]
    expected = grouped_gemm(variant, x, w, ids, routing, *bias)
    assert (got[ids < 0] == 77).all()
    for pair in np.flatnonzero(ids >= 0):
        row = x[pair // variant.top_k if variant.epilogue == "gated" else pair][None]
        y = (row @ w[ids[pair]].T) + (bias[0][ids[pair]] if bias else 0)
        bound = error_bound(variant.form, variant.out_type, row, w[ids[pair]], y)[0]
        if variant.epilogue == "gated":
            (gate, up), (off_gate, off_up) = np.split(y[0], 2), np.split(bound, 2)
            bound = 1.13 * (np.abs(up) + off_up) * off_gate + np.abs(gate) * off_up  # see test_gemm
        assert (np.abs(got[pair] - expected[pair]) <= bound + 1e-6).all()


@pytest.mark.parametrize("variant", [GATED, WEIGHTED], ids=["gated", "weighted"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("direct", [False, True], ids=["sorted", "direct"])
def test_weight_forms(run, variant, form, direct):
    k = max(64, form.group_size)
    check(run, replace(variant, k=k, form=form, direct=direct, out_type="fp32"), 7)


@pytest.mark.parametrize("variant", [GATED, WEIGHTED], ids=["gated", "weighted"])
@pytest.mark.parametrize("options", [
    {"tma": True},
    {"tma": True, "direct": True, "bias": "fp32"},
    {"bias": "bf16", "out_type": "bf16"},
    {"n": 33, "k": 96},
    {"top_k": 3},
])  # fmt: skip
def test_options(run, variant, options):
    check(run, replace(variant, **options), 5)


@pytest.mark.parametrize("variant", [GATED, WEIGHTED], ids=["gated", "weighted"])
def test_many_tokens_take_several_blocks_an_expert(run, variant):
    check(run, replace(variant, tile=replace(TILE, group_m=3)), 60)


@pytest.mark.parametrize("variant", [GATED, WEIGHTED], ids=["gated", "weighted"])
def test_direct_and_sorted_agree_bit_by_bit(run, variant):
    rng = np.random.default_rng(0)
    rows = variant.n * (2 if variant.epilogue == "gated" else 1)
    weights, _ = random_weights(rng, BF16, 5 * rows, variant.k)
    given, _ = random_activations(rng, BF16, 16, variant.k)
    ids, routing = rng.integers(0, 5, 16, np.int32), rng.uniform(0, 1, 16).astype(np.float32)
    outs = np.zeros((2, 16, variant.n), np.float32)
    for out, direct in zip(outs, (False, True), strict=True):
        launch(run, replace(variant, direct=direct), given, weights, ids, routing, out)
    np.testing.assert_array_equal(*outs)


def test_too_many_pairs_for_a_direct_product_are_refused():
    with pytest.raises(ValueError, match="sort them"):
        replace(GATED, direct=True).grid(9)


def test_a_layer_of_experts(run):
    """Router, both products and their sum, as `_experts` of the OpenVINO graph computes them."""
    rng = np.random.default_rng(4)
    tokens, experts, count, hidden, inner = 6, 4, 2, 48, 64
    (x,), values = random_activations(rng, BF16, tokens, hidden)
    logits = rng.standard_normal((tokens, experts)).astype(np.float32)
    (gate_up,), gate_up_values = random_weights(rng, BF16, experts * 2 * inner, hidden)
    (down,), down_values = random_weights(rng, BF16, experts * hidden, inner)
    first = GroupedGemm(experts, count, inner, hidden, BF16, TILE, "bf16", "gated", "silu", direct=True)
    second = GroupedGemm(experts, count, hidden, inner, BF16, TILE, "fp32", "weighted", direct=True)
    router, combine = TopK(experts, count, True), Combine(count, hidden, "fp32", "fp32")
    pairs = tokens * count
    ids, shares = np.zeros((tokens, count), np.int32), np.zeros((tokens, count), np.float32)
    inner_rows, y = np.zeros((pairs, inner), np.uint16), np.zeros((pairs, hidden), np.float32)
    residual = rng.standard_normal((tokens, hidden)).astype(np.float32)
    before = residual.copy()
    run(router.source(), router.grid(tokens), logits, np.zeros(tokens, np.int32), ids, shares, tokens)
    run(first.source(), first.grid(tokens), x, gate_up, ids, inner_rows, tokens)
    run(second.source(), second.grid(tokens), inner_rows, down, ids, shares, y, tokens)
    run(combine.source(), combine.grid(tokens), y, residual, tokens)

    expected_ids, expected_shares = top_k(logits, count, True)
    scattered = np.zeros((tokens, experts), np.float32)
    np.put_along_axis(scattered, expected_ids, expected_shares, 1)
    gates, ups = np.split(np.einsum("th,eih->tei", values, gate_up_values.reshape(experts, 2 * inner, hidden)), 2, 2)
    each = np.einsum("tei,ehi->teh", gates / (1 + np.exp(-gates)) * ups, down_values.reshape(experts, hidden, inner))
    expected = before + np.einsum("teh,te->th", each, scattered)
    np.testing.assert_allclose(residual, expected, atol=0.02)  # the inner rows are bf16: 2^-9 of each of 64 terms
