"""From a recorded exchange to what it says: times of the tokens, usage, or why it failed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import h11

from farrier.runtime.bench.recorder import Recording


@dataclass(frozen=True)
class Answer:
    """One streamed answer, in seconds of `time.perf_counter`.

    output_times: when each event that carries output came. Token counts are the server's own `usage`;
    cached_tokens is None when it does not tell.
    """

    start: float
    output_times: list[float]
    end: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None

    @property
    def first_token(self) -> float | None:
        """Seconds to the first output; None when the model had nothing to say."""
        return self.output_times[0] - self.start if self.output_times else None

    @property
    def duration(self) -> float:
        return self.end - self.start

    @property
    def gaps(self) -> list[float]:
        """Seconds between events that carry output; one token each, as a rule."""
        return [later - sooner for sooner, later in zip(self.output_times, self.output_times[1:], strict=False)]

    @property
    def per_output_token(self) -> float | None:
        """Mean seconds of a token after the first; None when there is none."""
        if self.output_tokens < 2 or not self.output_times:
            return None
        return (self.output_times[-1] - self.output_times[0]) / (self.output_tokens - 1)


@dataclass(frozen=True)
class Failure:
    """Why a request brought no whole answer: a `reason` to count by, and what was said about it."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class _BrokenError(Exception):
    """Its arguments are those of Failure."""


def replay(recording: Recording) -> Answer | Failure:
    if recording.start is None or (recording.failure is not None and not recording.arrivals):
        return Failure(recording.failure or "no connection")
    try:
        return _answer(recording.start, recording.arrivals)
    except _BrokenError as error:
        return Failure(*error.args)
    except h11.RemoteProtocolError as error:
        return Failure(recording.failure or "no whole HTTP response", "" if recording.failure else str(error))


def _answer(start: float, arrivals: list[tuple[float, bytes]]) -> Answer:
    output_times: list[float] = []
    end: float | None = None
    usage: dict[str, Any] | None = None
    for time, payload in _events(_body(arrivals)):
        if payload == b"[DONE]":
            end = time
            break
        chunk = _json(payload)
        if chunk.get("error"):
            raise _BrokenError("error event", _message(chunk))
        usage = chunk.get("usage") or usage
        if any(_carries_output(choice) for choice in chunk.get("choices") or []):
            output_times.append(time)
    if end is None:
        raise _BrokenError("the stream ended without [DONE]")
    if usage is None:
        raise _BrokenError("the stream tells no usage; the endpoint does not honour stream_options.include_usage")
    return Answer(
        start=start,
        output_times=output_times,
        end=end,
        prompt_tokens=int(usage["prompt_tokens"]),
        output_tokens=int(usage["completion_tokens"]),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
    )


def _body(arrivals: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The response's body as it came in. Raises _BrokenError when the status is not 200."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "x"), ("Content-Length", "0")]))
    connection.send(h11.EndOfMessage())
    status, refusal = 0, b""
    for time, data in [*arrivals, (0.0, b"")]:
        connection.receive_data(data)
        while (event := connection.next_event()) is not h11.NEED_DATA:
            match event:
                case h11.Response():
                    status = event.status_code
                case h11.Data() if status == 200:
                    yield time, bytes(event.data)
                case h11.Data():
                    refusal += bytes(event.data)
                case h11.EndOfMessage() | h11.ConnectionClosed():
                    if status != 200:
                        raise _BrokenError(f"HTTP {status}", _message(_json(refusal)))
                    return


def _events(body: Iterator[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """(time it was complete, its data) of every server-sent event."""
    rest = b""
    for time, data in body:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield time, line[5:].strip()


def _json(payload: bytes) -> dict[str, Any]:
    try:
        document = json.loads(payload)
    except ValueError:
        document = None
    return document if isinstance(document, dict) else {}


def _message(document: dict[str, Any]) -> str:
    error = document.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or document.get("message") or "no reason given")


def _carries_output(choice: dict[str, Any]) -> bool:
    """Text, token ids or a part of a tool call; not a role, a finish reason or what is held back."""
    source = choice.get("delta") or choice
    return any(source.get(key) for key in ("text", "token_ids", "content", "reasoning_content", "tool_calls"))
