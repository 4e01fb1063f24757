"""Random weights in every form, and numbers as their bits."""

from typing import Any

import numpy as np

from farrier.plugins.weight_form import WeightForm, unpacked
from tests.kernels.interpreter import bfloat16, float32

FP8_VALUES = unpacked(WeightForm("fp8", "bf16"), np.arange(127, dtype=np.uint8)[None], None, None)[0]


def fp8(values: Any) -> Any:
    """The bits of the nearest e4m3 values."""
    bits = np.abs(np.abs(values)[..., None] - FP8_VALUES).argmin(-1)
    return (bits | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def bits_of(values: Any, type_: str) -> Any:
    """float32 values rounded to bf16, fp16 or fp32, as an argument of a kernel."""
    return bfloat16(values) if type_ == "bf16" else values.astype(np.float16 if type_ == "fp16" else np.float32)


def values_of(bits: Any, type_: str) -> Any:
    """The other way round."""
    return float32(bits) if type_ == "bf16" else bits.astype(np.float32)


def random_activations(rng: Any, form: WeightForm, m: int, k: int) -> tuple[list[Any], Any]:
    """x and its scale as arguments, and what they stand for [m, k]."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    if form.x_type != "fp8e4nv":
        x = bits_of(x, form.x_type)
        return [x], values_of(x, form.x_type)
    scale = (np.abs(x).max(1) / 448).astype(np.float32)
    x = fp8(x / scale[:, None])
    return [x, scale], unpacked(WeightForm("fp8", "bf16"), x, scale, None)


def random_weights(rng: Any, form: WeightForm, n: int, k: int) -> tuple[list[Any], Any]:
    """weight, scale and zero as arguments as far as the form has them, and what they stand for [n, k]."""
    w = rng.standard_normal((n, k)).astype(np.float32) / np.sqrt(k)
    if form.format in ("fp32", "bf16", "fp16"):
        weight = bits_of(w, form.format)
        return [weight], values_of(weight, form.format)
    scale, zero = rng.uniform(0.5, 1.5, (n, k // (form.group_size or k))).astype(np.float32), None
    if not form.group_size:
        scale = scale[:, 0].copy()
    if form.zeros:
        zero = rng.integers(-8, 8, scale.shape, np.int8)
    if form.format == "fp8":
        weight = fp8(w)
    elif form.format == "int8":
        weight, scale = rng.integers(-128, 128, (n, k), np.int8), scale / 128
    else:
        weight, scale = rng.integers(0, 256, (n, k // 2), np.uint8), scale / 8
    given = scale if not form.group_size else bits_of(scale, form.scale_type)
    rounded = scale if not form.group_size else values_of(given, form.scale_type)
    return [weight, given, *([] if zero is None else [zero])], unpacked(form, weight, rounded, zero)


def error_bound(form: WeightForm, out_type: str, x: Any, weight: Any, y: Any) -> Any:
    """How far y [M, n] may be off: float32 sums in another order; group-wise weights rounded to x's type, half a unit
    in the last of 8 (bf16) or 11 (fp16) bits; and y rounded so."""
    unit = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-22}
    each = 2.0**-20 + (unit[form.x_type] if form.group_size else 0)
    return each * (np.abs(x) @ np.abs(weight).T) + unit[out_type] * np.abs(y) + 1e-6
