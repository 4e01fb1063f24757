"""The reference engine sees what breaks the contract between two steps of which one is under way."""

import numpy as np
import pytest

from farrier.targets.engine import Batch, SamplingArrays
from tests.reference_engine import ReferenceEngine, reference_config

Row = tuple[list[int], int, list[int]]
"""Token ids, tokens in the cache before them, and blocks of one sequence; its last token is sampled."""


def batch(*rows: Row) -> Batch:
    counts, blocks = [len(tokens) for tokens, _, _ in rows], [held for _, _, held in rows]
    starts = np.cumsum([0, *counts], dtype=np.int32)
    return Batch(
        token_ids=np.array([token for tokens, _, _ in rows for token in tokens], np.int32),
        positions=np.array([first + i for tokens, first, _ in rows for i in range(len(tokens))], np.int32),
        query_starts=starts,
        context_lens=np.array([first for _, first, _ in rows], np.int32),
        block_ids=np.array([block for held in blocks for block in held], np.int32),
        block_starts=np.cumsum([0, *map(len, blocks)], dtype=np.int32),
        sample_rows=starts[1:] - 1,
        sampling=SamplingArrays.greedy(len(rows)),
    )


def engine(*, overlaps: bool = True) -> ReferenceEngine:
    made = ReferenceEngine(reference_config(block_size=2))
    made.overlaps = overlaps
    made.allocate(8)
    return made


FIRST = batch(([3, 4, 5], 0, [0, 1]), ([6, 7], 0, [2]))


def test_a_reference_is_worth_what_was_sampled() -> None:
    ahead, plain = engine(), engine(overlaps=False)
    handles = [ahead.step(FIRST), ahead.step(batch(([-2], 2, [2, 3]), ([-1], 3, [0, 1])))]
    sampled = [handle.wait().token_ids.tolist() for handle in handles]
    first = plain.step(FIRST).wait().token_ids.tolist()
    second = plain.step(batch(([first[1]], 2, [2, 3]), ([first[0]], 3, [0, 1]))).wait().token_ids.tolist()
    assert sampled == [first, second]


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (batch(([-3], 3, [0, 1])), "no such row was sampled"),
        (batch(([-1], 2, [2, 3])), "another position"),
        (batch(([-1], 3, [2, 3])), "another sequence"),
        (batch(([8, 8], 0, [2])), "writes a block of the step under way"),
        (batch(([8], 2, [2, 3])), "uses a block that the step under way writes"),
        (batch(([8, 9, 9], 0, [4, 1])), "writes a block of the step under way"),
    ],
)
def test_what_a_step_must_not_do_while_another_is_under_way(second: Batch, complaint: str) -> None:
    broken = engine()
    broken.step(FIRST)
    with pytest.raises(AssertionError, match=complaint):
        broken.step(second)


def test_a_reference_needs_a_step_whose_samples_are_unknown() -> None:
    with pytest.raises(AssertionError, match="the first step refers to a previous one"):
        engine().step(batch(([-1], 0, [0])))
    late = engine()
    late.step(FIRST).wait()
    with pytest.raises(AssertionError, match="the token is known"):
        late.step(batch(([-1], 3, [0, 1])))


def test_at_most_two_steps_at_once_and_they_end_in_order() -> None:
    with pytest.raises(AssertionError, match="before the step under way was waited for"):
        (one := engine(overlaps=False)).step(FIRST), one.step(batch(([8], 0, [5])))
    two = engine()
    handles = [two.step(FIRST), two.step(batch(([8], 0, [5])))]
    with pytest.raises(AssertionError, match="three steps at once"):
        two.step(batch(([8], 0, [6])))
    with pytest.raises(AssertionError, match="before the step before it"):
        handles[1].wait()
