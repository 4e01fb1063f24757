"""What clients may send: OpenAI's fields and the sampling fields vLLM added to them, strictly typed.

Every field is known by name. One that OpenAI defines and that cannot be honoured here is typed `None`, so that
only leaving it out (or null) is accepted. One that changes nothing about the answer is accepted and not read.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from farrier.runtime.sampling_params import MAX_LOGPROBS, GuidedDecoding, SamplingParams
from farrier.targets.errors import RequestError

NonNegative = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
TokenIds = Annotated[list[NonNegative], Field(fail_fast=True)]
TokenKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(Strict):
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's name for guided decoding; exactly one field."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None


class GenerationRequest(Strict):
    """What completions and chat completions share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Positive | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[TokenKey, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: Positive | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: NonNegative | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    user: str | None = None

    def sampling_params(self, **changed: Any) -> SamplingParams:
        """The fields that were given, then `changed`, over SamplingParams' defaults.

        Raises RequestError naming the field that is out of range.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true.", param="stream_options")
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}
        if self.top_k == -1:
            given["top_k"] = 0
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token_id): bias for token_id, bias in self.logit_bias.items()}
        return SamplingParams(**(given | changed))

    def in_its_words(self, error: RequestError) -> RequestError:
        """An error of the runtime, naming the field as the client wrote it."""
        return RequestError(str(error), param=self._spelling(error.param), code=error.code)

    def _spelling(self, param: str | None) -> str | None:
        if param is not None and param.startswith("guided"):
            return next(iter(self._guided_fields()), "tools")
        return param

    def _guided_fields(self) -> list[str]:
        found = [name for name in _GUIDED_FIELDS if getattr(self, name) is not None]
        if isinstance(self.response_format, TextFormat):
            found.remove("response_format")
        return found

    def guided_decoding(self) -> GuidedDecoding | None:
        """The one constraint on the output that the request gives, if any."""
        found = self._guided_fields()
        if not found:
            return None
        if len(found) > 1:
            raise RequestError(f"Give only one of {', '.join(found)}.", param=found[1])
        if found == ["response_format"]:
            return _response_format(self.response_format)
        if self.structured_outputs is not None:
            return _structured_outputs(self.structured_outputs)
        if self.guided_json is not None:
            return GuidedDecoding(json_schema=_schema(self.guided_json, "guided_json"))
        choice = None if self.guided_choice is None else tuple(self.guided_choice)
        return GuidedDecoding(regex=self.guided_regex, grammar=self.guided_grammar, choice=choice)


_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "priority",
    "skip_special_tokens",
)
"""Fields that SamplingParams takes as they are, under the same name."""

_GUIDED_FIELDS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


def _response_format(wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> GuidedDecoding:
    if isinstance(wanted, JsonSchemaFormat):
        return GuidedDecoding(json_schema=wanted.json_schema.schema_)
    return GuidedDecoding(json_object=True)


def _structured_outputs(wanted: StructuredOutputs) -> GuidedDecoding:
    schema = None if wanted.json_ is None else _schema(wanted.json_, "structured_outputs.json")
    choice = None if wanted.choice is None else tuple(wanted.choice)
    given = [schema, wanted.regex, choice, wanted.grammar, wanted.json_object]
    if sum(constraint is not None for constraint in given) != 1:
        raise RequestError(
            "structured_outputs needs exactly one of json, regex, choice, grammar and json_object.",
            param="structured_outputs",
        )
    return GuidedDecoding(
        json_schema=schema,
        regex=wanted.regex,
        choice=choice,
        grammar=wanted.grammar,
        json_object=bool(wanted.json_object),
    )


def _schema(value: dict[str, Any] | str, param: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise RequestError(f"{param} is not a JSON schema object.", param=param)
    return schema


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    echo: bool | None = None
    return_token_ids: bool | None = None
    logprobs: NonNegative | None = None
    best_of: Positive | None = None
    suffix: None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


Content = str | list[TextPart]


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Strict):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Strict):
    """Takes what a client got from this server, or from OpenAI, and sends back."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class FunctionDefinition(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    name: str


class NamedToolChoice(Strict):
    type: Literal["function"]
    function: NamedFunction


class TemplateOptions(Strict):
    """What goes into the chat template beside the messages."""

    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatCompletionRequest(GenerationRequest, TemplateOptions):
    messages: Messages
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None

    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    verbosity: Literal["medium"] | None = None

    audio: None = None
    function_call: None = None
    functions: None = None
    moderation: None = None
    prediction: None = None
    reasoning_effort: None = None
    web_search_options: None = None

    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    safety_identifier: str | None = None

    def _spelling(self, param: str | None) -> str | None:
        if param == "max_tokens" and self.max_tokens is None:
            return "max_completion_tokens"
        return "messages" if param == "prompt" else super()._spelling(param)


class TokenizeRequest(TemplateOptions):
    """vLLM's two shapes in one: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: TokenIds
