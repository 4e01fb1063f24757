"""Whether an engine that was just built really runs."""

import numpy as np

from farrier.targets.engine import Batch, Engine, SamplingArrays
from farrier.targets.errors import BuildError


def trial_step(engine: Engine) -> None:
    """Runs one step on `engine` and closes it. Raises BuildError unless it gives a token of the vocabulary."""
    try:
        engine.allocate(1)
        token = int(engine.step(one_token()).wait().token_ids[0])
    finally:
        engine.close()
    if not 0 <= token < engine.config.spec.vocab_size:
        raise BuildError(
            "The engine computes no finite logits; check the model's weights, or build with --precision f32."
        )


def one_token() -> Batch:
    """The smallest step there is: token 0 at position 0, in block 0."""
    zero, bounds = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    return Batch(
        token_ids=zero,
        positions=zero,
        query_starts=bounds,
        context_lens=zero,
        block_ids=zero,
        block_starts=bounds,
        sample_rows=zero,
        sampling=SamplingArrays.greedy(1),
    )
