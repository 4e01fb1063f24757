"""The kernel that measures how fast memory is read really reads all of it."""

import numpy as np

from tests.device.ceilings import StreamRead


def test_every_word_is_read_once(run):
    variant = StreamRead(block=64, loads=4, num_warps=1)
    words = np.random.default_rng(0).integers(-1000, 1000, 5 * 64 * 4, np.int32)
    out = np.zeros(5, np.int32)
    run(variant.source(), variant.grid(5), words, out)
    np.testing.assert_array_equal(out, words.reshape(5, -1).sum(1))
