"""What every request passes before its endpoint, as plain ASGI: the host it asks for, its key, the server's state."""

import ipaddress
import secrets

from starlette.types import ASGIApp, Receive, Scope, Send

from farrier.runtime.server.errors import ApiError, error_response
from farrier.runtime.server.service import Service

ALWAYS_OPEN = ("/health", "/version")
"""Answered without a key and in every state."""


class Gate:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        options = service.options
        self._keys = [key.encode() for key in options.api_keys]
        # A web page can make a browser send requests here under a name of its own (DNS rebinding). On a loopback
        # address without a key, only loopback names are answered; a key protects by itself.
        self._loopback_only = not self._keys and is_loopback(options.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._loopback_only and not is_loopback(_hostname(headers.get(b"host", b""))):
            return ApiError(
                403, "Requests by this host name need an API key; start the server with --api-key.", code="bad_host"
            )
        if scope["path"] in ALWAYS_OPEN:
            return None
        if self._keys and not self._has_key(headers.get(b"authorization", b"")):
            return ApiError(
                401,
                "Send a valid API key in the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        if scope["method"] == "GET" and self._service.is_loaded:
            return None  # metrics and models can be read to the end
        return self._service.unavailable()

    def _has_key(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        matches = [secrets.compare_digest(given.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hostname(header: bytes) -> str:
    """`127.0.0.1:8000` → `127.0.0.1`, `[::1]:8000` → `::1`."""
    host = header.decode("latin-1")
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
