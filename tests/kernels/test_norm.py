"""Norms and quantization against numpy."""

import numpy as np
import pytest

from farrier.plugins.norm import PostNormAdd, Quantize, RmsNorm, rms_norm
from farrier.plugins.rowwise import row_scales
from tests.kernels.interpreter import bfloat16, float8_values, float32

# Half a step of the output type, and a little for the order of summation.
BF16 = {"rtol": 2**-8, "atol": 1e-6}
FP16 = {"rtol": 2**-10, "atol": 1e-6}


def assert_fp8_close(bits, scale, expected):
    """Within half a step of e4m3 (2**-4 of the value, at least 2**-10 of the scale), and the rounding of 1 / scale."""
    np.testing.assert_allclose(scale, row_scales(expected), rtol=1e-5)
    error = np.abs(float8_values(bits) * scale[:, None] - expected)
    assert (error <= np.abs(expected) * (2**-4 + 1e-5) + scale[:, None] * 2**-10 * 1.001).all()


@pytest.mark.parametrize("hidden", [96, 128, 160, 2880])
@pytest.mark.parametrize("out_type", ["bf16", "fp16", "fp8e4nv"])
@pytest.mark.parametrize("picks_rows", [False, True])
def test_rms_norm(run, hidden, out_type, picks_rows):
    rng = np.random.default_rng(hidden)
    x = (3 * rng.standard_normal((5, hidden))).astype(np.float32)
    x[2] = 0
    x[3] *= 1e4
    weight = rng.standard_normal(hidden).astype(np.float32)
    rows = np.array([4, 3, -1, 2], np.int32) if picks_rows else np.arange(5, dtype=np.int32)
    expected = rms_norm(x, weight, 1e-5)[np.maximum(rows, 0)]
    variant = RmsNorm(hidden, 1e-5, out_type, picks_rows)
    given = [x, rows] if picks_rows else [x]
    if out_type == "fp8e4nv":
        out, scale = np.zeros(expected.shape, np.uint8), np.zeros(len(rows), np.float32)
        run(variant.source(), variant.grid(len(rows)), *given, weight, out, scale)
        assert_fp8_close(out, scale, expected)
        return
    out = np.zeros(expected.shape, np.float16 if out_type == "fp16" else np.uint16)
    run(variant.source(), variant.grid(len(rows)), *given, weight, out)
    if out_type == "fp16":
        np.testing.assert_allclose(out.astype(np.float32), expected, **FP16)
    else:
        np.testing.assert_allclose(float32(out), expected, **BF16)


@pytest.mark.parametrize("hidden", [96, 2048])
def test_post_norm_add(run, hidden):
    rng = np.random.default_rng(hidden)
    y, residual = rng.standard_normal((2, 3, hidden)).astype(np.float32)
    weight = rng.standard_normal(hidden).astype(np.float32)
    expected = residual + rms_norm(y, weight, 1e-6)
    variant = PostNormAdd(hidden, 1e-6)
    residual = residual.copy()
    run(variant.source(), variant.grid(3), y.copy(), weight, residual)
    np.testing.assert_allclose(residual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [96, 14336])
@pytest.mark.parametrize("in_type", ["bf16", "fp16"])
def test_quantize(run, width, in_type):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((4, width)).astype(np.float32) * np.array([1, 1e-3, 0, 1e3], np.float32)[:, None]
    bits = x.astype(np.float16) if in_type == "fp16" else bfloat16(x)
    exact = bits.astype(np.float32) if in_type == "fp16" else float32(bits)
    out, scale = np.zeros(x.shape, np.uint8), np.zeros(4, np.float32)
    variant = Quantize(width, in_type)
    run(variant.source(), variant.grid(4), bits, out, scale)
    assert_fp8_close(out, scale, exact)
    assert not float8_values(out[2]).any()
