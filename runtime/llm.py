"""`LLM` and `AsyncLLM`: one engine, for a plain Python program and for many asyncio tasks at once."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, cast
from uuid import uuid4

from farrier.runtime import chat
from farrier.runtime.assembly import Assembly, AssemblyOptions, assemble
from farrier.runtime.core import EngineCore
from farrier.runtime.engine_thread import EngineThread
from farrier.runtime.outputs import CompletionOutput, CoreStats, Delta, RequestOutput
from farrier.runtime.request import Prompt, Sequence
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.scheduler import CapacityPolicy
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.engine import Engine, EngineConfig
from farrier.targets.errors import EngineError, OverloadedError, RequestError

Conversation = list[dict[str, Any]]

_NOT_STARTED = "The LLM is not started; use it in a `with` block, or call start() first."


class AsyncLLM:
    """Serves one engine to many asyncio tasks at once. The engine core runs in a thread of its own.

    engine: an engine directory, or a loaded Engine (then `tokenizer` says how text becomes tokens).
    kv_blocks: size of the KV pool; None: what can be used and fits into `kv_memory_fraction` of the free memory.
    max_queue: outputs that may wait before OverloadedError. Use it from one event loop.
    """

    def __init__(
        self,
        engine: str | Path | Engine,
        *,
        tokenizer: Tokenizer | None = None,
        capacity_policy: CapacityPolicy = "guaranteed_no_evict",
        kv_blocks: int | None = None,
        kv_memory_fraction: float = 0.8,
        max_queue: int = 512,
        enable_prefix_caching: bool = True,
    ) -> None:
        self._source = engine
        self._given_tokenizer = tokenizer
        self._options = AssemblyOptions(capacity_policy, kv_blocks, kv_memory_fraction, enable_prefix_caching)
        self._max_queue = max_queue
        self._parts: Assembly | None = None
        self._thread: EngineThread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deliveries: dict[str, _Delivery] = {}
        self._nothing_runs = asyncio.Event()
        self._failed = asyncio.Event()
        self._draining = False

    @property
    def config(self) -> EngineConfig:
        return self._started().engine.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: the engine serves token ids only."""
        return self._started().tokenizer

    @property
    def healthy(self) -> bool:
        """False before the start, after the stop, and once the engine has failed."""
        return self._thread is not None and self._thread.healthy

    @property
    def failure(self) -> EngineError | None:
        """Why the engine has failed, if it has."""
        return None if self._parts is None else self._parts.core.failure

    async def failed(self) -> None:
        """Returns once the engine has failed and every request was told."""
        await self._failed.wait()

    async def start(self) -> None:
        """Loads the engine (not on the event loop). Raises what loading raises."""
        self._loop = asyncio.get_running_loop()
        self._nothing_runs.set()
        self._parts = await asyncio.to_thread(assemble, self._source, self._given_tokenizer, self._options)
        self._thread = EngineThread(self._parts.core, self._deliver, self._max_queue)
        self._thread.start()

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Refuses new requests, lets those under way finish for `drain_seconds`, aborts the rest, frees the engine.
        A second call does nothing more."""
        self._draining = True
        if self._parts is None or self._thread is None:
            return
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._nothing_runs.wait(), drain_seconds)
        await asyncio.to_thread(self._thread.stop)
        await asyncio.to_thread(self._parts.engine.close)

    async def __aenter__(self) -> "AsyncLLM":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def stats(self) -> CoreStats:
        return self._started().core.stats()

    def generate(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> "RequestStream":
        """Checks the request and enqueues it at once, not at the first iteration.

        RequestError when it cannot be honoured, OverloadedError when the queue is full or the engine shuts down,
        EngineError when the engine has failed. Iterating yields a Delta for each step and output; every output ends
        with one that has a finish_reason. Closing the stream, cancelling the task that waits for it, or dropping
        it aborts the request at once, queued or running.
        """
        return self.submit(self.prepare(prompt, params, request_id=request_id))

    def prepare(self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None) -> list[Sequence]:
        """The part of `generate` that may take long: tokenizing, checking, compiling a grammar. Thread-safe."""
        return self._started().intake.sequences(request_id or uuid4().hex, prompt, params)

    def submit(self, sequences: list[Sequence]) -> "RequestStream":
        """The rest of `generate`: enqueues what `prepare` made."""
        thread, request_id = self._thread, sequences[0].request_id
        if thread is None:
            raise EngineError(_NOT_STARTED)
        if self._draining:
            raise OverloadedError("The engine is shutting down.")
        if request_id in self._deliveries:
            raise RequestError(f"A request {request_id!r} is already under way; ids must differ.", param="request_id")
        thread.submit(sequences)
        delivery = self._deliveries[request_id] = _Delivery(len(sequences))
        self._nothing_runs.clear()
        return RequestStream(delivery.deltas, len(sequences), partial(thread.abort, request_id))

    def _started(self) -> Assembly:
        if self._parts is None:
            raise EngineError(_NOT_STARTED)
        return self._parts

    def _deliver(self, deltas: list[Delta]) -> None:
        """Called in the engine's thread, once a step."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._dispatch, deltas)

    def _dispatch(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            delivery = self._deliveries[delta.request_id]
            delivery.deltas.put_nowait(delta)
            if delta.finish_reason is not None:
                delivery.num_unfinished -= 1
                if delivery.num_unfinished == 0:
                    del self._deliveries[delta.request_id]
        if not self._deliveries:
            self._nothing_runs.set()
        if self.failure is not None:
            self._failed.set()


@dataclass(slots=True)
class _Delivery:
    num_unfinished: int
    deltas: asyncio.Queue[Delta] = field(default_factory=asyncio.Queue)


class RequestStream(AsyncIterator[Delta]):
    """The deltas of one request's outputs, as they come. Made by `AsyncLLM.generate`."""

    def __init__(self, deltas: "asyncio.Queue[Delta]", num_outputs: int, abort: Callable[[], None]) -> None:
        self._deltas = deltas
        self._num_unfinished = num_outputs
        self._abort = abort

    async def __anext__(self) -> Delta:
        if self._num_unfinished == 0:
            raise StopAsyncIteration
        try:
            delta = await self._deltas.get()
        except asyncio.CancelledError:
            self._close()
            raise
        if delta.finish_reason is not None and self._num_unfinished > 0:
            self._num_unfinished -= 1
        return delta

    async def aclose(self) -> None:
        """Aborts what is still running; a delta may still be read by who waits for one already."""
        self._close()

    def _close(self) -> None:
        if self._num_unfinished > 0:
            self._num_unfinished = 0
            self._abort()

    def __del__(self) -> None:
        self._close()


class LLM:
    """One engine for a plain Python program: `with LLM(engine) as llm: llm.generate([...], SamplingParams(...))`.

    Works in the calling thread, one call at a time. The arguments are those of `AsyncLLM`.
    """

    def __init__(
        self,
        engine: str | Path | Engine,
        *,
        tokenizer: Tokenizer | None = None,
        capacity_policy: CapacityPolicy = "guaranteed_no_evict",
        kv_blocks: int | None = None,
        kv_memory_fraction: float = 0.8,
        enable_prefix_caching: bool = True,
    ) -> None:
        self._source = engine
        self._given_tokenizer = tokenizer
        self._options = AssemblyOptions(capacity_policy, kv_blocks, kv_memory_fraction, enable_prefix_caching)
        self._parts: Assembly | None = None

    @property
    def config(self) -> EngineConfig:
        return self._started().engine.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None: the engine takes and gives token ids only."""
        return self._started().tokenizer

    def start(self) -> None:
        """Loads the engine. Raises what loading raises."""
        self._parts = assemble(self._source, self._given_tokenizer, self._options)

    def stop(self) -> None:
        """Frees the engine; idempotent."""
        if self._parts is not None:
            self._parts.engine.close()
            self._parts = None

    def __enter__(self) -> "LLM":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stats(self) -> CoreStats:
        return self._started().core.stats()

    def generate(
        self, prompts: Prompt | list[Prompt], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes every prompt; results are in the prompts' order. params: one for all, or one for each prompt.

        RequestError, before anything runs, when a request cannot be honoured; EngineError when the engine fails. An
        output that fails alone ends with finish_reason "error" and says why in `error`. Ctrl-C aborts everything
        between two steps and raises KeyboardInterrupt; the engine stays usable.
        """
        prompts = prompts if isinstance(prompts, list) else [prompts]
        per_prompt = params if isinstance(params, list) else [params or SamplingParams()] * len(prompts)
        if len(per_prompt) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts have {len(per_prompt)} params; give one for each.", param="params"
            )
        parts = self._started()
        requests = [
            parts.intake.sequences(str(index), prompt, each)
            for index, (prompt, each) in enumerate(zip(prompts, per_prompt, strict=True))
        ]
        outputs = [_empty_output(prompt, request) for prompt, request in zip(prompts, requests, strict=True)]
        for delta in _run(parts.core, requests):
            output = outputs[int(delta.request_id)]
            output.outputs[delta.index].extend(delta)
            if delta.index == 0:
                output.num_cached_tokens = delta.num_cached_tokens
        return outputs

    def chat(
        self,
        messages: Conversation | list[Conversation],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, in OpenAI's shape, through the model's chat template."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError("Chat needs a tokenizer, but this engine was built without one.", param="messages")
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        prompts: list[Prompt] = [
            {"prompt_token_ids": chat.render(tokenizer, cast(Conversation, conversation), tools=tools)}
            for conversation in conversations
        ]
        return self.generate(prompts, params)

    def _started(self) -> Assembly:
        if self._parts is None:
            raise EngineError(_NOT_STARTED)
        return self._parts


def _run(core: EngineCore, requests: list[list[Sequence]]) -> Iterator[Delta]:
    """Runs the requests to their ends. Leaves nothing behind in the core, however it is left."""
    try:
        with _interrupt_between_steps() as check_interrupt:
            for request in requests:
                core.add(request)
            while core.has_work:
                yield from core.step()
                check_interrupt()
        core.check_alive()
        core.check_idle()
    finally:
        core.abort_all()


@contextmanager
def _interrupt_between_steps() -> Iterator[Callable[[], None]]:
    """Puts off Ctrl-C until the yielded function is called: in the middle of a step it would leave a mess."""
    interrupts: list[int] = []

    def check() -> None:
        if interrupts:
            raise KeyboardInterrupt

    def note(signum: int, frame: FrameType | None) -> None:
        interrupts.append(signum)

    # A program that handles the signal itself keeps doing so, and other threads never see it.
    is_ours = threading.current_thread() is threading.main_thread()
    if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, note)
        try:
            yield check
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    else:
        yield check


def _empty_output(prompt: Prompt, request: list[Sequence]) -> RequestOutput:
    first = request[0]
    return RequestOutput(
        request_id=first.request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=first.tokens.tolist(),
        outputs=[CompletionOutput(sequence.index) for sequence in request],
    )
