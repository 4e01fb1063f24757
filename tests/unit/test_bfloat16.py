import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from farrier.targets.bfloat16 import from_bfloat16, to_bfloat16

torch = pytest.importorskip("torch", reason="torch's conversion is the judge")


@given(arrays(np.uint32, st.integers(1, 200), elements=st.integers(0, 2**32 - 1)))
def test_rounding_is_that_of_torch(bits: npt.NDArray[np.uint32]) -> None:
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    ours = from_bfloat16(to_bfloat16(values))
    np.testing.assert_array_equal(ours, expected.float().numpy())


def test_ties_go_to_even_and_the_largest_round_to_infinity() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF7FFFFF, 0x00008000, 0x80000001], np.uint32)
    expected = [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x0000, 0x8000]
    assert to_bfloat16(bits.view(np.float32)).tolist() == expected


@pytest.mark.parametrize("bits", [0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7FFF8000])
def test_nan_stays_nan_of_its_sign(bits: int) -> None:
    (rounded,) = to_bfloat16(np.array([bits], np.uint32).view(np.float32))
    assert np.isnan(from_bfloat16(np.array([rounded])))[0]
    assert rounded >> 15 == bits >> 31


def test_every_bfloat16_survives() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    numbers = every[~np.isnan(from_bfloat16(every))]
    np.testing.assert_array_equal(to_bfloat16(from_bfloat16(numbers)), numbers)
