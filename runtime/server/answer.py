"""What completions and chat completions have in common: from the prompts' tokens to an HTTP response."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar
from uuid import uuid4

from starlette.responses import Response
from starlette.types import Receive

from farrier.runtime.outputs import CompletionOutput, Delta
from farrier.runtime.server.errors import json_response
from farrier.runtime.server.generate import Request, Usage, generate, within_limits
from farrier.runtime.server.protocol import GenerationRequest
from farrier.runtime.server.service import Service
from farrier.runtime.server.sse import DONE, EventStream, encode, event


class Answer(ABC):
    """The answer to `body`: a choice for each output of each of the prepared `requests`."""

    id_prefix: ClassVar[str]
    whole_name: ClassVar[str]
    chunk_name: ClassVar[str]

    def __init__(self, service: Service, body: GenerationRequest, requests: list[Request]) -> None:
        self._service = service
        self._requests = requests
        self._body = body
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._usage = Usage(sum(outputs[0].num_prompt_tokens for outputs in requests))
        self.outputs = [output for outputs in requests for output in outputs]
        self.id = f"{self.id_prefix}-{uuid4().hex}"
        self._head = {
            "id": self.id,
            "object": self.whole_name,
            "created": int(time.time()),
            "model": service.model,
            "system_fingerprint": service.fingerprint,
        }

    @abstractmethod
    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        """Choice `index` of a whole answer."""

    @abstractmethod
    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """What a step adds to choice `index`: one choice object for each chunk of the stream; none for nothing."""

    async def respond(self, receive: Receive) -> Response:
        """receive: of the request, whose body has been read."""
        timeout_s = self._service.options.request_timeout_s
        if self._body.stream:
            return EventStream(self._events(), request_id=self.id, timeout_s=timeout_s)
        content = await within_limits(receive, self._whole(), timeout_s)
        return json_response(content, headers={"x-request-id": self.id})

    async def _whole(self) -> dict[str, Any]:
        outputs = [CompletionOutput(index) for index in range(len(self.outputs))]
        async with aclosing(generate(self._service, self._body, self._requests, self._usage)) as deltas:
            async for index, delta in deltas:
                outputs[index].extend(delta)
        choices = [self.choice(index, output) for index, output in enumerate(outputs)]
        return {**self._head, "choices": choices, "usage": self._usage.as_json()}

    async def _events(self) -> AsyncGenerator[bytes, None]:
        """Only `choices` differs from chunk to chunk, so everything else is encoded once."""
        head = {**self._head, "object": self.chunk_name}
        before = event({**head, "choices": []}).removesuffix(b"]}\n\n")
        after = b'],"usage":null}\n\n' if self._include_usage else b"]}\n\n"
        async with aclosing(generate(self._service, self._body, self._requests, self._usage)) as deltas:
            async for index, delta in deltas:
                data = b"".join(before + encode(choice) + after for choice in self.chunks(index, delta))
                if data:
                    yield data
        end = {**head, "choices": [], "usage": self._usage.as_json()}
        yield event(end) + DONE if self._include_usage else DONE
