"""A conversation to the token ids of a prompt, through the model's own chat template."""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from farrier.runtime.chat_template import ChatTemplate
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool")

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt of a conversation in OpenAI's shape, rendered as transformers' `apply_chat_template` does.

    continue_final_message: leave the last message open, so that the model goes on with it.
    template_kwargs: further variables of the template, such as `enable_thinking`.

    Control tokens in the prompt are the template's own: one that is written in a message, a tool or a template
    variable stays plain text. No BOS token is added to what the template writes.
    Raises RequestError naming the field that cannot be honoured.
    """
    template = _template(tokenizer, has_tools=bool(tools))
    variables = dict(template_kwargs or {})
    _check_variables(template, variables)
    if continue_final_message and add_generation_prompt:
        raise RequestError(
            "continue_final_message goes on with the last message, so add_generation_prompt must be false.",
            param="continue_final_message",
        )
    chat = _normalize(messages, template)
    cut = " " + secrets.token_hex(16) + " "
    if continue_final_message:
        chat[-1]["content"] = _content_to_continue(chat[-1]) + cut
    mark = secrets.token_hex(16)
    marked = _marker(tokenizer.special_tokens_pattern, mark)
    text = template.render(
        {
            **tokenizer.special_tokens,
            **marked(variables),
            "messages": marked(chat),
            "tools": marked([dict(tool) for tool in tools]) if tools else None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
    )
    if continue_final_message:
        text = _cut(text, cut)
    return _encode(tokenizer, text, mark)


def _template(tokenizer: Tokenizer, *, has_tools: bool) -> ChatTemplate:
    templates = tokenizer.chat_templates
    template = (templates.get("tool_use") if has_tools else None) or templates.get("default")
    if template is None:
        raise RequestError("This model has no chat template; use /v1/completions instead.", param="messages")
    if has_tools and "tools" not in template.variables:
        raise RequestError("This model's chat template has no place for tools.", param="tools")
    return template


def _check_variables(template: ChatTemplate, variables: dict[str, Any]) -> None:
    for name in variables:
        if name in _RESERVED or name not in template.variables:
            raise RequestError(
                f"This model's chat template takes no variable named {name!r}.", param="chat_template_kwargs"
            )


# --- messages as templates expect them ---


def _normalize(messages: Sequence[Mapping[str, Any]], template: ChatTemplate) -> list[dict[str, Any]]:
    if not messages:
        raise RequestError("messages must hold at least one message.", param="messages")
    chat = [_normalize_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if "developer" not in template.source:  # OpenAI's newer name for the same role
        for message in chat:
            message["role"] = "system" if message["role"] == "developer" else message["role"]
    if "tool_calls" not in template.source and any("tool_calls" in message for message in chat):
        raise RequestError("This model's chat template has no place for tool calls.", param="messages")
    return chat


def _normalize_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Without empty fields, content as one string, tool calls' arguments as objects."""
    plain = {name: value for name, value in message.items() if value is not None}
    if plain.get("role") not in ROLES:
        raise RequestError(
            f"{where}.role must be one of {', '.join(ROLES)}, but it is {plain.get('role')!r}.", param="messages"
        )
    if not plain.get("tool_calls"):
        plain.pop("tool_calls", None)
    elif plain["role"] != "assistant":
        raise RequestError(f"{where} has tool_calls, which only an assistant message may have.", param="messages")
    else:
        plain["tool_calls"] = [
            _normalize_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(plain["tool_calls"])
        ]
    if "content" in plain:
        plain["content"] = _text(plain["content"], where)
    elif "tool_calls" not in plain:
        raise RequestError(f"{where} has no content.", param="messages")
    return plain


def _text(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where}.content must be a string or a list of text parts.", param="messages")
    return "".join(_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _part_text(part: object, where: str) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(other)} if other != "text":
            raise RequestError(f"{where} is of type {other!r}, but this model reads text only.", param="messages")
        case _:
            raise RequestError(f'{where} must look like {{"type": "text", "text": "…"}}.', param="messages")


def _normalize_call(call: Any, where: str) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(), "arguments": str() | dict() as arguments} as function}:
            return {**call, "function": {**function, "arguments": _arguments(arguments, where)}}
        case _:
            raise RequestError(f"{where} must have a function with a name and arguments.", param="messages")


def _arguments(arguments: str | dict[str, Any], where: str) -> dict[str, Any]:
    """OpenAI's API has them as JSON text, templates as an object. An empty text stands for no arguments."""
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments or "{}")
        except ValueError as error:
            raise RequestError(f"{where}.function.arguments is not valid JSON: {error}.", param="messages") from error
        if not isinstance(parsed, dict):
            raise RequestError(f"{where}.function.arguments must be a JSON object.", param="messages")
        return parsed
    return arguments


def _content_to_continue(message: dict[str, Any]) -> str:
    content: str | None = message.get("content")
    if content is None:
        raise RequestError("The last message has no content to go on with.", param="continue_final_message")
    return content


def _cut(text: str, cut: str) -> str:
    """The text up to where the last message ends. A template that trims the cut's space trims the message's too."""
    before, found, after = text.rpartition(cut.strip())
    if not found:
        raise RequestError(
            "This model's chat template does not keep the last message, so it cannot be continued.",
            param="continue_final_message",
        )
    return before.removesuffix(" ") if after.startswith(" ") else before.rstrip()


# --- control tokens in what others wrote ---


def _marker(special: re.Pattern[str], mark: str) -> Callable[[Any], Any]:
    """Puts `mark` on both sides of each special token in all strings of a value."""

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return special.sub(lambda token: mark + token[0] + mark, value)
        if isinstance(value, Mapping):
            return {marked(key): marked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [marked(item) for item in value]
        return value

    return marked


def _encode(tokenizer: Tokenizer, text: str, mark: str) -> list[int]:
    """The ids of `text`; what stands between two marks is plain text."""
    first, *rest = text.split(mark)
    ids = tokenizer.encode(first, add_special_tokens=False)
    if len(rest) % 2:
        raise RequestError("This model's chat template cuts a message apart inside a control token.", param="messages")
    for i, piece in enumerate(rest):
        ids += _encode_inside(tokenizer, piece, parse_special=i % 2 == 1)
    return ids


def _encode_inside(tokenizer: Tokenizer, piece: str, *, parse_special: bool) -> list[int]:
    """The ids of text that is not at the start, where SentencePiece would put a space: encode it behind a newline."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + piece, add_special_tokens=False, parse_special=parse_special)
    if ids[: len(newline)] != newline:
        ids = tokenizer.encode(piece, add_special_tokens=False, parse_special=parse_special)
    else:
        ids = ids[len(newline) :]
    if not parse_special and not tokenizer.special_token_ids.isdisjoint(ids):
        raise RequestError(
            f"A message holds the control token {piece!r}, which this model's tokenizer cannot tell from text.",
            param="messages",
        )
    return ids
