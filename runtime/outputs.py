"""What the runtime hands back: deltas while a request runs, whole outputs at its end, counters about it all."""

from dataclasses import dataclass, field
from typing import Literal

from farrier.targets.errors import FarrierError

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own distribution at one output position."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]
    """(token id, logprob) of the likeliest tokens, likeliest first; as many as the request asked for."""


@dataclass(slots=True)
class Delta:
    """What one step added to one output of a request.

    `text` may be empty while characters are held back. Every output ends with exactly one delta whose
    `finish_reason` is set; with "error", `error` says why.
    """

    request_id: str
    index: int
    """Which of the request's `n` outputs."""
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    """One entry a token id; None unless the request asked."""
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    """The stop token id or the stop string that matched; None for the model's own end-of-sequence token."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache when this output started."""
    error: FarrierError | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One finished output of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: FarrierError | None = None

    def extend(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason, self.stop_reason, self.error = delta.finish_reason, delta.stop_reason, delta.error


@dataclass(slots=True)
class RequestOutput:
    """A finished request: its prompt and its `n` outputs in order."""

    request_id: str
    prompt: str | None
    """None when the prompt was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CoreStats:
    """One look at the engine core. Gauges first, then counters that only grow."""

    num_running: int
    """Outputs that hold KV blocks now."""
    num_waiting: int
    """Outputs that wait for their first step, or to run again after a preemption."""
    num_kv_blocks: int
    """Size of the KV pool."""
    kv_cache_usage: float
    """0..1: blocks in use by running outputs; cached prefixes nobody uses count as free."""
    steps: int
    num_preemptions: int
    prompt_tokens: int
    """Prompt tokens of the outputs started so far."""
    generation_tokens: int
    prefix_cache_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int
    """Prompt tokens found there."""
