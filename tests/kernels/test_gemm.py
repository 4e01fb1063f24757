"""Matrix products of many rows against numpy."""

from dataclasses import replace

import numpy as np
import pytest

from farrier.plugins.gemm import Gemm, gemm
from farrier.plugins.weight_form import GemmTile, WeightForm
from tests.kernels.weights import bits_of, error_bound, random_activations, random_weights, values_of

BF16 = WeightForm("bf16", "bf16")
FORMS = [
    BF16,
    WeightForm("fp16", "fp16"),
    WeightForm("fp32", "bf16"),
    WeightForm("fp8", "bf16"),
    WeightForm("fp8", "fp16"),
    WeightForm("fp8", "fp8e4nv"),
    WeightForm("fp8", "bf16", 64),
    WeightForm("int8", "bf16"),
    WeightForm("int8", "fp16", 64, zeros=True),
    WeightForm("int4", "bf16", 32),
    WeightForm("int4", "fp16", 32, zeros=True, scale_type="fp16"),
    WeightForm("int4", "bf16", 128, zeros=True, scale_type="bf16"),
]
TILE = GemmTile(16, 32, 64, 4, 2)


def check(run, variant, rows, seed=0):
    rng = np.random.default_rng(seed)
    gates = 2 if variant.epilogue == "gated" else 1
    weights, w = random_weights(rng, variant.form, gates * variant.n, variant.k)
    given, x = random_activations(rng, variant.form, rows, variant.k)
    biases = [bits_of(rng.standard_normal(gates * variant.n), variant.bias)] if variant.bias else []
    bias = [values_of(part, variant.bias) for part in biases]
    before = rng.standard_normal((rows, variant.n)).astype(np.float32)
    out = bits_of(before, variant.out_type)
    run(variant.source(), variant.grid(rows), *given, *weights, *biases, out, rows)
    y = gemm(replace(variant, epilogue="store", activation=None, softcap=None), x, w, *bias)
    bound = error_bound(variant.form, variant.out_type, x, w, y)
    if gates == 2:
        # Activations are no steeper than 1.13, and no larger than their argument.
        gate, up = np.split(y, 2, 1)
        off_gate, off_up = np.split(bound, 2, 1)
        bound = 1.13 * (np.abs(up) + off_up) * off_gate + np.abs(gate) * off_up
    expected = gemm(variant, x, w, *bias) + (before if variant.epilogue == "add" else 0)
    got = values_of(out, variant.out_type)
    assert (np.abs(got - expected) <= bound + 1e-6).all(), np.abs(got - expected).max()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
def test_weight_forms(run, form, tma):
    check(run, Gemm(40, 128, form, TILE, "fp32", tma=tma), 19)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gated(run, form):
    check(run, Gemm(24, 128, form, replace(TILE, block_n=16), "fp32", "gated", "silu", bias="fp32"), 17)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("k", [96, 160])
@pytest.mark.parametrize("form", [BF16, FORMS[5], FORMS[7], FORMS[10]], ids=str)
def test_columns_that_are_no_whole_number_of_blocks(run, form, k, tma):
    check(run, Gemm(33, k, form, TILE, "fp32", tma=tma), 9)


def test_columns_that_are_a_multiple_of_nothing(run):
    check(run, Gemm(33, 101, BF16, TILE, "fp32"), 9)


@pytest.mark.parametrize(
    ("epilogue", "out_type", "options"),
    [
        ("store", "bf16", {"bias": "bf16"}),
        ("store", "fp16", {"softcap": 0.5}),
        ("add", "fp32", {"bias": "fp32"}),
        ("add", "fp32", {"tma": True}),
        ("gated", "bf16", {"activation": "gelu_tanh"}),
        ("gated", "bf16", {"activation": "gelu_tanh", "bias": "fp32", "tma": True}),
    ],
)
def test_epilogues(run, epilogue, out_type, options):
    form = WeightForm("fp16", "fp16") if out_type == "fp16" else BF16
    check(run, Gemm(40, 64, form, TILE, out_type, epilogue, **options), 20)


@pytest.mark.parametrize("rows", [1, 16, 150])
@pytest.mark.parametrize("group_m", [1, 3, 8])
def test_every_tile_is_computed_in_any_order(run, rows, group_m):
    check(run, Gemm(70, 64, BF16, replace(TILE, group_m=group_m), "fp32"), rows)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("form", [BF16, FORMS[5], FORMS[9]], ids=str)
def test_a_row_does_not_depend_on_the_others(run, form, tma):
    rng = np.random.default_rng(1)
    variant = Gemm(40, 128, form, TILE, "fp32", tma=tma)
    weights, _ = random_weights(rng, form, 40, 128)
    given, _ = random_activations(rng, form, 37, 128)

    def product_of(rows):
        out = np.zeros((len(rows), 40), np.float32)
        run(variant.source(), variant.grid(len(rows)), *(part[rows].copy() for part in given), *weights, out, len(rows))
        return out

    among = product_of(np.arange(37))
    for row in (0, 20, 36):
        np.testing.assert_array_equal(product_of(np.array([row]))[0], among[row])
    np.testing.assert_array_equal(product_of(np.arange(37)[::-1])[::-1], among)


def test_rows_past_the_last_may_hold_anything(run):
    """With TMA x may be a whole buffer, of which M rows count."""
    rng = np.random.default_rng(2)
    variant = Gemm(40, 64, BF16, TILE, "fp32", tma=True)
    (weight,), w = random_weights(rng, BF16, 40, 64)
    (x,), values = random_activations(rng, BF16, 32, 64)
    x[19:] = 0x7FC0  # NaN
    out = np.full((32, 40), 7, np.float32)
    run(variant.source(), variant.grid(19), x, weight, out, 19)
    np.testing.assert_allclose(out[:19], values[:19] @ w.T, atol=1e-5)
    assert (out[19:] == 7).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WeightForm("int8", "fp8e4nv"), "need fp8 weights"),
        (lambda: WeightForm("bf16", "fp16"), "need bf16 activations"),
        (lambda: WeightForm("int4", "bf16"), "need groups"),
        (lambda: WeightForm("int4", "bf16", 48), "power of two"),
        (lambda: WeightForm("int8", "bf16", zeros=True), "Zero points"),
        (lambda: Gemm(40, 100, FORMS[9], TILE, "fp32"), "whole number of groups"),
        (lambda: Gemm(40, 100, BF16, TILE, "fp32", tma=True), "16 bytes"),
        (lambda: Gemm(40, 64, BF16, TILE, "bf16", "add"), "residual"),
        (lambda: Gemm(40, 64, BF16, TILE, "bf16", "gated"), "activation"),
        (lambda: Gemm(40, 64, BF16, TILE, "fp32", "add", softcap=30.0), "soft cap"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
