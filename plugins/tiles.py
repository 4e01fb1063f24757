"""Which tiles prefill attention has in a step. Without Triton: the executor asks, too."""

import numpy as np
import numpy.typing as npt


def attention_tiles(query_starts: npt.NDArray[np.int32], block_q: int) -> npt.NDArray[np.int32]:
    """`[n, 2]`: sequence and first row in it of every tile of at most `block_q` query tokens; a sequence's last tiles,
    which attend to the most tokens, come first."""
    counts = -(-np.diff(query_starts) // block_q)
    ends = np.cumsum(counts)
    found = np.empty((int(ends[-1]), 2), np.int32)
    found[:, 0] = np.repeat(np.arange(len(counts)), counts)
    found[:, 1] = (np.arange(len(found)) - np.repeat(ends - counts, counts)) * block_q
    return np.ascontiguousarray(found[::-1])
