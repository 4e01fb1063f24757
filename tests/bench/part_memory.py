"""Peak memory of `farrier serve`, beyond its weights and its KV pool."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from engines import engine, serving
from lines import Line
from part_http import STREAMS, stream

from farrier.targets.engine_dir import read_config

BUDGET_MB = 250


def memory() -> Iterator[Line]:
    directory = engine("bf16")
    config = read_config(directory)
    blocks_each = 5
    tokens_each = blocks_each * config.block_size
    kv_blocks = STREAMS * blocks_each
    with serving(directory, kv_blocks=kv_blocks) as (url, pid):
        # The pool is filled to the last block: memory that was never touched would count in favour.
        stream(url, config.model, [(tokens_each - 16, 16)] * STREAMS, np.random.default_rng(0))
        peak = _peak_rss(pid)
    extra = peak - config.weight_bytes - kv_blocks * config.kv_bytes_per_block
    what = f"farrier serve bf16: peak {peak / 1e6:,.0f} MB, without weights and KV pool"
    yield Line(what, "MB", extra / 1e6, None, BUDGET_MB)


def _peak_rss(pid: int) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
