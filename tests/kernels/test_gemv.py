"""The streaming product against numpy."""

import numpy as np
import pytest

from farrier.plugins.gemv import Gemv, GemvTile, candidates, gemv_reference, pack_int4, repack_int4
from tests.kernels.conftest import ON_DEVICE
from tests.kernels.interpreter import bfloat16, float8, float8_values, float32

TILE = GemvTile(block_n=2, warps_n=1, warps_k=2, unroll=2)

# Products are exact in fp32, sums are not: relative to the root of the sum of squares, K terms lose about √K · 2⁻²⁴.
# Packed formats round x to 11 bits and sum up to eight products in fp16.
FULL, PACKED = 2e-6, 1e-3


def _stored(values, type_):
    """An array as the kernel reads it, and the values it then has."""
    if type_ == "bf16":
        bits = bfloat16(values)
        return bits, float32(bits)
    stored = values.astype({"fp16": np.float16, "fp32": np.float32}[type_])
    return stored, stored.astype(np.float32)


def _weights(random, variant, count):
    """The kernel's arguments that make up the weights, and their values."""
    shape = (count, variant.k)
    if variant.weight in ("bf16", "fp16"):
        stored, values = _stored(random.standard_normal(shape), variant.weight)
        return [stored], values
    if variant.weight == "fp8":
        stored = float8(random.standard_normal(shape) * 150)
        values = float8_values(stored)
    elif variant.weight == "int8":
        stored = random.integers(-128, 128, shape).astype(np.int8)
        values = stored.astype(np.float32)
    else:
        plain = random.integers(-8, 8, shape).astype(np.int8)
        stored, values = pack_int4(plain), plain.astype(np.float32)
    groups = variant.k // variant.group_size if variant.group_size else 1
    scale, scales = _stored(random.uniform(0.01, 0.03, (count, groups)), variant.scale_type)
    arguments = [stored, scale]
    values = values.reshape(count, groups, -1)
    if variant.zeros:
        zero = random.integers(-8, 8, (count, groups)).astype(np.int8)
        arguments.append(zero)
        values = values - zero[:, :, None]
    return arguments, (values * scales[:, :, None]).reshape(shape)


def _check(run, variant, x_scale=1.0):
    random = np.random.default_rng(7)
    count = variant.n * (2 if variant.epilogue == "gated" else 1)
    present = variant.rows + 3 if variant.row_gather else variant.rows
    x, x_values = _stored(random.standard_normal((present, variant.k)) * x_scale, variant.x_type)
    arguments, given = [x], {}
    if variant.row_gather:
        given["rows"] = random.permutation(present)[: variant.rows].astype(np.int32)
        arguments.append(given["rows"])
    if variant.norm_eps is not None:
        given["norm_weight"] = random.uniform(0.5, 1.5, variant.k).astype(np.float32)
        arguments.append(given["norm_weight"])
    weights, weight_values = _weights(random, variant, count)
    if variant.activation:  # the gate's argument stays where rounding errors are not amplified
        weights, weight_values = _shrunk(weights, weight_values, variant)
    arguments += weights
    if variant.bias:
        bias, given["bias"] = _stored(random.standard_normal(count), variant.bias)
        arguments.append(bias)
    start = random.standard_normal((variant.rows, variant.n))
    out, given["out"] = _stored(start, variant.out_type)
    arguments.append(out)
    expected = gemv_reference(variant, x_values, weight_values, **given)
    run(variant.source(), variant.grid(), *arguments)
    actual = float32(out) if variant.out_type == "bf16" else out.astype(np.float32)
    size = np.sqrt(np.mean(expected.astype(np.float64) ** 2))
    tolerance = {"fp32": 0.0, "fp16": 2**-11, "bf16": 2**-8}[variant.out_type]
    error = FULL if variant.weight in ("bf16", "fp16") else PACKED
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=error * 8 * size)


def _shrunk(weights, values, variant):
    factor = np.float32(2.0**-4)
    if len(weights) > 1:
        weights[1] = _stored(_values(weights[1]) * factor, variant.scale_type)[0]
    else:
        weights[0] = _stored(_values(weights[0]) * factor, variant.weight)[0]
    return weights, values * factor


def _values(stored):
    return float32(stored) if stored.dtype == np.uint16 else stored.astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
def test_bf16(run, rows):
    _check(run, Gemv(rows, 6, 2048, "bf16", "bf16", "bf16", TILE))


def test_fp16(run):
    _check(run, Gemv(2, 6, 1024, "fp16", "fp16", "fp16", TILE))


@pytest.mark.parametrize("k", [32, 96, 160, 512, 1024, 1536, 2880, 3072])
@pytest.mark.parametrize("weight", ["bf16", "fp8"])
def test_any_k(run, weight, k):
    _check(run, Gemv(1, 4, k, weight, "bf16", "fp32", TILE))


@pytest.mark.parametrize(
    "tile",
    [
        GemvTile(1, 1, 1, 1),
        GemvTile(8, 1, 2, 1),
        GemvTile(8, 2, 2, 2),
        GemvTile(16, 4, 1, 4),
        GemvTile(8, 4, 2, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("weight", ["bf16", "fp8"])
def test_any_n_and_tile(run, tile, weight):
    _check(run, Gemv(2, 13, 2048, weight, "bf16", "fp32", tile))


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("weight", ["fp8", "int8"])
def test_scale_per_row(run, weight, rows):
    _check(run, Gemv(rows, 6, 2048, weight, "bf16", "bf16", TILE))


def test_loads_of_eight_bytes(run):
    _check(run, Gemv(1, 6, 1536, "fp8", "fp16", "fp16", GemvTile(2, 1, 2, 2, vector=8)))


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("zeros", [False, True])
def test_int4(run, rows, group_size, zeros):
    _check(run, Gemv(rows, 6, 2560, "int4", "bf16", "bf16", TILE, group_size, zeros=zeros))


@pytest.mark.parametrize("scale_type", ["fp32", "fp16", "bf16"])
def test_groups_of_int8(run, scale_type):
    _check(run, Gemv(1, 6, 1280, "int8", "bf16", "bf16", TILE, 128, scale_type=scale_type, zeros=True))


@pytest.mark.parametrize("weight", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 4])
def test_norm(run, weight, rows):
    group_size = 64 if weight == "int4" else None
    _check(run, Gemv(rows, 4, 1344, weight, "fp32", "bf16", TILE, group_size, norm_eps=1e-5))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("weight", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("warps_n", [1, 2])
def test_gated(run, activation, weight, warps_n):
    tile = GemvTile(2, warps_n, 2, 1)
    group_size = 64 if weight == "int4" else None
    options = {"epilogue": "gated", "activation": activation, "norm_eps": 1e-5, "bias": "bf16"}
    _check(run, Gemv(2, 5, 1088, weight, "fp32", "bf16", tile, group_size, **options))


@pytest.mark.parametrize("weight", ["bf16", "fp8"])
@pytest.mark.parametrize("bias", [None, "bf16", "fp32"])
def test_add(run, weight, bias):
    _check(run, Gemv(4, 5, 1024, weight, "bf16", "fp32", TILE, epilogue="add", bias=bias))


def test_logits_of_picked_rows(run):
    options = {"norm_eps": 1e-6, "softcap": 30.0, "row_gather": True}
    _check(run, Gemv(4, 7, 1024, "bf16", "fp32", "fp32", TILE, **options))


def test_padding_reads_row_0(run):
    variant = Gemv(2, 4, 512, "bf16", "bf16", "fp32", TILE, row_gather=True)
    random = np.random.default_rng(3)
    x, x_values = _stored(random.standard_normal((3, 512)), "bf16")
    weight, weight_values = _stored(random.standard_normal((4, 512)), "bf16")
    rows, out = np.array([2, -1], np.int32), np.zeros((2, 4), np.float32)
    run(variant.source(), variant.grid(), x, rows, weight, out)
    np.testing.assert_allclose(out, x_values[[2, 0]] @ weight_values.T, atol=1e-3)


@pytest.mark.parametrize("weight", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e6, 1e30])
def test_no_magnitude_of_x_overflows_or_vanishes(run, weight, magnitude):
    group_size = 64 if weight == "int4" else None
    _check(run, Gemv(1, 4, 1024, weight, "fp32", "fp32", TILE, group_size), magnitude)


@pytest.mark.parametrize("weight", ["fp8", "int8", "int4"])
def test_greatest_weights_times_greatest_x(run, weight):
    group_size = 32 if weight == "int4" else None
    variant = Gemv(1, 2, 1024, weight, "fp32", "fp32", TILE, group_size)
    stored, value = {
        "fp8": (np.full((2, 1024), 0x7E, np.uint8), 448),
        "int8": (np.full((2, 1024), -128, np.int8), -128),
        "int4": (pack_int4(np.full((2, 1024), -8, np.int8)), -8),
    }[weight]
    x = np.full((1, 1024), 1.9990234375 * 2.0**20, np.float32)
    out = np.zeros((1, 2), np.float32)
    run(variant.source(), variant.grid(), x, stored, np.ones((2, 32), np.float32), out)
    np.testing.assert_allclose(out, 1024 * value * x[0, 0], rtol=1e-3)


def test_zero_x_gives_zero(run):
    variant = Gemv(1, 2, 512, "fp8", "bf16", "fp32", TILE)
    out = np.ones((1, 2), np.float32)
    weight, scale = np.full((2, 512), 0x7E, np.uint8), np.ones((2, 1), np.float32)
    run(variant.source(), variant.grid(), np.zeros((1, 512), np.uint16), weight, scale, out)
    assert not out.any()


def test_repacking_int4():
    values = np.arange(64).reshape(2, 32).astype(np.int8) % 16 - 8
    packed = (values[:, 0::2] & 15 | (values[:, 1::2] & 15) << 4).astype(np.uint8)
    np.testing.assert_array_equal(repack_int4(packed), pack_int4(values))


@pytest.mark.skipif(not ON_DEVICE, reason="too many products for the interpreter")
@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("weight", ["bf16", "fp8", "int8", "int4"])
@pytest.mark.parametrize("gated", [False, True])
def test_every_candidate_on_the_device(run, weight, rows, gated):
    group_size = 128 if weight == "int4" else None
    options = {"epilogue": "gated", "activation": "silu"} if gated else {}
    for k in (4096, 14336):
        for tile in candidates(rows, 515, k, weight, gated):
            variant = Gemv(rows, 515, k, weight, "fp32", "fp32", tile, group_size, norm_eps=1e-5, **options)
            _check(run, variant)


@pytest.mark.skipif(not ON_DEVICE, reason="too large for the interpreter")
@pytest.mark.parametrize("weight", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (128256, 2048)])
def test_real_sizes_on_the_device(run, weight, n, k):
    tile = candidates(1, n, k, weight)[0]
    _check(run, Gemv(1, n, k, weight, "bf16", "fp32", tile, 128 if weight == "int4" else None, epilogue="add"))
