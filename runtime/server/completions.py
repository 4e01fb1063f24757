"""POST /v1/completions."""

from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from farrier.runtime.outputs import CompletionOutput, Delta
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.server.answer import Answer
from farrier.runtime.server.body import read_body
from farrier.runtime.server.logprobs import CompletionLogprobs
from farrier.runtime.server.protocol import CompletionRequest
from farrier.runtime.server.service import Service
from farrier.runtime.server.unblocked import unblocked
from farrier.targets.errors import RequestError


class Completion(Answer):
    """echoes: the text each prompt's choices begin with; empty when the request did not ask for it."""

    id_prefix = "cmpl"
    whole_name = chunk_name = "text_completion"

    def __init__(
        self,
        service: Service,
        request: CompletionRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        echoes: list[str],
    ) -> None:
        super().__init__(service, request, prompts, params)
        self._echoes = echoes
        # Without a tokenizer there is no text; then the ids are the answer.
        self._with_ids = service.llm.tokenizer is None if request.return_token_ids is None else request.return_token_ids
        self._started = [False] * self.num_choices
        self._logprobs = [CompletionLogprobs(service.llm.tokenizer) for _ in range(self.num_choices)]

    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        return self._written(index, output)

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        nothing = not delta.text and delta.logprobs is None and delta.finish_reason is None and not self._with_ids
        if nothing and self._started[index]:
            return []
        return [self._written(index, delta)]

    def _written(self, index: int, output: CompletionOutput | Delta) -> dict[str, Any]:
        first, self._started[index] = not self._started[index], True
        prompt = index // self.params.n
        written: dict[str, Any] = {
            "index": index,
            "text": self._echoes[prompt] + output.text if first and self._echoes else output.text,
            "logprobs": None if output.logprobs is None else self._logprobs[index].add(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._with_ids:
            written["token_ids"] = output.token_ids
            if first:
                written["prompt_token_ids"] = self.prompts[prompt]
        return written


async def create_completion(service: Service, request: Request) -> Response:
    body = await read_body(request, CompletionRequest, service.options)
    service.check_model(body.model)
    params = _sampling_params(body)
    given = _prompts(body, service.options.max_queue)
    length = sum(map(len, given))
    prompts = await unblocked(length, lambda: [_encode(service, prompt) for prompt in given])
    echoes = await unblocked(length, lambda: [_decode(service, prompt) for prompt in given]) if body.echo else []
    return await Completion(service, body, prompts, params, echoes).respond(request, stream=body.stream)


def _sampling_params(body: CompletionRequest) -> SamplingParams:
    if body.echo and body.logprobs is not None:
        raise RequestError("echo cannot be combined with logprobs: prompts have none here.", param="echo")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported beyond n; leave it out.", param="best_of")
    return body.sampling_params(guided=body.guided_decoding(), logprobs=body.logprobs)


def _prompts(body: CompletionRequest, limit: int) -> list[str | list[int]]:
    match body.prompt:
        case str() | [int(), *_]:
            return [cast("str | list[int]", body.prompt)]
        case _ if len(body.prompt) > limit:
            raise RequestError(f"A request may have at most {limit} prompts.", param="prompt")
        case _:
            return cast("list[str | list[int]]", body.prompt)


def _encode(service: Service, prompt: str | list[int]) -> list[int]:
    return service.tokenizer("prompt").encode(prompt) if isinstance(prompt, str) else prompt


def _decode(service: Service, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else service.tokenizer("echo").decode(prompt)
