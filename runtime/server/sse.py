"""Server-sent events: one write to the socket for whatever a step brought."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from farrier.runtime.server.errors import ClientGoneError, as_api_error, error_body, internal_error
from farrier.runtime.server.generate import within_limits
from farrier.targets.errors import FarrierError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


_encoder = json.JSONEncoder(allow_nan=False, check_circular=False, separators=(",", ":"))


def encode(content: Any) -> bytes:
    """JSON in ASCII, so that no string can break out of a line or of UTF-8."""
    return _encoder.encode(content).encode("ascii")


def event(content: Any) -> bytes:
    return b"data: " + encode(content) + b"\n\n"


class EventStream(Response):
    """Sends the events that `events` yields, already encoded; each item is one write.

    Headers go out with the first item, so that a request which fails before it gets a real status. A failure after
    that becomes an event. Closes `events` at once when the client leaves or `timeout_s` is over.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], *, request_id: str, timeout_s: float) -> None:
        super().__init__()
        self._events = events
        self._timeout_s = timeout_s
        self._start_headers = [*_HEADERS, (b"x-request-id", request_id.encode("ascii"))]
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await within_limits(receive, self._send_all(send), self._timeout_s)
        except ClientGoneError:
            return
        except Exception as error:
            if not self._started:
                raise
            if not isinstance(error, FarrierError):
                log.exception("a stream broke off")
            known = as_api_error(error) if isinstance(error, FarrierError) else internal_error()
            await _send_last(send, event(error_body(known)))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for data in events:
                if not self._started:
                    await send({"type": "http.response.start", "status": 200, "headers": self._start_headers})
                    self._started = True
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_last(send: Send, data: bytes) -> None:
    # A client that stopped reading would block this for ever; uvicorn closes its connection instead.
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(send({"type": "http.response.body", "body": data, "more_body": False}), 1.0)
