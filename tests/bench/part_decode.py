"""Decoding through `farrier.LLM` beside the bare OpenVINO loop."""

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
from bare import bare_decode
from engines import engine
from lines import Line, in_turns

from farrier.runtime.bench.offline import OfflineBench, decode_run
from farrier.targets.openvino.executor import OpenVinoEngine

CONTEXT, STEPS = 128, 16
KV_BLOCKS = 256


def decode() -> Iterator[Line]:
    for precision in ("bf16", "int8"):
        with OfflineBench(engine(precision), kv_blocks=KV_BLOCKS) as bench:
            for batch_size in (1, 8, 16):
                ours, bare = in_turns(llm_decode(bench, batch_size), bare_loop(bench, batch_size))
                what = f"decode {precision}, batch {batch_size}: LLM / bare OpenVINO"
                yield Line(what, "tok/s", batch_size / ours, batch_size / bare, 0.95)


def llm_decode(bench: OfflineBench, batch_size: int) -> Callable[[], list[float]]:
    """Measures seconds of each decode step. From the second time on, most of the prompt is in the prefix cache."""
    prompts = bench.random_prompts(np.random.default_rng(batch_size), batch_size, CONTEXT)

    def measure() -> list[float]:
        return decode_run(bench.run(prompts, STEPS + 1), batch_size, CONTEXT).durations

    measure()
    return measure


def bare_loop(bench: OfflineBench, batch_size: int) -> Callable[[], list[float]]:
    """Like `llm_decode`, at the context it has in the middle."""
    raw = cast(OpenVinoEngine, bench.engine.wrapped)
    return lambda: bare_decode(raw, batch_size, CONTEXT + STEPS // 2, STEPS)
