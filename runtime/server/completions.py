"""POST /v1/completions."""

from typing import Any, cast

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from farrier.runtime.outputs import CompletionOutput, Delta
from farrier.runtime.request import Prompt, TokensPrompt
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.server.answer import Answer
from farrier.runtime.server.body import read_body
from farrier.runtime.server.generate import Request, prepare
from farrier.runtime.server.logprobs import CompletionLogprobs
from farrier.runtime.server.protocol import CompletionRequest
from farrier.runtime.server.service import Service
from farrier.runtime.server.unblocked import unblocked
from farrier.targets.errors import RequestError


class Completion(Answer):
    """echoes: the text each prompt's choices begin with; empty when the request did not ask for it."""

    id_prefix = "cmpl"
    whole_name = chunk_name = "text_completion"

    def __init__(self, service: Service, body: CompletionRequest, requests: list[Request], echoes: list[str]) -> None:
        super().__init__(service, body, requests)
        tokenizer = service.llm.tokenizer
        # Without a tokenizer there is no text; then the ids are the answer.
        self._with_ids = tokenizer is None if body.return_token_ids is None else body.return_token_ids
        self._prompt_ids = [output.tokens.tolist() for output in self.outputs] if self._with_ids else []
        self._echoes = [echo for echo in echoes for _ in requests[0]] or [""] * len(self.outputs)
        self._started = [False] * len(self.outputs)
        self._logprobs = [CompletionLogprobs(tokenizer) for _ in self.outputs]

    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        return self._written(index, output)

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        nothing = not delta.text and delta.logprobs is None and delta.finish_reason is None and not self._with_ids
        if nothing and self._started[index]:
            return []
        return [self._written(index, delta)]

    def _written(self, index: int, output: CompletionOutput | Delta) -> dict[str, Any]:
        first, self._started[index] = not self._started[index], True
        written: dict[str, Any] = {
            "index": index,
            "text": self._echoes[index] + output.text if first else output.text,
            "logprobs": None if output.logprobs is None else self._logprobs[index].add(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._with_ids:
            written["token_ids"] = output.token_ids
            if first:
                written["prompt_token_ids"] = self._prompt_ids[index]
        return written


async def create_completion(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, CompletionRequest, service.options)
    service.check_model(body.model)
    prompts = _prompts(body, service.options.max_queue)
    requests = await prepare(service, body, prompts, _sampling_params(body))
    echoes = await unblocked(lambda: [_text(service, prompt) for prompt in prompts], is_long=True) if body.echo else []
    return await Completion(service, body, requests, echoes).respond(http.receive)


def _sampling_params(body: CompletionRequest) -> SamplingParams:
    if body.echo and body.logprobs is not None:
        raise RequestError("echo cannot be combined with logprobs: prompts have none here.", param="echo")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported beyond n; leave it out.", param="best_of")
    return body.sampling_params(guided=body.guided_decoding(), logprobs=body.logprobs)


def _prompts(body: CompletionRequest, limit: int) -> list[Prompt]:
    match body.prompt:
        case str(text):
            return [text]
        case [int(), *_] as token_ids:
            return [TokensPrompt(prompt_token_ids=cast("list[int]", token_ids))]
        case prompts if len(prompts) <= limit:
            return [_prompt(prompt) for prompt in cast("list[str | list[int]]", prompts)]
        case _:
            raise RequestError(f"A request may have at most {limit} prompts.", param="prompt")


def _prompt(prompt: str | list[int]) -> Prompt:
    return prompt if isinstance(prompt, str) else TokensPrompt(prompt_token_ids=prompt)


def _text(service: Service, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else service.tokenizer("echo").decode(prompt["prompt_token_ids"])
