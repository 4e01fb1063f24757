"""Embedding, norms, quantization and activations compile for every compute capability, at the sizes of real models."""

import pytest

from farrier.plugins.activation import Gated
from farrier.plugins.embedding import Embedding
from farrier.plugins.kernel import compile_kernel
from farrier.plugins.norm import PostNormAdd, Quantize, RmsNorm

VARIANTS = [
    Embedding(128256, 4096, "bf16"),
    Embedding(262144, 2560, "bf16", multiplier=50.5),
    Embedding(151936, 3584, "fp16"),
    Embedding(32000, 16384, "fp32"),
    RmsNorm(2048, 1e-5, "bf16"),
    RmsNorm(4096, 1e-5, "fp16", picks_rows=True),
    RmsNorm(16384, 1e-6, "bf16"),
    PostNormAdd(2560, 1e-6),
    PostNormAdd(5376, 1e-6),
    Gated(14336, "silu", "bf16", "bf16"),
    Gated(10240, "gelu_tanh", "fp16", "fp16"),
]
FP8_VARIANTS = [
    RmsNorm(4096, 1e-5, "fp8e4nv"),
    RmsNorm(3584, 1e-6, "fp8e4nv", picks_rows=True),
    Quantize(14336, "bf16"),
    Quantize(28672, "fp16"),
    Gated(14336, "silu", "bf16", "fp8e4nv"),
    Gated(28672, "gelu_tanh", "fp16", "fp8e4nv"),
]


@pytest.mark.parametrize("compute_capability", [80, 87, 90])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiles(variant, compute_capability):
    assert compile_kernel(variant.source(), compute_capability).shared_bytes <= 16384


@pytest.mark.parametrize("variant", [*VARIANTS, *FP8_VARIANTS], ids=str)
def test_compiles_for_dependent_launch(variant):
    source = type(variant)(**{**vars(variant), "pdl": True}).source()
    compiled = compile_kernel(source, 90)
    assert compiled.pdl
    assert compiled.shared_bytes <= 16384
