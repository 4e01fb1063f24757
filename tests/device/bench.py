"""What the figures are made of: decode at batch 1, time to the first token, many requests at once.

python tests/device/bench.py ENGINE [--json FILE] [--only decode|ttft|throughput]

tok/s and milliseconds are taken around `LLM.generate`, host time included. Beside each stands what it achieves: bytes a
second (weights and KV cache of each step, see `farrier.runtime.bench.traffic`) or floating-point operations a second.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from farrier import LLM, SamplingParams
from farrier.runtime.bench.timed_engine import Step, TimedEngine
from farrier.runtime.bench.traffic import Traffic
from farrier.targets.engine import load_engine
from tests.device.work import floating_point_operations

DECODE = (128, 256)
TTFT_LENGTHS = (128, 1024, 4096)
LOADS = ((64, 128, 256), (256, 128, 128), (64, 2048, 128))
PARTS = ("decode", "ttft", "throughput")


class Bench:
    def __init__(self, engine: TimedEngine, llm: LLM) -> None:
        self.config = engine.config
        self._engine = engine
        self._llm = llm
        self._rng = np.random.default_rng(0)
        self._traffic = Traffic(engine.config)

    def run(self, count: int, length: int, tokens: int) -> tuple[float, list[Step]]:
        """Seconds and steps of so many requests at once."""
        ids = self._rng.integers(3, self.config.spec.vocab_size, (count, length)).tolist()
        first, begun = len(self._engine.steps), time.perf_counter()
        results = self._llm.generate(
            [{"prompt_token_ids": row} for row in ids],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True),
        )
        seconds = time.perf_counter() - begun
        for output in (result.outputs[0] for result in results):
            if len(output.token_ids) != tokens:
                raise output.error or RuntimeError(f"{len(output.token_ids)} tokens instead of {tokens}.")
        return seconds, self._engine.steps[first:]

    def decode(self) -> dict[str, float]:
        """The first token left out: the difference of two lengths."""
        length, tokens = DECODE
        runs = [self.run(1, length, tokens) for _ in range(3)]
        first = median(self.run(1, length, 1)[0] for _ in range(5))
        seconds = median(taken for taken, _ in runs) - first
        moved = sum(map(self._traffic.bytes, runs[0][1][1:]))
        return {"decode_tok_s": (tokens - 1) / seconds, "decode_bytes_per_s": moved / seconds}

    def first_token(self) -> dict[str, float]:
        found = {}
        for length in TTFT_LENGTHS:
            if length < self.config.ceilings.max_seq_len:
                self.run(1, length, 1)
                seconds = median(self.run(1, length, 1)[0] for _ in range(5))
                found[f"ttft_{length}_ms"] = 1000 * seconds
                found[f"ttft_{length}_flop_per_s"] = floating_point_operations(self.config, 1, length, 1) / seconds
        return found

    def throughput(self) -> dict[str, float]:
        found = {}
        for count, length, tokens in LOADS:
            if count <= self.config.ceilings.max_batch_size and length + tokens <= self.config.ceilings.max_seq_len:
                self.run(count, length, tokens)
                seconds, steps = min((self.run(count, length, tokens) for _ in range(2)), key=lambda run: run[0])
                name = f"load_{count}x{length}+{tokens}"
                found[f"{name}_tok_s"] = count * tokens / seconds
                found[f"{name}_bytes_per_s"] = sum(map(self._traffic.bytes, steps)) / seconds
                work = floating_point_operations(self.config, count, length, tokens)
                found[f"{name}_flop_per_s"] = work / seconds
        return found


def measure(path: Path, parts: list[str]) -> dict[str, Any]:
    start = time.perf_counter()
    engine = TimedEngine(load_engine(path))
    with LLM(engine, enable_prefix_caching=False) as llm:
        results: dict[str, Any] = {"load_s": time.perf_counter() - start}
        bench = Bench(engine, llm)
        bench.run(1, 16, 4)
        for name, part in zip(PARTS, (bench.decode, bench.first_token, bench.throughput), strict=True):
            if name in parts:
                results |= part()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append", choices=PARTS)
    given = parser.parse_args()
    results = measure(given.engine, given.only or list(PARTS))
    for name, value in results.items():
        if not name.endswith("_per_s"):
            print(f"{name}: {value:,.2f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
