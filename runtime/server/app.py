"""The FastAPI application: routes, error handlers, and the gate in front of them."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from farrier import __version__
from farrier.runtime.llm import AsyncLLM
from farrier.runtime.server.chat import create_chat_completion
from farrier.runtime.server.completions import create_completion
from farrier.runtime.server.errors import (
    ClientGoneError,
    error_response,
    internal_error,
    json_response,
    no_such_route,
)
from farrier.runtime.server.gate import Gate
from farrier.runtime.server.options import ServerOptions
from farrier.runtime.server.service import Service
from farrier.runtime.server.tokenize import detokenize, tokenize
from farrier.targets.errors import FarrierError


def create_app(llm: AsyncLLM, options: ServerOptions) -> FastAPI:
    """An application that starts `llm` when it starts, stops it when it stops, and serves it in between.

    Its `state.service` is the Service, for whoever runs it.
    """
    service = Service(llm, options)
    app = FastAPI(
        title="farrier", version=__version__, openapi_url=None, redirect_slashes=False, lifespan=service.lifespan
    )
    app.state.service = service
    app.add_middleware(Gate, service=service)
    _handle_errors(app)
    _add_routes(app)
    return app


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]


def _add_routes(app: FastAPI) -> None:
    @app.get("/health")
    async def health(service: ServiceDep) -> Response:
        problem = service.unavailable()
        return json_response({"status": "ok"}) if problem is None else error_response(problem)

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/metrics")
    async def metrics(service: ServiceDep) -> Response:
        return Response(service.metrics.expose(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(service: ServiceDep) -> Response:
        return json_response({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str, service: ServiceDep) -> Response:
        service.check_model(model)
        return json_response(_model(service))

    @app.post("/v1/completions")
    async def completions(request: Request, service: ServiceDep) -> Response:
        return await create_completion(service, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, service: ServiceDep) -> Response:
        return await create_chat_completion(service, request)

    @app.post("/tokenize")
    async def tokenize_(request: Request, service: ServiceDep) -> Response:
        return await tokenize(service, request)

    @app.post("/detokenize")
    async def detokenize_(request: Request, service: ServiceDep) -> Response:
        return await detokenize(service, request)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "farrier",
        "max_model_len": service.llm.config.ceilings.max_seq_len,
    }


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(FarrierError)
    async def on_known_error(request: Request, error: FarrierError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_routing_error(request: Request, error: HTTPException) -> Response:
        response = error_response(no_such_route(request, error.status_code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGoneError)
    async def on_client_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)  # for the log of whoever wraps this; nobody reads it

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        return error_response(internal_error())  # whoever runs this logs the traceback
