"""`farrier serve`"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from farrier.agent.console import errors_console

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve_command(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless you say otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="FARRIER_API_KEY", help="Key clients must send; may be repeated. Without one, none is asked."
        ),
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name clients use instead of the engine's own.")] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait before others get a 429.")] = 512,
    request_timeout: Annotated[float, typer.Option(min=1, help="Seconds a request may take.")] = 600,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request body.")] = 4,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Seconds running requests may go on after SIGTERM.")] = 30,
    capacity_policy: Annotated[
        Literal["guaranteed_no_evict", "max_utilization"], typer.Option()
    ] = "guaranteed_no_evict",
    kv_blocks: Annotated[
        int | None, typer.Option(min=1, help="Size of the KV pool; by default as memory allows.")
    ] = None,
    kv_memory_fraction: Annotated[float, typer.Option(help="Share of the free memory the KV pool may take.")] = 0.8,
    prefix_caching: Annotated[bool, typer.Option(help="Reuse the KV cache of equal beginnings.")] = True,
) -> None:
    """Serve an engine behind an OpenAI-compatible API until SIGTERM or Ctrl-C."""
    from farrier.runtime.server.options import ServerOptions
    from farrier.runtime.server.serve import serve

    options = ServerOptions(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        served_model_name=served_model_name,
        max_queue=max_queue,
        request_timeout_s=request_timeout,
        max_body_bytes=int(max_body_mb * 2**20),
        drain_seconds=drain_seconds,
        capacity_policy=capacity_policy,
        kv_blocks=kv_blocks,
        kv_memory_fraction=kv_memory_fraction,
        enable_prefix_caching=prefix_caching,
    )
    if host not in _LOOPBACK and not api_key:
        errors_console().print(
            f"Warning: anybody who reaches {host} port {port} can use this server; set --api-key.", soft_wrap=True
        )
    serve(engine, options, on_ready=lambda url: _announce(url, engine, options.served_model_name, bool(api_key)))


def _announce(url: str, engine: Path, name: str | None, needs_key: bool) -> None:
    """One line to paste: it must work as it stands, in any shell."""
    from farrier.targets.engine_dir import read_config

    config = read_config(engine)
    model = name or config.model
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    path = "completions"
    body: dict[str, Any] = {"model": model, "prompt": [1, 2, 3], "max_tokens": 8}
    if config.has_tokenizer:
        path = "chat/completions"
        body = {"model": model, "messages": [{"role": "user", "content": "Hello, who are you?"}]}
    errors_console().print(f"Serving {model} at {url} (pid {os.getpid()}). Try:", highlight=False, soft_wrap=True)
    line = f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{json.dumps(body)}'"
    typer.echo(line)
