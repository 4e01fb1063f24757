"""Latency and throughput of an engine through `farrier.LLM`, in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from farrier.runtime import chat
from farrier.runtime.bench.statistics import Summary, summary
from farrier.runtime.bench.timed_engine import Step, TimedEngine
from farrier.runtime.bench.traffic import Traffic
from farrier.runtime.bench.workload import BenchRequest
from farrier.runtime.llm import LLM
from farrier.runtime.request import Prompt, TokensPrompt
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.engine import EngineConfig, load_engine
from farrier.targets.errors import FarrierError, RequestError


@dataclass(frozen=True)
class CacheUse:
    """Prompt tokens of the measured requests, and how many of them the prefix cache held."""

    enabled: bool
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class BatchLatency:
    """Sequences that start together. Times in seconds.

    first_token: from the call until every sequence has its first token. between_tokens: steps in which all
    sequences decode. tokens_per_second and bytes_per_second are of those steps: they leave the first token out.
    """

    batch_size: int
    first_token: Summary
    between_tokens: Summary
    tokens_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Latency:
    batches: list[BatchLatency]
    cache: CacheUse


@dataclass(frozen=True)
class Throughput:
    """All requests at once. `seconds` is from the first prompt in to the last token out, prefill included."""

    requests: int
    seconds: float
    prompt_tokens: int
    output_tokens: int
    steps: int
    mean_sequences: float
    """Sequences in a step."""
    bytes_per_second: float
    cache: CacheUse


class OfflineBench:
    """An LLM on a clocked engine. Use it in a `with` block.

    engine: an engine directory. kv_blocks, enable_prefix_caching: as for LLM.
    """

    def __init__(self, engine: Path, *, kv_blocks: int | None = None, enable_prefix_caching: bool = True) -> None:
        self._path = engine
        self._kv_blocks = kv_blocks
        self._enable_prefix_caching = enable_prefix_caching

    def __enter__(self) -> "OfflineBench":
        self.engine = TimedEngine(load_engine(self._path))
        self.config: EngineConfig = self.engine.config
        tokenizer = Tokenizer.load(self._path / "tokenizer") if self.config.has_tokenizer else None
        self.llm = LLM(
            self.engine,
            tokenizer=tokenizer,
            kv_blocks=self._kv_blocks,
            enable_prefix_caching=self._enable_prefix_caching,
        )
        self.llm.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.llm.stop()

    def latency(
        self,
        batch_sizes: list[int],
        input_len: int,
        output_len: int,
        *,
        repeats: int,
        rng: np.random.Generator,
        on_batch: Callable[[int], None] = lambda batch_size: None,
    ) -> Latency:
        """Every batch size `repeats` times with prompts of its own, after one run that is not counted.

        Raises RequestError about lengths the engine cannot hold, FarrierError when a batch never ran as a whole.
        """
        self._check_sizes(batch_sizes, input_len, output_len)
        batches, cached, prompt_tokens = [], 0, 0
        for batch_size in batch_sizes:
            on_batch(batch_size)
            self.run(self.random_prompts(rng, batch_size, input_len), min(output_len, 4))
            runs: list[DecodeRun] = []
            for _ in range(repeats):
                run = self.run(self.random_prompts(rng, batch_size, input_len), output_len)
                runs.append(decode_run(run, batch_size, input_len))
                cached += run.cached_tokens
                prompt_tokens += batch_size * input_len
            batches.append(_batch_latency(batch_size, runs, Traffic(self.config)))
        return Latency(batches, CacheUse(self._enable_prefix_caching, prompt_tokens, cached))

    def throughput(self, requests: list[BenchRequest], rng: np.random.Generator) -> Throughput:
        """All of `requests` at once, each to its `max_tokens`, after a short run that is not counted."""
        prompts = [self._prompt(request) for request in requests]
        self.run(self.random_prompts(rng, 1, 8), 4)
        params = [_greedy(request.max_tokens) for request in requests]
        hits, start, first = self.llm.stats().prefix_cache_hits, perf_counter(), len(self.engine.steps)
        outputs = self.llm.generate(prompts, params)
        seconds = perf_counter() - start
        for output in outputs:
            if output.outputs[0].error is not None:
                raise output.outputs[0].error
        steps, traffic = self.engine.steps[first:], Traffic(self.config)
        prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        return Throughput(
            requests=len(requests),
            seconds=seconds,
            prompt_tokens=prompt_tokens,
            output_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
            steps=len(steps),
            mean_sequences=sum(len(step.lengths) for step in steps) / len(steps),
            bytes_per_second=sum(map(traffic.bytes, steps)) / seconds,
            cache=CacheUse(self._enable_prefix_caching, prompt_tokens, self.llm.stats().prefix_cache_hits - hits),
        )

    def random_prompts(self, rng: np.random.Generator, count: int, length: int) -> list[Prompt]:
        ids = rng.integers(0, self.config.spec.vocab_size, (count, length)).tolist()
        return [TokensPrompt(prompt_token_ids=row) for row in ids]

    def _check_sizes(self, batch_sizes: list[int], input_len: int, output_len: int) -> None:
        ceilings = self.config.ceilings
        if max(batch_sizes) > ceilings.max_batch_size:
            raise RequestError(
                f"The engine was built for {ceilings.max_batch_size} sequences in a step; a batch of "
                f"{max(batch_sizes)} needs one built with a larger --max-batch-size.",
                param="batch_sizes",
            )
        if output_len < 2:
            raise RequestError("There is no time between tokens with fewer than 2 of them.", param="output_len")
        if input_len + output_len > ceilings.max_seq_len:
            raise RequestError(
                f"{input_len} + {output_len} tokens are more than the engine's max_seq_len of {ceilings.max_seq_len}.",
                param="input_len",
            )

    def run(self, prompts: list[Prompt], output_len: int) -> "TimedRun":
        """Generates `output_len` tokens for each prompt, greedily."""
        hits, first = self.llm.stats().prefix_cache_hits, len(self.engine.steps)
        start = perf_counter()
        self.llm.generate(prompts, _greedy(output_len))
        return TimedRun(start, self.engine.steps[first:], self.llm.stats().prefix_cache_hits - hits)

    def _prompt(self, request: BenchRequest) -> Prompt:
        if not isinstance(request.prompt, list):
            return request.prompt
        if self.llm.tokenizer is None:
            raise RequestError("Conversations need a tokenizer, and this engine has none.", param="dataset")
        return TokensPrompt(prompt_token_ids=chat.render(self.llm.tokenizer, request.prompt))


@dataclass(frozen=True)
class TimedRun:
    """The steps of one call, which began at `start`. cached_tokens: of its prompts, found in the prefix cache."""

    start: float
    steps: list[Step]
    cached_tokens: int

    @property
    def seconds(self) -> float:
        return self.steps[-1].end - self.start


@dataclass(frozen=True)
class DecodeRun:
    """Of one run: the time to the last first token, and the decode steps of the whole batch with their durations."""

    first_token: float
    steps: list[Step]
    durations: list[float]


def decode_run(run: TimedRun, batch_size: int, input_len: int) -> DecodeRun:
    """Raises FarrierError unless there are steps in which all sequences decode."""
    decoding = [
        index
        for index, step in enumerate(run.steps)
        if len(step.lengths) == batch_size and bool((step.lengths > input_len).all())
    ]
    if not decoding:
        raise FarrierError(
            f"A batch of {batch_size} never ran as a whole: the KV pool or --output-len is too small for it.",
            code="bench_failed",
        )
    return DecodeRun(
        first_token=run.steps[decoding[0] - 1].end - run.start,
        steps=[run.steps[index] for index in decoding],
        durations=[run.steps[index].end - run.steps[index - 1].end for index in decoding],
    )


def _batch_latency(batch_size: int, runs: list[DecodeRun], traffic: Traffic) -> BatchLatency:
    durations = [duration for run in runs for duration in run.durations]
    first_token, between_tokens = summary(run.first_token for run in runs), summary(durations)
    assert first_token is not None
    assert between_tokens is not None
    moved = sum(traffic.bytes(step) for run in runs for step in run.steps)
    return BatchLatency(
        batch_size,
        first_token,
        between_tokens,
        tokens_per_second=batch_size * len(durations) / sum(durations),
        bytes_per_second=moved / sum(durations),
    )


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
