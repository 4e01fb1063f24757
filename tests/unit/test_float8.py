import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from farrier.targets.float8 import LARGEST, from_float8, is_nan, to_float8

EVERY = np.arange(256, dtype=np.uint8)


def by_the_definition(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def nearest(value: float) -> int:
    """The code nearest to a finite value, the even one of two."""
    codes = range(128) if not np.signbit(value) else range(128, 256)
    finite = [code for code in codes if not np.isnan(by_the_definition(code))]
    return min(finite, key=lambda code: (abs(by_the_definition(code) - value), code & 1))


def critical_values() -> npt.NDArray[np.float32]:
    """Every float8, every middle between two, and their neighbours in float32."""
    numbers = np.unique(from_float8(EVERY[~is_nan(EVERY)]))
    middles = (numbers[1:] + numbers[:-1]) / np.float32(2)
    exact = np.concatenate([numbers, middles, [np.float32(-0.0)]])
    return np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])


def test_every_code_means_what_the_definition_says() -> None:
    np.testing.assert_array_equal(from_float8(EVERY), np.array([by_the_definition(code) for code in range(256)], "f4"))


def test_every_code_survives() -> None:
    numbers = EVERY[~is_nan(EVERY)]
    np.testing.assert_array_equal(to_float8(from_float8(numbers)), numbers)


def test_rounding_at_every_boundary() -> None:
    values = critical_values()
    assert to_float8(values).tolist() == [nearest(float(value)) for value in values]


@given(st.floats(-1e4, 1e4, width=32))
def test_rounding_to_the_nearest(value: float) -> None:
    assert to_float8(np.array([value], np.float32)).tolist() == [nearest(value)]


def test_what_is_too_large_becomes_the_largest_and_nan_stays_nan() -> None:
    values = np.array([449, 464, 465, 3e38, np.inf, -np.inf, -500], np.float32)
    assert from_float8(to_float8(values)).tolist() == [LARGEST] * 5 + [-LARGEST] * 2
    assert is_nan(to_float8(np.array([np.nan, -np.nan], np.float32))).all()


def test_every_value_of_a_float16_is_rounded_as_torch_does() -> None:
    torch = pytest.importorskip("torch", reason="torch's conversion is the judge")
    values = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    values = np.concatenate([values[np.isfinite(values)], critical_values()])
    expected = torch.from_numpy(np.clip(values, -LARGEST, LARGEST)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(to_float8(values), expected)


@given(arrays(np.uint32, st.integers(1, 200), elements=st.integers(0, 2**32 - 1)))
def test_rounding_is_that_of_torch(bits: npt.NDArray[np.uint32]) -> None:
    torch = pytest.importorskip("torch", reason="torch's conversion is the judge")
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(np.clip(values, -LARGEST, LARGEST)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(to_float8(values), expected)
