"""How many bytes a step has to read from memory, at least: what its speed in GB/s is reckoned from."""

import math

import numpy as np

from farrier.runtime.bench.timed_engine import Step
from farrier.targets.decoder import is_projection
from farrier.targets.engine import EngineConfig
from farrier.targets.precision import precisions

_BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}
"""Bytes of one weight; scales are left out."""


class Traffic:
    """Counts the matrices a step multiplies with, once, and the KV cache of its sequences, once.

    A lower bound: activations, norms and scales are left out. So is an embedding that is only looked up. Of a mixture
    of experts, it counts those that so many tokens reach when they are routed evenly.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        spec, experts = config.spec, config.spec.experts
        shapes = spec.tensors()
        shapes["lm_head.weight"] = shapes["embed.weight"]
        chosen = precisions(spec, config.precision, config.overrides)
        always = routed = 0.0
        for name, shape in shapes.items():
            if is_projection(name):
                # A layer that keeps its source's type is taken for the narrowest it can have.
                size = math.prod(shape) * _BYTES.get(chosen[name], 2.0)
                if ".experts." in name:
                    routed += size
                else:
                    always += size
        self._always, self._routed = always, routed
        self._unreached = 1 - experts.top_k / experts.num_experts if experts else 0.0
        self._kv_per_token_and_layer = config.kv_bytes_per_block / config.block_size / len(spec.layers)

    def weight_bytes(self, num_tokens: int) -> float:
        reached = 1 - self._unreached**num_tokens
        return min(self._always + self._routed * reached, self._config.weight_bytes)

    def bytes(self, step: Step) -> float:
        seen = 0
        for layer in self._config.spec.layers:
            seen += int((step.lengths if layer.window is None else np.minimum(step.lengths, layer.window)).sum())
        return self.weight_bytes(step.num_tokens) + seen * self._kv_per_token_and_layer
