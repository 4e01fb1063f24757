"""The streaming product against numpy."""

import numpy as np
import pytest

from farrier.plugins.gemv import Gemv, GemvTile, gemv_reference, pack_int4
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
    size = np.sqrt(np.mean(expected**2))
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
