"""Steps written by hand, for tests of executors."""

import numpy as np

from farrier.targets.engine import Batch, SamplingArrays
from tests.models import VOCAB_SIZE

BLOCK_SIZE = 32
BLOCKS = ([3, 1, 5], [9, 2, 7])


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


def batch(parts: list[tuple[list[int], int, list[int], int]]) -> Batch:
    """Of (tokens, where they start, blocks, how many of the last rows are sampled) each."""
    lengths = [len(tokens) for tokens, *_ in parts]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    used = [blocks[: -(-(start + len(tokens)) // BLOCK_SIZE)] for tokens, start, blocks, _ in parts]
    sampled = [np.arange(end - part[3], end) for part, end in zip(parts, starts[1:], strict=True)]
    rows = np.concatenate(sampled).astype(np.int32)
    return Batch(
        token_ids=np.concatenate([tokens for tokens, *_ in parts]).astype(np.int32),
        positions=np.concatenate([np.arange(s, s + len(t)) for t, s, *_ in parts]).astype(np.int32),
        query_starts=starts,
        context_lens=np.array([start for _, start, *_ in parts], np.int32),
        block_ids=np.concatenate(used).astype(np.int32),
        block_starts=np.concatenate([[0], np.cumsum([len(u) for u in used])]).astype(np.int32),
        sample_rows=rows,
        sampling=SamplingArrays.greedy(len(rows)),
    )
