"""POST /tokenize and /detokenize, in vLLM's shapes."""

from starlette.requests import Request
from starlette.responses import Response

from farrier.runtime.server.body import read_body
from farrier.runtime.server.chat import render_chat
from farrier.runtime.server.errors import json_response
from farrier.runtime.server.protocol import DetokenizeRequest, TokenizeRequest
from farrier.runtime.server.service import Service
from farrier.runtime.server.unblocked import LONG, unblocked
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.errors import RequestError

_OF_MESSAGES = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


async def tokenize(service: Service, request: Request) -> Response:
    body = await read_body(request, TokenizeRequest, service.options)
    service.check_model(body.model)
    tokens = await _tokens(service.tokenizer("prompt"), body)
    answer = {"count": len(tokens), "max_model_len": service.llm.config.ceilings.max_seq_len, "tokens": tokens}
    if body.return_token_strs:
        answer["token_strs"] = [service.tokenizer("prompt").token_text(token_id) for token_id in tokens]
    return json_response(answer)


async def _tokens(tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        if body.prompt is not None or body.add_special_tokens is not None:
            name = "add_special_tokens" if body.prompt is None else "prompt"
            raise RequestError(f"{name} cannot be combined with messages.", param=name)
        return await render_chat(tokenizer, body.messages, body, body.tools or [])
    prompt = body.prompt
    if prompt is None:
        raise RequestError("Give a prompt or messages.", param="prompt", code="missing_required_parameter")
    for name in _OF_MESSAGES:
        if getattr(body, name) is not None:
            raise RequestError(f"{name} needs messages.", param=name)
    special = body.add_special_tokens is not False
    return await unblocked(lambda: tokenizer.encode(prompt, add_special_tokens=special), is_long=len(prompt) > LONG)


async def detokenize(service: Service, request: Request) -> Response:
    body = await read_body(request, DetokenizeRequest, service.options)
    service.check_model(body.model)
    tokenizer = service.tokenizer("tokens")
    prompt = await unblocked(
        lambda: tokenizer.decode(body.tokens, skip_special_tokens=False), is_long=len(body.tokens) > LONG
    )
    return json_response({"prompt": prompt})
