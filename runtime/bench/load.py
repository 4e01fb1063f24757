"""Closed- and open-loop load on an OpenAI endpoint, and what came of it."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from farrier.runtime.bench.recorder import Endpoint, Recording, record
from farrier.runtime.bench.replay import Answer, Failure, replay
from farrier.runtime.bench.statistics import Summary, summary
from farrier.runtime.bench.workload import BenchRequest
from farrier.targets.errors import FarrierError, RequestError


@dataclass(frozen=True)
class ClosedLoop:
    """`concurrency` clients, each of which asks again as soon as it is answered."""

    concurrency: int


@dataclass(frozen=True)
class OpenLoop:
    """Requests arrive as a Poisson process of `rate` a second, whatever the server does; infinite: all at once."""

    rate: float


@dataclass(frozen=True)
class ServeResult:
    """`seconds`: from the first request to the end of the last answer. Summaries are in seconds, None when there is
    nothing to summarize; first tokens count from the request being written to an open connection."""

    seconds: float
    answers: list[Answer]
    failures: list[Failure]
    first_token: Summary | None
    between_tokens: Summary | None
    per_output_token: Summary | None
    end_to_end: Summary | None

    @property
    def prompt_tokens(self) -> int:
        return sum(answer.prompt_tokens for answer in self.answers)

    @property
    def output_tokens(self) -> int:
        return sum(answer.output_tokens for answer in self.answers)

    @property
    def cached_tokens(self) -> int | None:
        """Of the prompts; None when the server does not tell."""
        cached = [answer.cached_tokens for answer in self.answers if answer.cached_tokens is not None]
        return sum(cached) if len(cached) == len(self.answers) else None

    @property
    def failures_by_reason(self) -> dict[str, int]:
        return dict(Counter(failure.reason for failure in self.failures).most_common())


def parse_endpoint(base_url: str, api_key: str | None) -> Endpoint:
    """`http://HOST:PORT`, with or without `/v1` and a path before it. Raises RequestError."""
    try:
        parts = urlsplit(base_url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(f"--base-url is like http://127.0.0.1:8000, not {base_url!r}.", param="base_url")
    path = parts.path.rstrip("/").removesuffix("/v1")
    tls = parts.scheme == "https"
    return Endpoint(parts.hostname, port or (443 if tls else 80), tls, path, api_key)


def served_model(base_url: str, api_key: str | None) -> str:
    """The first model of the endpoint's list. Raises FarrierError when it cannot be asked."""
    url = base_url.rstrip("/").removesuffix("/v1") + "/v1/models"
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(url, headers=headers, timeout=30)
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise FarrierError(f"{url} names no model ({error}); give --model.", code="bench_failed") from error


def encode_request(endpoint: Endpoint, request: BenchRequest, model: str, *, ignore_eos: bool) -> bytes:
    """The HTTP request: chat completions for a conversation, else completions; greedy, streamed, with usage."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ignore_eos:
        body["ignore_eos"] = True
    match request.prompt:
        case list(messages):
            path, body["messages"] = "/v1/chat/completions", messages
        case str(text):
            path, body["prompt"] = "/v1/completions", text
        case tokens:
            path, body["prompt"] = "/v1/completions", tokens["prompt_token_ids"]
    return endpoint.post(path, json.dumps(body).encode())


async def run_load(
    endpoint: Endpoint,
    requests: list[bytes],
    load: ClosedLoop | OpenLoop,
    *,
    rng: np.random.Generator,
    timeout_s: float,
    on_done: Callable[[], None] = lambda: None,
) -> ServeResult:
    """Sends what `encode_request` made. Requests that fail are counted, and never sent again."""

    async def one(request: bytes) -> Recording:
        recording = await record(endpoint, request, timeout_s)
        on_done()
        return recording

    if isinstance(load, ClosedLoop):
        recordings = await _closed(requests, load.concurrency, one)
    else:
        recordings = await _open(requests, load.rate, one, rng)
    return _result([replay(recording) for recording in recordings])


_Send = Callable[[bytes], Coroutine[Any, Any, Recording]]


async def _closed(requests: list[bytes], concurrency: int, send: _Send) -> list[Recording]:
    waiting = iter(requests)

    async def client() -> list[Recording]:
        return [await send(request) for request in waiting]

    clients = await asyncio.gather(*(client() for _ in range(concurrency)))
    return [recording for recordings in clients for recording in recordings]


async def _open(requests: list[bytes], rate: float, send: _Send, rng: np.random.Generator) -> list[Recording]:
    loop = asyncio.get_running_loop()
    waits = np.zeros(len(requests)) if math.isinf(rate) else rng.exponential(1 / rate, len(requests))
    # Times since the start, not sleeps between requests: those would add up their delays.
    due = loop.time() + np.cumsum(waits) - waits[0]
    tasks = []
    for when, request in zip(due.tolist(), requests, strict=True):
        if (wait := when - loop.time()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(send(request)))
    return await asyncio.gather(*tasks)


def _result(outcomes: list[Answer | Failure]) -> ServeResult:
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    seconds = 0.0
    if answers:
        seconds = max(answer.end for answer in answers) - min(answer.start for answer in answers)
    return ServeResult(
        seconds=seconds,
        answers=answers,
        failures=failures,
        first_token=summary(answer.first_token for answer in answers if answer.first_token is not None),
        between_tokens=summary(gap for answer in answers for gap in answer.gaps),
        per_output_token=summary(answer.per_output_token for answer in answers if answer.per_output_token is not None),
        end_to_end=summary(answer.duration for answer in answers),
    )
