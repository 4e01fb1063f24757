"""Attention and KV append compile for every compute capability, at the sizes of real models, and fit its memory."""

from dataclasses import replace

import pytest

from farrier.plugins.attention import AttentionShape, DecodeAttention, PrefillAttention
from farrier.plugins.kernel import compile_kernel
from farrier.plugins.rope import RopeAppend

SHARED_BYTES = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10}


def shape(heads, kv_heads, head_dim, **options):
    return AttentionShape(heads, kv_heads, head_dim, head_dim**-0.5, **options)


LAYERS = {
    "llama-3.1-8b": (shape(32, 8, 128), 128, None),
    "llama-3.2-1b": (shape(32, 8, 64, act_type="fp16", kv_type="fp16"), 64, None),
    "qwen3-8b": (shape(32, 8, 128), 128, 1e-6),
    "qwen2.5-7b": (shape(28, 4, 128), 128, None),
    "gemma-2-9b": (shape(16, 8, 256, window=4096, softcap=50.0), 256, None),
    "phi-3-mini": (shape(32, 32, 96, window=2047), 96, None),
    "phi-2": (shape(32, 32, 80), 32, None),
}
SHAPES = [(1, 300), (1, 4096), (64, 300)]


def rope(layer, **options):
    of, rotary_dim, eps = LAYERS[layer]
    types = {"qkv_type": of.act_type, "act_type": of.act_type, "kv_type": of.kv_type, **options}
    return RopeAppend(of.num_heads, of.num_kv_heads, of.head_dim, rotary_dim, eps, **types)


def decode(layer, batch, context, **options):
    of, rotary_dim, eps = LAYERS[layer]
    return DecodeAttention(of, rotary_dim, eps, of.act_type, **options).default(batch, context)


@pytest.mark.parametrize(
    ("layer", "compute_capability"),
    [
        *((layer, 90) for layer in LAYERS),
        ("llama-3.1-8b", 80),
        ("gemma-2-9b", 80),
        ("llama-3.2-1b", 87),
        ("qwen3-8b", 87),
    ],
)
def test_compiles(layer, compute_capability):
    sources = [
        rope(layer).source(),
        decode(layer, *SHAPES[list(LAYERS).index(layer) % 3]).source(),
        PrefillAttention(LAYERS[layer][0]).default(compute_capability).source(),
    ]
    for source in sources:
        assert compile_kernel(source, compute_capability).shared_bytes <= SHARED_BYTES[compute_capability]


@pytest.mark.parametrize("layer", ["qwen3-8b", "phi-3-mini"])
def test_compiles_with_an_fp8_pool_for_dependent_launch(layer):
    of, rotary_dim, eps = LAYERS[layer]
    of = replace(of, kv_type="fp8e4nv")
    variants = [
        rope(layer, kv_type="fp8e4nv", pdl=True),
        DecodeAttention(of, rotary_dim, eps, "fp32", pdl=True).default(1, 4096),
        PrefillAttention(of, pdl=True).default(90),
    ]
    for variant in variants:
        compiled = compile_kernel(variant.source(), 90)
        assert compiled.pdl
        assert compiled.shared_bytes <= SHARED_BYTES[90]


@pytest.mark.parametrize(("layer", "compute_capability"), [("llama-3.1-8b", 90), ("phi-2", 80)])
def test_the_largest_candidate_fits_its_memory(layer, compute_capability):
    candidates = PrefillAttention(LAYERS[layer][0]).candidates(compute_capability)
    assert len(set(candidates)) == len(candidates) <= 24
    largest = max(candidates, key=lambda tile: (tile.stages * tile.block_t, tile.block_m, tile.warps))
    assert compile_kernel(largest.source(), compute_capability).shared_bytes <= SHARED_BYTES[compute_capability]
