from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from farrier.targets.float8 import is_nan
from farrier.targets.quantize import Quantization, dequantize, group_size_for, pack_int4, quantize, unpack_int4

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
INT8, FP8 = Quantization("int8"), Quantization("fp8")
TINY = 1e-35
"""Below about this, steps are no normal numbers and values become zero."""


def matrices(columns: int) -> st.SearchStrategy[npt.NDArray[np.float32]]:
    return st.integers(1, 6).flatmap(lambda rows: arrays(np.float32, (rows, columns), elements=FLOATS))


@given(matrices(24))
def test_int8_is_off_by_half_a_step_at_most(values: npt.NDArray[np.float32]) -> None:
    stored, scale = quantize(values, INT8)
    assert stored.dtype == np.int8
    assert scale.shape == (len(values),)
    assert np.abs(stored.astype(int)).max() <= 127
    error = np.abs(dequantize(stored, scale, INT8) - values)
    assert (error <= 0.501 * np.abs(values).max(axis=1, keepdims=True) / 127 + TINY).all()


@given(matrices(24))
def test_fp8_is_off_by_a_sixteenth_at_most(values: npt.NDArray[np.float32]) -> None:
    """Or, below the smallest normal number, by half of the smallest step."""
    stored, scale = quantize(values, FP8)
    assert (stored.dtype, stored.shape) == (np.uint8, values.shape)
    assert scale.shape == (len(values),)
    assert not is_nan(stored).any()
    error = np.abs(dequantize(stored, scale, FP8) - values)
    assert (error <= np.maximum(1.001 * np.abs(values) / 16, 1.001 * scale[:, None] * 2.0**-10) + TINY).all()


def test_fp8_reaches_its_largest_number_in_every_row() -> None:
    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    stored, _ = quantize(values, FP8)
    assert ((stored & 0x7F) == 0x7E).any(axis=1).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_zero_points_are_taken_off_before_the_scale(kind: Literal["int8", "int4"]) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(-8, 8, (3, 8)).astype(np.int8)
    scale, zero = rng.standard_normal((3, 2)).astype(np.float32), rng.integers(-8, 8, (3, 2)).astype(np.int8)
    stored = pack_int4(numbers.view(np.uint8)) if kind == "int4" else numbers
    expected = np.repeat(scale, 4, 1) * (numbers.astype(np.float32) - np.repeat(zero, 4, 1))
    np.testing.assert_array_equal(dequantize(stored, scale, Quantization(kind, 4, True), zero), expected)


@given(matrices(96))
def test_int4_is_off_by_no_more_than_the_plain_scale(values: npt.NDArray[np.float32]) -> None:
    """In each group's squared error, as the scale that puts the largest magnitude at -8 is one of those tried."""
    quantization = Quantization("int4", 32)
    packed, scale = quantize(values, quantization)
    assert (packed.dtype, packed.shape) == (np.uint8, (len(values), 48))
    assert scale.shape == (len(values), 3)
    groups = values.reshape(-1, 32)
    errors = np.square(dequantize(packed, scale, quantization) - values).reshape(-1, 32).sum(axis=1)
    steps = np.abs(groups).max(axis=1) / 8
    # At most half a step each, but a whole one where a value opposite to the largest would need +8.
    assert (errors <= 1.01 * 32 * np.square(steps) + TINY).all()


def test_int4_beats_scaling_by_the_largest_magnitude() -> None:
    values = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    quantization = Quantization("int4", 128)
    ours = np.square(dequantize(*quantize(values, quantization), quantization) - values).mean()
    step = np.abs(values.reshape(64, 8, 128)).max(axis=2, keepdims=True) / 7
    plain = np.square(np.rint(values.reshape(64, 8, 128) / step) * step - values.reshape(64, 8, 128)).mean()
    assert ours < 0.75 * plain


def test_int4_packs_the_lower_column_into_the_lower_bits() -> None:
    levels = np.tile(np.arange(-8, 8, dtype=np.float32), 2)[None]
    packed, scale = quantize(levels, Quantization("int4", 32))
    assert scale.tolist() == [[1.0]]
    assert packed[0, :8].tolist() == [0x98, 0xBA, 0xDC, 0xFE, 0x10, 0x32, 0x54, 0x76]
    np.testing.assert_array_equal(unpack_int4(packed), levels.astype(np.int8))


@given(matrices(64), st.sampled_from([INT8, FP8, Quantization("int4", 32), Quantization("int4", 64)]))
def test_rows_do_not_depend_on_each_other(values: npt.NDArray[np.float32], quantization: Quantization) -> None:
    whole = quantize(values, quantization)
    slices = [quantize(values[row : row + 1], quantization) for row in range(len(values))]
    for part in (0, 1):
        np.testing.assert_array_equal(whole[part], np.concatenate([piece[part] for piece in slices]))


@pytest.mark.parametrize("quantization", [INT8, FP8, Quantization("int4", 32)])
def test_zeros_and_denormals_become_zeros(quantization: Quantization) -> None:
    values = np.zeros((2, 32), np.float32)
    values[1] = 1e-44
    stored, scale = quantize(values, quantization)
    assert np.isfinite(scale).all()
    assert not dequantize(stored, scale, quantization).any()


@pytest.mark.parametrize("quantization", [INT8, FP8, Quantization("int4", 32)])
@given(arrays(np.float32, (2, 32), elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_whatever_is_finite_stays_finite_and_near(quantization: Quantization, values: npt.NDArray[np.float32]) -> None:
    stored, scale = quantize(values, quantization)
    error = np.abs(dequantize(stored, scale, quantization).astype(np.float64) - values)
    assert (error <= 0.26 * np.abs(values).max(axis=1, keepdims=True) + TINY).all()


@pytest.mark.parametrize(
    ("columns", "wanted", "size"), [(4096, 128, 128), (11008, 128, 128), (96, 128, 32), (192, 128, 64), (80, 128, None)]
)
def test_group_sizes_fall_back_to_a_divisor(columns: int, wanted: int, size: int | None) -> None:
    assert group_size_for(columns, wanted) == size


@pytest.mark.parametrize(("kind", "size"), [("int8", 0), ("fp8", -1), ("int4", None), ("int4", 0), ("int4", -32)])
def test_quantizations_that_make_no_sense(kind: str, size: int | None) -> None:
    with pytest.raises(ValueError, match=kind):
        Quantization(kind, size)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "size"), [("fp8", 32), ("int8", None)])
def test_zero_points_that_make_no_sense(kind: str, size: int | None) -> None:
    with pytest.raises(ValueError, match=rf"{kind}.*zero points"):
        Quantization(kind, size, zero_points=True)  # type: ignore[arg-type]
