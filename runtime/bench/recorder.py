"""The load client's hot path: send a request, write down what comes back and when, look at it later.

The client shares its processor with the server it measures. Reading a stream through an HTTP library costs more than
100 µs of it a token; noting the time and the bytes costs less than 30, and all parsing waits until the load is over.
"""

import asyncio
import ssl
from dataclasses import dataclass, field
from time import perf_counter

import h11


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. `path` is what stands before `/v1`, usually nothing."""

    host: str
    port: int
    tls: bool
    path: str
    api_key: str | None

    def post(self, path: str, body: bytes) -> bytes:
        """The bytes of a POST request; the server is asked to close the connection after its answer."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = [
            ("Host", f"{host}:{self.port}"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        if self.api_key is not None:
            headers.append(("Authorization", f"Bearer {self.api_key}"))
        connection = h11.Connection(h11.CLIENT)
        request = h11.Request(method="POST", target=self.path + path, headers=headers)
        return (connection.send(request) or b"") + (connection.send(h11.Data(body)) or b"")


@dataclass(slots=True)
class Recording:
    """One exchange, in seconds of `time.perf_counter`. `start`: when the request was written to an open connection;
    None when there never was one. `failure`: what broke the exchange off, if anything did."""

    start: float | None = None
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    failure: str | None = None


async def record(endpoint: Endpoint, request: bytes, timeout_s: float) -> Recording:
    """Sends `request` over a connection of its own and records until the server closes it. Never raises for what
    the network or the server does."""
    recording = Recording()
    try:
        await asyncio.wait_for(_exchange(endpoint, request, recording), timeout_s)
    except asyncio.TimeoutError:
        recording.failure = f"no end within {timeout_s:g} s"
    except OSError as error:
        recording.failure = f"{type(error).__name__}: {error.strerror or error}"
    return recording


async def _exchange(endpoint: Endpoint, request: bytes, recording: Recording) -> None:
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()
    tls = ssl.create_default_context() if endpoint.tls else None
    transport, _ = await loop.create_connection(
        lambda: _Recorder(recording.arrivals, closed), endpoint.host, endpoint.port, ssl=tls
    )
    try:
        recording.start = perf_counter()
        transport.write(request)
        await closed
    finally:
        transport.close()


class _Recorder(asyncio.Protocol):
    def __init__(self, arrivals: list[tuple[float, bytes]], closed: "asyncio.Future[None]") -> None:
        self._arrivals = arrivals
        self._closed = closed

    def data_received(self, data: bytes) -> None:
        self._arrivals.append((perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if self._closed.done():
            return
        if error is None:
            self._closed.set_result(None)
        else:
            self._closed.set_exception(error)
