"""Matrix products compile for every compute capability, at the sizes of real models."""

from dataclasses import replace

import pytest

from farrier.plugins.gemm import Gemm
from farrier.plugins.gemm_tiles import gemm_tiles
from farrier.plugins.kernel import compile_kernel
from farrier.plugins.weight_form import WeightForm

SHARED_BYTES = {80: 99 << 10, 87: 99 << 10, 90: 227 << 10}
BF16 = WeightForm("bf16", "bf16")
FP8 = WeightForm("fp8", "fp8e4nv")
INT8 = WeightForm("int8", "bf16")
INT4 = WeightForm("int4", "bf16", 128, scale_type="bf16")
ZEROS = WeightForm("int4", "fp16", 32, zeros=True)


def variant(rows, capability, n, k, form, out_type="bf16", epilogue="store", **options):
    tile = gemm_tiles(form, epilogue == "gated", rows, capability)[0]
    activation = options.pop("activation", "silu" if epilogue == "gated" else None)
    return Gemm(n, k, form, tile, out_type, epilogue, activation, **options)


# Llama 3 8B and 1B, Qwen 2.5, Gemma 2.
SHAPES = [
    (16, 6144, 4096, BF16, {}),
    (64, 4096, 4096, BF16, {"out_type": "fp32", "epilogue": "add"}),
    (9999, 14336, 4096, BF16, {"epilogue": "gated"}),
    (256, 4608, 3584, BF16, {"bias": "bf16"}),
    (32, 256000, 2304, WeightForm("fp16", "fp16"), {"out_type": "fp32", "softcap": 30.0}),
    (128, 9216, 2304, BF16, {"epilogue": "gated", "activation": "gelu_tanh"}),
    (16, 128, 2048, WeightForm("fp32", "bf16"), {"out_type": "fp32"}),
    (64, 2048, 8192, INT8, {"out_type": "fp32", "epilogue": "add"}),
    (9999, 8192, 2048, INT8, {"epilogue": "gated"}),
    (16, 14336, 4096, INT4, {"epilogue": "gated"}),
    (256, 4096, 14336, INT4, {"out_type": "fp32", "epilogue": "add"}),
    (64, 18944, 3584, ZEROS, {"out_type": "fp16", "epilogue": "gated"}),
    (9999, 3584, 18944, ZEROS, {"out_type": "fp32", "epilogue": "add"}),
]
FP8_SHAPES = [
    (16, 6144, 4096, FP8, {}),
    (64, 4096, 14336, FP8, {"out_type": "fp32", "epilogue": "add"}),
    (9999, 14336, 4096, FP8, {"epilogue": "gated"}),
    (16, 6144, 4096, WeightForm("fp8", "bf16"), {}),
    (64, 4096, 4096, WeightForm("fp8", "bf16", 128), {"out_type": "fp32", "epilogue": "add"}),
]


@pytest.mark.parametrize("capability", [80, 87])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiles(shape, capability):
    rows, n, k, form, options = shape
    compiled = compile_kernel(variant(rows, capability, n, k, form, **options).source(), capability)
    assert compiled.shared_bytes <= SHARED_BYTES[capability]


@pytest.mark.parametrize("shape", [*SHAPES, *FP8_SHAPES], ids=str)
def test_compiles_with_descriptors_and_dependent_launch(shape):
    rows, n, k, form, options = shape
    compiled = compile_kernel(variant(rows, 90, n, k, form, **options, tma=True, pdl=True).source(), 90)
    assert compiled.shared_bytes <= SHARED_BYTES[90]
    assert len(compiled.tensor_maps) == 2
    assert compiled.pdl


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], FP8_SHAPES[0]], ids=str)
def test_compiles_with_pointers_for_hopper(shape):
    rows, n, k, form, options = shape
    compiled = compile_kernel(variant(rows, 90, n, k, form, **options).source(), 90)
    assert compiled.shared_bytes <= SHARED_BYTES[90]
    assert compiled.tensor_maps == ()


def test_sums_of_bytes_that_tma_does_not_take():
    odd = variant(64, 90, 1000, 1001, BF16)
    assert compile_kernel(odd.source(), 90).tensor_maps == ()
    with pytest.raises(ValueError, match="16 bytes"):
        replace(odd, tma=True)


@pytest.mark.parametrize("capability", [80, 87, 90])
@pytest.mark.parametrize("form", [BF16, INT8, INT4, ZEROS, FP8, WeightForm("fp8", "fp16")], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_tiles_are_few_and_fit(form, gated, capability):
    if form.format == "fp8" and capability < 90:
        with pytest.raises(ValueError, match="no fp8"):
            gemm_tiles(form, gated, 64, capability)
        return
    for rows in (9, 16, 17, 32, 64, 128, 256, 257, 8192):
        tiles = gemm_tiles(form, gated, rows, capability)
        assert 3 <= len(tiles) <= 24
        assert len(set(tiles)) == len(tiles)
        for tile in tiles:
            assert form.shared_bytes(tile, 2 if gated else 1) < SHARED_BYTES[capability]
