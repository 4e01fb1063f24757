"""The kernels of a mixture of experts compile for every compute capability, at the sizes of Mixtral and Qwen3."""

import pytest

from farrier.plugins.gemm_tiles import gemm_tiles
from farrier.plugins.grouped_gemm import GroupedGemm
from farrier.plugins.kernel import compile_kernel
from farrier.plugins.routing import Align, Combine, TopK
from farrier.plugins.weight_form import WeightForm

SHARED_BYTES = {80: 99 << 10, 87: 99 << 10, 90: 227 << 10}
MODELS = {"mixtral": (8, 2, 4096, 14336), "qwen3": (128, 8, 2048, 768)}
FORMS = [
    WeightForm("bf16", "bf16"),
    WeightForm("int8", "bf16"),
    WeightForm("int4", "fp16", 128, zeros=True),
    WeightForm("fp8", "fp8e4nv"),
]


@pytest.mark.parametrize("capability", [80, 87, 90])
@pytest.mark.parametrize("model", MODELS)
def test_routing_compiles(model, capability):
    experts, count, hidden, _ = MODELS[model]
    pdl = capability == 90
    for variant in (
        TopK(experts, count, True, pdl),
        Align(experts, count, 16, pdl),
        Align(experts, count, 128, pdl),
        Combine(count, hidden, "fp32", "fp32", pdl=pdl),
        Combine(count, hidden, "bf16", "bf16", "store", pdl=pdl),
    ):
        assert compile_kernel(variant.source(), capability).shared_bytes <= 16384


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows", [16, 64, 9999])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_compile(form, rows, capability):
    if form.format == "fp8" and capability < 90:
        pytest.skip("no fp8 before 8.9")
    experts, count, hidden, inner = MODELS["qwen3" if rows == 64 else "mixtral"]
    for_hopper = {"tma": capability == 90, "pdl": capability == 90}
    first, second = (gemm_tiles(form, gated, rows, capability)[0] for gated in (True, False))
    direct = rows == 16
    for variant in (
        GroupedGemm(experts, count, inner, hidden, form, first, "bf16", "gated", "silu", direct=direct, **for_hopper),
        GroupedGemm(experts, count, hidden, inner, form, second, "fp32", "weighted", direct=direct, **for_hopper),
    ):
        compiled = compile_kernel(variant.source(), capability)
        assert compiled.shared_bytes <= SHARED_BYTES[capability]
        assert len(compiled.tensor_maps) == for_hopper["tma"]
