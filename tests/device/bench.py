"""What issue-sized figures are made of: decode at batch 1, time to the first token, many requests at once.

python tests/device/bench.py ENGINE [--json FILE] [--only decode|ttft|throughput]
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

TTFT_LENGTHS = (128, 1024, 4096)
LOADS = ((64, 128, 256), (256, 128, 128), (64, 2048, 128))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", action="append", choices=("decode", "ttft", "throughput"))
    given = parser.parse_args()
    parts = given.only or ["decode", "ttft", "throughput"]
    from farrier import LLM, SamplingParams

    results: dict[str, Any] = {"engine": str(given.engine)}
    start = time.perf_counter()
    with LLM(given.engine, enable_prefix_caching=False) as llm:
        results["load_s"] = time.perf_counter() - start
        rng = np.random.default_rng(0)
        vocab = llm.config.spec.vocab_size

        def run(count: int, length: int, tokens: int) -> float:
            prompts = [{"prompt_token_ids": rng.integers(3, vocab, length).tolist()} for _ in range(count)]
            begun = time.perf_counter()
            llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
            return time.perf_counter() - begun

        run(1, 16, 4)
        results["first_s"] = time.perf_counter() - start
        if "decode" in parts:
            # The first token left out: the difference of two lengths.
            whole = median(run(1, 128, 256) for _ in range(3))
            first = median(run(1, 128, 1) for _ in range(5))
            results["decode_tok_s"] = 255 / (whole - first)
        if "ttft" in parts:
            for length in TTFT_LENGTHS:
                if length < llm.config.ceilings.max_seq_len:
                    run(1, length, 1)
                    results[f"ttft_{length}_ms"] = 1000 * median(run(1, length, 1) for _ in range(5))
        if "throughput" in parts:
            for count, length, tokens in LOADS:
                if count <= llm.config.ceilings.max_batch_size:
                    run(count, length, tokens)
                    seconds = min(run(count, length, tokens) for _ in range(2))
                    results[f"load_{count}x{length}+{tokens}_tok_s"] = count * tokens / seconds
    for name, value in results.items():
        print(f"{name}: {value if isinstance(value, str) else format(value, ',.2f')}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
