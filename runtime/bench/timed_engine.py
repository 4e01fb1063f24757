"""An engine that keeps a clock: what `LLM` runs on while it is measured."""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from farrier.targets.engine import Batch, Engine, EngineConfig, Int32, KvMemory, StepHandle, StepResult


@dataclass(frozen=True, slots=True)
class Step:
    """One finished iteration."""

    end: float
    """Seconds of `time.perf_counter` when its tokens were there."""
    num_tokens: int
    lengths: Int32
    """`[B]` tokens of each sequence whose KV exists after the step."""


class TimedEngine:
    """`engine`, with every finished step noted in `steps`."""

    def __init__(self, engine: Engine) -> None:
        self.wrapped = engine
        self.steps: list[Step] = []

    @property
    def config(self) -> EngineConfig:
        return self.wrapped.config

    @property
    def overlaps(self) -> bool:
        return self.wrapped.overlaps

    def memory(self) -> KvMemory:
        return self.wrapped.memory()

    def allocate(self, num_blocks: int) -> None:
        self.wrapped.allocate(num_blocks)

    def step(self, batch: Batch) -> "_TimedHandle":
        lengths = batch.context_lens + np.diff(batch.query_starts)
        return _TimedHandle(self.wrapped.step(batch), self.steps, batch.num_tokens, lengths)

    def close(self) -> None:
        self.wrapped.close()


class _TimedHandle:
    def __init__(self, handle: StepHandle, steps: list[Step], num_tokens: int, lengths: Int32) -> None:
        self._handle = handle
        self._steps = steps
        self._num_tokens = num_tokens
        self._lengths = lengths

    def wait(self) -> StepResult:
        result = self._handle.wait()
        self._steps.append(Step(perf_counter(), self._num_tokens, self._lengths))
        return result
