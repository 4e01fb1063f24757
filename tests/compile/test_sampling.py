"""The device sampler compiles for every compute capability, at the vocabularies of real models."""

import pytest

from farrier.plugins.draw import Draw
from farrier.plugins.kernel import compile_kernel
from farrier.plugins.logprobs import Logprobs
from farrier.plugins.sampling import Adjust, Greedy

VARIANTS = [
    *(Greedy(vocab_size) for vocab_size in (259, 32000, 128256)),
    Adjust(259),
    Adjust(128256),
    Adjust(151936, masked=True),
    *(Draw(vocab_size) for vocab_size in (259, 32003, 128256, 262144)),
    *(Logprobs(vocab_size) for vocab_size in (259, 128256, 262144)),
]


@pytest.mark.parametrize("compute_capability", [80, 87, 90])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiles(variant, compute_capability):
    assert compile_kernel(variant.source(), compute_capability).shared_bytes <= 48 * 1024


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiles_for_dependent_launch(variant):
    compiled = compile_kernel(type(variant)(**{**vars(variant), "pdl": True}).source(), 90)
    assert compiled.pdl
    assert compiled.shared_bytes <= 48 * 1024
