"""Logprobs against the sampling reference."""

import numpy as np
import pytest

from farrier.plugins.logprobs import Logprobs
from farrier.targets.sampling import NO_TOKEN, sample
from tests.unit.test_sampling import Row, arrays


def logprobs(run, logits, num_logprobs, sampled):
    rows, vocab_size = logits.shape
    variant = Logprobs(vocab_size)
    counters = np.zeros(rows, np.int32)
    own, ids, values = (
        np.full(rows, 7, np.float32),
        np.full((rows, 20), 7, np.int32),
        np.full((rows, 20), 7, np.float32),
    )
    partials, sums = np.zeros((rows, variant.parts, 32), np.int64), np.zeros((rows, variant.parts, 2), np.float32)
    numbers, tokens = np.array(num_logprobs, np.int32), np.array(sampled, np.int32)
    run(variant.source(), variant.grid(rows), logits, numbers, tokens, partials, sums, counters, own, ids, values)
    assert not counters.any()
    return own, ids, values


@pytest.mark.parametrize("vocab_size", [1, 3, 257, 1000, 32003])
def test_agrees_with_the_reference(run, vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = (3 * rng.standard_normal((8, vocab_size))).astype(np.float32)
    logits[3] = np.round(logits[3])  # ties
    logits[4, : vocab_size * 2 // 3] = -np.inf
    logits[5] = -np.inf
    logits[6] *= 1000
    counts = [0, 20, -1, 20, 7, 20, 3, 1]
    reference = sample(logits, arrays([Row(num_logprobs=count) for count in counts], vocab_size))
    assert reference.token_ids[5] == NO_TOKEN
    own, ids, values = logprobs(run, logits, counts, reference.token_ids)
    for row, count in enumerate(counts):
        if row not in reference.logprobs:
            assert own[row] == 7
            assert (ids[row] == 7).all()
            assert (values[row] == 7).all()
            continue
        expected = reference.logprobs[row]
        present = len(expected.top_ids)
        # Sums of exponentials in another order, of numbers up to 12000 in fp32.
        tolerance = {"rtol": 1e-6, "atol": 2e-3 if row == 6 else 2e-5}
        np.testing.assert_allclose(own[row], expected.sampled, **tolerance)
        assert ids[row, :present].tolist() == expected.top_ids.tolist()
        np.testing.assert_allclose(values[row, :present], expected.top_values, **tolerance)
        assert (ids[row, present:count] == -1).all()
        assert (values[row, present:count] == -np.inf).all()
        assert (ids[row, count:] == 7).all()


def test_of_a_token_that_is_not_the_likeliest(run):
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], np.float32))
    own, ids, values = logprobs(run, logits, [3], [2])
    np.testing.assert_allclose(own, np.log([0.125]), rtol=1e-6)
    assert ids[0, :3].tolist() == [0, 1, 2]
    np.testing.assert_allclose(values[0, :3], np.log([0.5, 0.25, 0.125]), rtol=1e-6)
