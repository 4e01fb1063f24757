"""Host time of one decode step: schedule + pack + unpack, everything but the engine and detokenization.

Of both loops; the overlapped one does the same work while a device computes.

python tests/bench/host_time.py [--context TOKENS] [--steps STEPS]
"""

import argparse
import time
from itertools import product
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from farrier.runtime.core import CoreOptions, EngineCore
from farrier.runtime.intake import Intake
from farrier.runtime.sampling_params import SamplingParams
from farrier.targets.engine import Batch, Ceilings, KvMemory, StepResult

BUDGET_MS = {1: 0.15, 64: 1.0}


class IdleHandle:
    def __init__(self, rows: int) -> None:
        self._result = StepResult(np.full(rows, 7, np.int32), {})

    def wait(self) -> StepResult:
        return self._result


class IdleEngine:
    """Computes nothing, and says how long it was asked to."""

    def __init__(self, config: Any, overlaps: bool) -> None:
        self.config = config
        self.overlaps = overlaps
        self.seconds = 0.0

    def memory(self) -> KvMemory:
        return KvMemory(1, 2**31)

    def allocate(self, num_blocks: int) -> None: ...

    def close(self) -> None: ...

    def step(self, batch: Batch) -> IdleHandle:
        start = time.perf_counter()
        handle = IdleHandle(len(batch.sample_rows))
        self.seconds += time.perf_counter() - start
        return handle


def measure(overlaps: bool, batch_size: int, context: int, steps: int, params: dict[str, Any]) -> list[float]:
    """Milliseconds of each decode step."""
    config = SimpleNamespace(  # what the core reads of an EngineConfig
        spec=SimpleNamespace(vocab_size=128_000),
        block_size=32,
        ceilings=Ceilings(max_batch_size=batch_size, max_num_tokens=8192, max_seq_len=context + steps + 2),
        eos_token_ids=(2,),
    )
    engine = IdleEngine(config, overlaps)
    num_blocks = batch_size * (config.ceilings.max_seq_len // config.block_size + 1)
    core = EngineCore(engine, CoreOptions(num_blocks))
    intake = Intake(config, None, num_blocks)
    rng = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=steps + 2, ignore_eos=True, **params)
    for index in range(batch_size):
        core.add(intake.sequences(str(index), {"prompt_token_ids": rng.integers(8, 1000, context).tolist()}, sampling))
    while core.scheduler.waiting or any(not sequence.num_output_tokens for sequence in core.scheduler.running):
        core.step()
    times = []
    while len(core.scheduler.running) == batch_size:
        engine.seconds = 0.0
        start = time.perf_counter()
        core.step()
        times.append((time.perf_counter() - start - engine.seconds) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    print(f"host time per decode step, ms; context {arguments.context}, blocks of 32, {arguments.steps} steps")
    print(f"{'loop':12}{'sampling':28}{'batch':>6}{'median':>9}{'p99':>9}{'budget':>9}")
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "temperature, top-p": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
        "repetition penalty": {"temperature": 0.8, "repetition_penalty": 1.1},
    }
    for (loop, overlaps), (name, params), batch_size in product(
        (("plain", False), ("overlapped", True)), kinds.items(), (1, 8, 16, 64)
    ):
        times = measure(overlaps, batch_size, arguments.context, arguments.steps, params)
        p99 = sorted(times)[int(0.99 * len(times))]
        budget = f"{BUDGET_MS[batch_size]:9.2f}" if batch_size in BUDGET_MS else ""
        print(f"{loop:12}{name:28}{batch_size:6}{median(times):9.3f}{p99:9.3f}{budget}")


if __name__ == "__main__":
    main()
