"""One HTTP request's work in the engine, and the race between that work, the client and the clock."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Receive

from farrier.runtime.llm import RequestStream
from farrier.runtime.outputs import Delta
from farrier.runtime.request import Prompt, Sequence
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.server.errors import ApiError, ClientGoneError
from farrier.runtime.server.metrics import RequestTimer
from farrier.runtime.server.protocol import GenerationRequest
from farrier.runtime.server.service import Service
from farrier.runtime.server.unblocked import LONG, unblocked
from farrier.targets.errors import EngineError, OverloadedError, RequestError

Result = TypeVar("Result")


@dataclass
class Usage:
    """Tokens of one HTTP request, counted as they come."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


Request = list[Sequence]
"""What `AsyncLLM.prepare` makes of a prompt: its `n` outputs."""


async def prepare(
    service: Service, body: GenerationRequest, prompts: list[Prompt], params: SamplingParams
) -> list[Request]:
    """Tokenizes, checks and compiles, without holding up anybody else. Raises RequestError in the client's words."""
    is_long = params.guided is not None or sum(map(_length, prompts)) > LONG
    try:
        return await unblocked(lambda: [service.llm.prepare(prompt, params) for prompt in prompts], is_long=is_long)
    except RequestError as error:
        raise body.in_its_words(error) from error


def _length(prompt: Prompt) -> int:
    return len(prompt if isinstance(prompt, str) else prompt["prompt_token_ids"])


async def generate(
    service: Service, body: GenerationRequest, requests: list[Request], usage: Usage
) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yields (choice, delta) until every choice has ended; choice = prompt × n + output.

    A full queue shows before the first delta; a choice that fails raises. Closing it aborts everything.
    """
    num_outputs = len(requests[0])
    async with AsyncExitStack() as stack:
        streams = []
        for request in requests:
            streams.append(_submit(service, request))
            stack.push_async_callback(streams[-1].aclose)
        timer = RequestTimer(service.metrics, len(requests) * num_outputs)
        stack.callback(timer.close)
        merged = await stack.enter_async_context(aclosing(_merge(streams)))
        async for prompt_index, delta in merged:
            choice = prompt_index * num_outputs + delta.index
            timer.observe(choice, delta)
            _raise_failure(delta, body)
            usage.completion_tokens += len(delta.token_ids)
            if delta.finish_reason is not None and delta.index == 0:
                usage.cached_tokens += delta.num_cached_tokens
            yield choice, delta


def _submit(service: Service, request: Request) -> RequestStream:
    try:
        return service.llm.submit(request)
    except (OverloadedError, EngineError) as error:
        raise service.unavailable() or error from error


async def _merge(streams: list[RequestStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yields (stream's index, delta) in the order of arrival."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    arrived: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()

    async def pump(index: int, stream: RequestStream) -> None:
        try:
            async for delta in stream:
                arrived.put_nowait((index, delta))
        finally:
            arrived.put_nowait(None)

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        for _ in pumps:
            while (item := await arrived.get()) is not None:
                yield item
        await asyncio.gather(*pumps)
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _raise_failure(delta: Delta, body: GenerationRequest) -> None:
    if delta.finish_reason == "error":
        if isinstance(delta.error, RequestError):
            raise body.in_its_words(delta.error)
        raise delta.error or ApiError(500, "The engine failed.", code="engine_failed")
    if delta.finish_reason == "abort":
        raise ApiError(503, "The server stopped before the answer was complete.", code="aborted", retry_after=5)


async def within_limits(receive: Receive, work: Coroutine[Any, Any, Result], timeout_s: float) -> Result:
    """The result of `work`, which is cancelled as soon as the client is gone (ClientGoneError) or time is up (504).

    The request's body must have been read: the next thing `receive` can say is that the client left.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if leaving.done():
            raise ClientGoneError
        # A retry would cost as much again and end the same: the header tells OpenAI's clients not to.
        raise ApiError(
            504,
            f"The answer took longer than the {timeout_s:g} s a request may take; ask for fewer tokens.",
            code="request_timeout",
            headers={"x-should-retry": "false"},
        )
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
