"""`LLM` and `AsyncLLM`: an engine, its tokenizer and the engine core put together, for Python programs and the server."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from farrier.runtime.outputs import CoreStats, Delta, RequestOutput
from farrier.runtime.request import Prompt
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.engine import Engine, EngineConfig


class AsyncLLM:
    """Serves one engine to many asyncio tasks at once. The engine core runs in a thread of its own.

    engine: an engine directory, or a loaded Engine (then `tokenizer` says how text becomes tokens).
    Attributes `config` and `tokenizer` (None: the engine serves token ids only) are set by `start`.
    """

    config: EngineConfig
    tokenizer: Tokenizer | None

    def __init__(
        self,
        engine: str | Path | Engine,
        *,
        tokenizer: Tokenizer | None = None,
        capacity_policy: str = "guaranteed_no_evict",
        kv_blocks: int | None = None,
        kv_memory_fraction: float = 0.8,
        max_queue: int = 512,
        enable_prefix_caching: bool = True,
    ) -> None: ...

    async def start(self) -> None: ...

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuses new requests, lets running ones finish for up to `drain_seconds`, aborts the rest, frees the engine."""

    async def __aenter__(self) -> "AsyncLLM": ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def healthy(self) -> bool: ...

    def stats(self) -> CoreStats: ...

    def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> "RequestStream":
        """Checks and enqueues the request at once (not at the first iteration): RequestError when it cannot be
        honoured, OverloadedError when the queue is full or the server drains, EngineError when the engine died.
        Iterating yields one Delta a step and output; `aclose()`, cancelling the waiting task or dropping the
        stream aborts the request at once, queued or running."""


class RequestStream(AsyncIterator[Delta]):
    async def __anext__(self) -> Delta: ...

    async def aclose(self) -> None: ...


class LLM:
    """The same engine for a plain Python program: `with LLM(engine) as llm: llm.generate([...], params)`."""

    def __init__(
        self,
        engine: str | Path | Engine,
        *,
        tokenizer: Tokenizer | None = None,
        capacity_policy: str = "guaranteed_no_evict",
        kv_blocks: int | None = None,
        kv_memory_fraction: float = 0.8,
        enable_prefix_caching: bool = True,
    ) -> None: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]: ...
