"""Gated activations against numpy."""

import numpy as np
import pytest

from farrier.plugins.activation import Gated, gated
from tests.kernels.interpreter import bfloat16, float32
from tests.kernels.test_norm import BF16, FP16, assert_fp8_close


@pytest.mark.parametrize("width", [96, 160, 2880])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("in_type", "out_type"), [("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp8e4nv")])
def test_gated(run, width, activation, in_type, out_type):
    rng = np.random.default_rng(width)
    x = (3 * rng.standard_normal((3, 2 * width))).astype(np.float32)
    x[1] *= 10
    bits = x.astype(np.float16) if in_type == "fp16" else bfloat16(x)
    expected = gated(bits.astype(np.float32) if in_type == "fp16" else float32(bits), activation)
    variant = Gated(width, activation, in_type, out_type)
    grid = variant.grid(len(x))
    if out_type == "fp8e4nv":
        out, scale = np.zeros(expected.shape, np.uint8), np.zeros(3, np.float32)
        run(variant.source(), grid, bits, out, scale)
        assert_fp8_close(out, scale, expected)
    elif out_type == "fp16":
        out = np.zeros(expected.shape, np.float16)
        run(variant.source(), grid, bits, out)
        np.testing.assert_allclose(out.astype(np.float32), expected, **FP16)
    else:
        out = np.zeros(expected.shape, np.uint16)
        run(variant.source(), grid, bits, out)
        np.testing.assert_allclose(float32(out), expected, **BF16)
