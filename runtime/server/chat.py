"""POST /v1/chat/completions."""

from typing import Any, Literal

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from farrier.runtime.chat import render
from farrier.runtime.outputs import CompletionOutput, Delta
from farrier.runtime.request import TokensPrompt
from farrier.runtime.sampling_params import GuidedDecoding, SamplingParams
from farrier.runtime.server.answer import Answer
from farrier.runtime.server.body import read_body
from farrier.runtime.server.generate import Request, prepare
from farrier.runtime.server.logprobs import chat_logprobs
from farrier.runtime.server.protocol import ChatCompletionRequest, Message, NamedToolChoice, TemplateOptions, Tool
from farrier.runtime.server.service import Service
from farrier.runtime.server.unblocked import LONG, unblocked
from farrier.runtime.tokenizer import Tokenizer
from farrier.runtime.tools import ContentDelta, ToolCallArguments, ToolCallStart, ToolEvent, ToolParser, parser_for
from farrier.targets.errors import RequestError


class ChatCompletion(Answer):
    """parsers: one a choice when the model may call tools, else empty."""

    id_prefix = "chatcmpl"
    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self, service: Service, body: ChatCompletionRequest, request: Request, parsers: list[ToolParser]
    ) -> None:
        super().__init__(service, body, [request])
        self._tokenizer = service.tokenizer("messages")
        self._parsers = parsers
        self._started = [False] * len(self.outputs)
        self._called = [False] * len(self.outputs)

    def choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        events = self._parse(index, output.text, ended=True)
        text = "".join(event.text for event in events if isinstance(event, ContentDelta))
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._called[index]:
            message["content"] = text or None
            message["tool_calls"] = _whole_calls(events)
        return {"index": index, "message": message} | self._rest(index, output)

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        deltas = [_chunk_delta(event) for event in self._parse(index, delta.text, delta.finish_reason is not None)]
        if not self._started[index]:
            self._started[index] = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        if not deltas and delta.logprobs is None and delta.finish_reason is None:
            return []
        bare = {"logprobs": None, "finish_reason": None}
        # Logprobs and the finish reason come with the last chunk of a step.
        if delta.finish_reason is not None or not deltas:
            deltas.append({})
        chunks = [{"index": index, "delta": part, **bare} for part in deltas[:-1]]
        return [*chunks, {"index": index, "delta": deltas[-1], **self._rest(index, delta)}]

    def _rest(self, index: int, output: CompletionOutput | Delta) -> dict[str, Any]:
        finish = output.finish_reason
        rest = {
            "logprobs": None if output.logprobs is None else chat_logprobs(self._tokenizer, output.logprobs),
            "finish_reason": "tool_calls" if finish == "stop" and self._called[index] else finish,
        }
        return rest if finish is None else rest | {"stop_reason": output.stop_reason}

    def _parse(self, index: int, text: str, ended: bool) -> list[ToolEvent]:
        if not self._parsers:
            return [ContentDelta(text)] if text else []
        parser = self._parsers[index]
        events = parser.feed(text) if text else []
        if ended:
            events = events + parser.finish()
        self._called[index] |= any(isinstance(event, ToolCallStart) for event in events)
        return events


def _chunk_delta(event: ToolEvent) -> dict[str, Any]:
    match event:
        case ContentDelta(text):
            return {"content": text}
        case ToolCallStart(index, call_id, name):
            call = {"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
            return {"tool_calls": [call]}
        case ToolCallArguments(index, fragment):
            return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}


def _whole_calls(events: list[ToolEvent]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case ToolCallStart(index, call_id, name):
                calls[index] = {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}
            case ToolCallArguments(index, fragment):
                calls[index]["function"]["arguments"] += fragment
            case ContentDelta():
                pass
    return list(calls.values())


async def create_chat_completion(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, ChatCompletionRequest, service.options)
    service.check_model(body.model)
    tokenizer = service.tokenizer("messages")
    tools = [] if body.tool_choice == "none" else body.tools or []
    parser = _parser(tokenizer) if tools else None
    params = _sampling_params(body, parser)
    prompt = TokensPrompt(prompt_token_ids=await render_chat(tokenizer, body.messages, body, tools))
    [request] = await prepare(service, body, [prompt], params)
    parsers = [_parser(tokenizer) for _ in request] if tools else []
    return await ChatCompletion(service, body, request, parsers).respond(http.receive)


async def render_chat(
    tokenizer: Tokenizer, messages: list[Message], options: TemplateOptions, tools: list[Tool]
) -> list[int]:
    """The prompt's token ids. Raises RequestError when the model's template cannot render the conversation."""
    plain = [message.model_dump(exclude_unset=True) for message in messages]
    to_continue = bool(options.continue_final_message)
    generation_prompt = not to_continue if options.add_generation_prompt is None else options.add_generation_prompt
    return await unblocked(
        lambda: render(
            tokenizer,
            plain,
            tools=_plain_tools(tools),
            add_generation_prompt=generation_prompt,
            continue_final_message=to_continue,
            template_kwargs=options.chat_template_kwargs,
        ),
        is_long=bool(tools) or sum(len(str(message)) for message in plain) > LONG,
    )


def _plain_tools(tools: list[Tool]) -> list[dict[str, Any]] | None:
    # `strict` is for the grammar; models were not trained to read it.
    return [tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in tools] or None


def _parser(tokenizer: Tokenizer) -> ToolParser:
    parser = parser_for(tokenizer)
    if parser is None:
        raise RequestError("This model's format of tool calls is not known, so it cannot use tools.", param="tools")
    return parser


def _sampling_params(body: ChatCompletionRequest, parser: ToolParser | None) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    if body.tool_choice is not None and not body.tools:
        raise RequestError("tool_choice needs tools.", param="tool_choice")
    both = body.max_tokens, body.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise RequestError("max_tokens and max_completion_tokens differ; give one.", param="max_tokens")
    changed: dict[str, Any] = {
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
    if parser is None:
        return body.sampling_params(guided=body.guided_decoding(), **changed)
    if body.guided_decoding() is not None:
        raise RequestError("A guided output leaves no room for tool calls; set tool_choice to none.", param="tools")
    if parser.needs_special_tokens:
        changed["skip_special_tokens"] = False
    return body.sampling_params(guided=_tool_guide(body, parser), **changed)


def _tool_guide(body: ChatCompletionRequest, parser: ToolParser) -> GuidedDecoding | None:
    tools, choice, parallel = body.tools or [], body.tool_choice, body.parallel_tool_calls is not False
    must_call: Literal["auto", "required"] = "required" if choice == "required" else "auto"
    if isinstance(choice, NamedToolChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            raise RequestError(
                f"tool_choice names '{choice.function.name}', which is none of the tools.", param="tool_choice"
            )
        must_call, parallel = "required", False
    guide = parser.guide_for(_plain_tools(tools) or [], must_call, parallel=parallel)
    if guide is None and not parallel:
        raise RequestError(
            "This model's calls cannot be limited to one with tool_choice auto.", param="parallel_tool_calls"
        )
    return guide
