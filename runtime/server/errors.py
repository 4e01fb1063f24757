"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}` and a status."""

import json
import math
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from pydantic_core import ErrorDetails
from starlette.requests import Request
from starlette.responses import Response

from farrier.targets.errors import FarrierError, OverloadedError, RequestError


class ApiError(FarrierError):
    """An error that has its own HTTP status. `retry_after`, in seconds, is sent as a header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code, retryable=retry_after is not None)
        self.status = status
        self.param = param
        self.retry_after = retry_after
        self.headers = headers or {}


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads an answer."""


def as_api_error(error: FarrierError) -> ApiError:
    """The HTTP face of any error farrier raises on purpose."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code=error.code, param=error.param)
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code=error.code, retry_after=error.retry_after)
    return ApiError(500, str(error), code=error.code)


def error_body(error: ApiError) -> dict[str, Any]:
    if error.status == 429:
        kind = "rate_limit_error"
    else:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: FarrierError) -> Response:
    api_error = as_api_error(error)
    headers = dict(api_error.headers)
    if api_error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(api_error.retry_after))
    return json_response(error_body(api_error), status=api_error.status, headers=headers)


def json_response(content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # ASCII with escapes: whatever a client or a model put into a string, it can be sent.
    return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")


def no_such_route(request: Request, status: int) -> ApiError:
    """The error for an unknown path (404), a wrong method (405), or whatever else routing says."""
    what = f"{request.method} {request.url.path}"
    if status == HTTPStatus.NOT_FOUND:
        return ApiError(status, f"Unknown request URL: {what}.", code="unknown_url")
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return ApiError(status, f"Not allowed to {what}.", code="method_not_allowed")
    return ApiError(status, HTTPStatus(status).phrase, code="invalid_request")


def internal_error() -> ApiError:
    """What a client is told about a bug."""
    return ApiError(500, "The server failed while it handled this request; its log says how.", code="internal")


def invalid_field(body: Any, errors: Sequence[ErrorDetails]) -> RequestError:
    """One error for what pydantic found wrong with `body`: the complaint about its first wrong field that got furthest.

    A union complains once for each of its members. The member that got furthest is the one that was meant.
    """
    paths = [_path(body, details) for details in errors]
    first = paths[0][:1]
    furthest = max((path for path in paths if path[:1] == first), key=_progress)
    found = [details for details, path in zip(errors, paths, strict=True) if path == furthest]
    param = _dotted(furthest)
    kind = found[0]["type"]
    if kind == "extra_forbidden":
        return RequestError(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if kind == "none_required":
        return RequestError(f"'{param}' is not supported.", param=param, code="unsupported_parameter")
    if kind in _MISSING:
        return RequestError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    reasons = " or ".join(dict.fromkeys(_reason(details) for details in found))
    return RequestError(f"Invalid '{param or 'body'}': {reasons}.", param=param, code="invalid_value")


_MISSING = ("missing", "union_tag_not_found")
_NOT_AN_OBJECT = ("model_type", "model_attributes_type", "dict_type")


def _reason(details: ErrorDetails) -> str:
    if details["type"] in _NOT_AN_OBJECT:
        return "Input should be an object"
    if details["type"] == "union_tag_invalid":
        return f"Input should be {details['ctx']['expected_tags']}"
    return details["msg"].replace(" after validation", "")


def _path(body: Any, details: ErrorDetails) -> tuple[int | str, ...]:
    """pydantic's location without the union members it names: only keys and indices that are in `body`."""
    path: list[int | str] = []
    *parents, last = details["loc"] or ("",)
    for step in parents:
        if _has(body, step):
            path.append(step)
            body = body[step]
    if _has(body, last) or (details["type"] == "missing" and isinstance(body, dict)):
        path.append(last)
    if details["type"] in ("union_tag_not_found", "union_tag_invalid"):
        path.append(details["ctx"]["discriminator"].strip("'"))
    return tuple(path)


def _has(body: Any, step: int | str) -> bool:
    if isinstance(body, list):
        return isinstance(step, int) and step < len(body)
    return isinstance(body, dict) and step in body


def _progress(path: tuple[int | str, ...]) -> tuple[int, list[int]]:
    return len(path), [step for step in path if isinstance(step, int)]


def _dotted(path: tuple[int | str, ...]) -> str | None:
    """`("messages", 0, "content")` → `messages[0].content`; None for the body itself."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or None
