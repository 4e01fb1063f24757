"""Reading a request's body: bounded in size and time, strict JSON, checked against a model."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from starlette.types import Receive

from farrier.runtime.server.errors import ApiError, ClientGoneError, invalid_field
from farrier.runtime.server.options import ServerOptions
from farrier.targets.errors import RequestError

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, model: type[Model], options: ServerOptions) -> Model:
    """The body as a `model`. Raises RequestError naming the field, or ApiError 408, 413 or 415."""
    # Only JSON: what a web page can send anywhere without asking (a form, text/plain) is refused.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415, "Send JSON with the header 'Content-Type: application/json'.", code="unsupported_media_type"
        )
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > options.max_body_bytes:
        raise _too_large(options)
    try:
        raw = await asyncio.wait_for(_receive_all(request.receive, options), options.request_timeout_s)
    except asyncio.TimeoutError:
        raise ApiError(408, "The request's body did not arrive in time.", code="request_timeout") from None
    return parse(raw, model)


def parse(raw: bytes, model: type[Model]) -> Model:
    """Raises RequestError: the body is not strict JSON (NaN, lone surrogates, bad UTF-8), or not a `model`."""
    try:
        content = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        raise invalid_field(content, details) from None


async def _receive_all(receive: Receive, options: ServerOptions) -> bytes:
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        more = message.get("more_body", False)
        if size > options.max_body_bytes:
            raise _too_large(options)
    return b"".join(chunks)


def _too_large(options: ServerOptions) -> ApiError:
    # The rest of the body is still on its way: close, so that nobody waits for it.
    return ApiError(
        413,
        f"The body is larger than {options.max_body_bytes} bytes.",
        code="body_too_large",
        headers={"connection": "close"},
    )
