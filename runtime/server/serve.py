"""Runs the server as a process: socket, uvicorn, signals."""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from farrier.runtime.llm import AsyncLLM
from farrier.runtime.server.app import create_app
from farrier.runtime.server.options import ServerOptions
from farrier.runtime.server.service import Service
from farrier.targets.errors import EngineError, TargetError

_LINGERING_SECONDS = 1.0
"""How long a server whose engine has failed still answers, so that who asks at that moment learns why."""
_HANGING_SECONDS = 6.0
"""How long after its engine's failure a process may take to end in an orderly way."""


def serve(
    engine_dir: Path,
    options: ServerOptions,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
    listener: socket.socket | None = None,
) -> None:
    """Serves the engine in `engine_dir` until SIGTERM or SIGINT, which drain. A second one, or one that comes while
    the engine is being loaded, ends the process at once.

    Once the engine has failed, requests are told so for a moment, then the server ends by itself, for its supervisor to
    start it again; whatever hangs by then is left behind with the process.

    on_ready: called once with the server's URL when it answers requests. listener: an open socket to serve on
    instead of options.host and options.port. Raises what loading the engine raises, EngineError when it has
    failed, and TargetError when the address cannot be listened on.
    """
    llm = AsyncLLM(
        engine_dir,
        capacity_policy=options.capacity_policy,
        kv_blocks=options.kv_blocks,
        kv_memory_fraction=options.kv_memory_fraction,
        max_queue=options.max_queue,
        enable_prefix_caching=options.enable_prefix_caching,
    )
    with listener or _listen(options.host, options.port) as listening:
        # Connections inherit it. asyncio would set it, but not on those of a socket made without a protocol number.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asyncio.run(_run(llm, options, listening, on_ready))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise TargetError(f"Cannot listen on {host} port {port}: {error.strerror}.", code="cannot_listen") from error


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _run(
    llm: AsyncLLM, options: ServerOptions, listening: socket.socket, on_ready: Callable[[str], None]
) -> None:
    app = create_app(llm, options)
    service: Service = app.state.service
    server = _Server(app, service)
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    loaded = asyncio.create_task(service.loaded.wait())
    await asyncio.wait({serving, loaded}, return_when=asyncio.FIRST_COMPLETED)
    loaded.cancel()
    if service.failure is not None:
        server.should_exit = True
    elif service.phase == "ready":
        on_ready(_url(listening))
        await _until_failure(llm, server, serving)
    await serving
    failure = service.failure or llm.failure
    if failure is not None:
        raise failure


async def _until_failure(llm: AsyncLLM, server: "_Server", serving: asyncio.Task[None]) -> None:
    """Returns when the server ends; makes it end when the engine has failed."""
    failed = asyncio.create_task(llm.failed())
    await asyncio.wait({serving, failed}, return_when=asyncio.FIRST_COMPLETED)
    failed.cancel()
    if llm.failure is not None:
        last_resort = threading.Timer(_HANGING_SECONDS, _give_up, (serving, llm.failure))
        last_resort.daemon = True
        last_resort.start()
        await asyncio.wait({serving}, timeout=_LINGERING_SECONDS)
        server.should_exit = True


def _give_up(serving: asyncio.Task[None], failure: EngineError) -> None:
    if not serving.done():  # else whoever called `serve` has said it
        print(f"farrier: {failure}", file=sys.stderr, flush=True)
    os._exit(1)


class _Server(uvicorn.Server):
    """uvicorn stops listening at the first signal; this one drains before, and says so to whoever still asks."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                timeout_keep_alive=75,  # longer than clients keep idle connections, so that it is they who close them
                timeout_graceful_shutdown=2,
            )
        )
        self._service = service
        self._signals = 0
        self._stopping: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1 or self._service.phase == "loading":
            os._exit(128 + sig)  # nothing is written anywhere that an orderly end would save
        self._loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        self._stopping = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        try:
            await self._service.drain()
        finally:
            self.should_exit = True
