"""What an operator may set about the server."""

from dataclasses import dataclass

from farrier.runtime.scheduler import CapacityPolicy


@dataclass(frozen=True)
class ServerOptions:
    """Options of `serve` and `create_app`.

    api_keys: when given, every endpoint but /health wants one of them as a bearer token.
    served_model_name: the name clients use; None is the engine's own.
    max_queue: requests that may wait; one more is answered with 429.
    request_timeout_s: how long a request's body may take to arrive, and then how long its answer may take.
    drain_seconds: how long running requests may go on after a SIGTERM.
    The rest is what `AsyncLLM` takes.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_name: str | None = None
    max_queue: int = 512
    request_timeout_s: float = 600.0
    max_body_bytes: int = 4 * 2**20
    drain_seconds: float = 30.0
    capacity_policy: CapacityPolicy = "guaranteed_no_evict"
    kv_blocks: int | None = None
    kv_memory_fraction: float = 0.8
    enable_prefix_caching: bool = True
