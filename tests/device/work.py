"""How much a run has to compute: what its speed in FLOP/s is reckoned from."""

import math

from farrier.targets.decoder import is_projection
from farrier.targets.engine import EngineConfig


def floating_point_operations(config: EngineConfig, count: int, prompt: int, tokens: int) -> float:
    """Of `count` sequences of `prompt` tokens each, generating `tokens`: matrix products (a multiplication and an
    addition count as two) and attention over what each token sees. The last token is generated but not computed with.
    """
    spec, experts = config.spec, config.spec.experts
    used = experts.top_k / experts.num_experts if experts else 1.0
    matrices = sum(
        math.prod(shape) * (used if ".experts." in name else 1.0)
        for name, shape in spec.tensors().items()
        if is_projection(name) and name != "lm_head.weight"
    )
    length = prompt + tokens - 1
    seen = sum(_pairs(length, layer.window) for layer in spec.layers)
    logits = spec.vocab_size * spec.hidden_size * tokens
    return count * (2 * matrices * length + 4 * spec.q_size * seen + 2 * logits)


def _pairs(length: int, window: int | None) -> int:
    """How many tokens `length` tokens see in all, each itself included."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
