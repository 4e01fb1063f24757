"""16 streams through HTTP beside the same work offline, and beside the bare OpenVINO loop."""

import asyncio
from collections.abc import Iterator

import numpy as np
from engines import engine, serving
from lines import Line, in_turns
from part_decode import CONTEXT, KV_BLOCKS, bare_loop

from farrier.runtime.bench.load import ClosedLoop, ServeResult, encode_request, parse_endpoint, run_load
from farrier.runtime.bench.offline import OfflineBench
from farrier.runtime.bench.workload import BenchRequest

STREAMS, OUTPUT = 16, 32


def http() -> Iterator[Line]:
    for precision in ("bf16", "int8"):
        directory = engine(precision)
        with (
            OfflineBench(directory, kv_blocks=KV_BLOCKS) as bench,
            serving(directory, kv_blocks=KV_BLOCKS) as (url, _),
        ):
            yield from _beside(precision, bench, url)


def _beside(precision: str, bench: OfflineBench, url: str) -> Iterator[Line]:
    rng = np.random.default_rng(0)
    decoding: list[float] = []

    def offline() -> list[float]:
        return [bench.run(bench.random_prompts(rng, STREAMS, CONTEXT), OUTPUT).seconds]

    def through_http() -> list[float]:
        result = stream(url, precision, [(CONTEXT, OUTPUT)] * STREAMS, rng)
        decoding.append(_decode_rate(result))
        return [result.seconds]

    offline()
    through_http()
    decoding.clear()
    ours, peer, bare = in_turns(through_http, offline, bare_loop(bench, STREAMS))
    tokens = STREAMS * OUTPUT
    yield Line(f"HTTP {precision}, {STREAMS} streams: whole / offline", "tok/s", tokens / ours, tokens / peer, 0.90)
    yield Line(
        f"HTTP {precision}, {STREAMS} streams: decode / bare OpenVINO",
        "tok/s",
        float(np.median(decoding)),
        STREAMS / bare,
        0.90,
    )


def stream(url: str, model: str, lengths: list[tuple[int, int]], rng: np.random.Generator) -> ServeResult:
    """Sends requests of (prompt, output) tokens, at most STREAMS at a time. RuntimeError if one fails."""
    endpoint = parse_endpoint(url, None)
    requests = [
        encode_request(
            endpoint,
            BenchRequest({"prompt_token_ids": rng.integers(3, 1000, prompt).tolist()}, output),
            model,
            ignore_eos=True,
        )
        for prompt, output in lengths
    ]
    result = asyncio.run(run_load(endpoint, requests, ClosedLoop(STREAMS), rng=rng, timeout_s=300))
    if result.failures:
        raise RuntimeError(str(result.failures[0]))
    return result


def _decode_rate(result: ServeResult) -> float:
    """Tokens a second from when the last stream has begun until the first one ends."""
    begin = max(answer.output_times[0] for answer in result.answers)
    end = min(answer.output_times[-1] for answer in result.answers)
    inside = sum(begin < time <= end for answer in result.answers for time in answer.output_times)
    return inside / (end - begin)
