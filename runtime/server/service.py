"""The state behind the endpoints: the engine, whether it is ready, and the names it goes by."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

from starlette.applications import Starlette

from farrier import __version__
from farrier.runtime.llm import AsyncLLM
from farrier.runtime.server.errors import ApiError
from farrier.runtime.server.metrics import Metrics
from farrier.runtime.server.options import ServerOptions
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.engine import EngineConfig
from farrier.targets.errors import RequestError

Phase = Literal["loading", "ready", "draining", "failed"]


class Service:
    """Loads `llm` in the background and takes it down again; `model`, `metrics` exist once it is ready."""

    model: str
    fingerprint: str
    metrics: Metrics

    def __init__(self, llm: AsyncLLM, options: ServerOptions) -> None:
        self.llm = llm
        self.options = options
        self.created = int(time.time())
        self.phase: Phase = "loading"
        self.failure: Exception | None = None
        self.loaded = asyncio.Event()
        """Set once `phase` is no longer "loading"."""

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Listening starts at once; until the engine is loaded, requests are told to come back."""
        loading = asyncio.create_task(self.load())
        try:
            yield
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            await self.llm.stop()

    async def load(self) -> None:
        try:
            await self.llm.start()
        except Exception as error:
            self.failure = error
            self.phase = "failed"
        else:
            self._introduce(self.llm.config)
            self.phase = "ready"
        self.loaded.set()

    def _introduce(self, config: EngineConfig) -> None:
        self.model = self.options.served_model_name or config.model
        self.fingerprint = f"farrier-{__version__}-{config.source_digest[:8]}"
        self.metrics = Metrics(self.model, config, self.llm.stats)

    async def drain(self) -> None:
        """Refuses new requests, gives running ones `drain_seconds`, then stops the engine. While loading: nothing."""
        if self.phase == "ready":
            self.phase = "draining"
            await self.llm.stop(self.options.drain_seconds)

    @property
    def is_loaded(self) -> bool:
        return self.phase in ("ready", "draining")

    def unavailable(self) -> ApiError | None:
        """Why no request can be served now, if so."""
        if self.phase == "loading":
            return ApiError(503, "The engine is still being loaded.", code="loading", retry_after=1)
        if self.phase == "draining":
            return ApiError(503, "The server is shutting down.", code="draining", retry_after=5)
        if self.phase == "failed":
            return ApiError(503, f"The engine could not be loaded: {self.failure}", code="engine_failed")
        if self.llm.failure is not None:
            return ApiError(
                503,
                f"The engine has failed, and the server ends: {self.llm.failure}",
                code="engine_failed",
                retry_after=5,
            )
        return None

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 when `name` is not the model served here."""
        if name is not None and name != self.model:
            raise ApiError(
                404, f"The model '{name}' is not served here; '{self.model}' is.", code="model_not_found", param="model"
            )

    def tokenizer(self, param: str) -> Tokenizer:
        """Raises RequestError, naming `param`, when the engine came without one."""
        if self.llm.tokenizer is None:
            raise RequestError("This engine has no tokenizer; send token ids to /v1/completions.", param=param)
        return self.llm.tokenizer
