"""float8 e4m3 (the OCP variant without infinities, largest value 448) in numpy, which has no such type: its bits are
kept as uint8."""

import numpy as np
import numpy.typing as npt

LARGEST = 448.0

_SMALLEST_NORMAL = 2.0**-6
_SUBNORMAL_STEP = 2.0**-9
_NAN = 0x7F


def to_float8(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Bits of the nearest float8 (ties to even) of each float32; beyond 448 it is 448, NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    sign = (values.view(np.uint32) >> np.uint32(24)).astype(np.uint8) & np.uint8(0x80)
    magnitude = np.minimum(np.abs(values), np.float32(LARGEST))
    bits = magnitude.view(np.uint32)
    # The upper 12 bits are float32's exponent, whose bias is 120 more than float8's, and three bits of mantissa.
    rounded = (bits + (np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1)))) >> np.uint32(20)
    with np.errstate(invalid="ignore"):  # NaN, which is replaced below
        subnormal = np.rint(magnitude / np.float32(_SUBNORMAL_STEP)).astype(np.uint32)
    code = np.where(magnitude < np.float32(_SMALLEST_NORMAL), subnormal, rounded - np.uint32(120 << 3))
    code[np.isnan(values)] = _NAN
    return code.astype(np.uint8) | sign


def from_float8(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The float32 values, exact, of float8 bits."""
    return _VALUES[bits]


def is_nan(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    result: npt.NDArray[np.bool_] = (bits & np.uint8(0x7F)) == _NAN
    return result


def _values() -> npt.NDArray[np.float32]:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * _SUBNORMAL_STEP, (8 + mantissa) * 2.0 ** (exponent - 10))
    magnitude[is_nan(codes.astype(np.uint8))] = np.nan
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


_VALUES = _values()
