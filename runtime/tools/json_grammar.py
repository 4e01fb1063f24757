"""Lark grammars, in llguidance's dialect, that make tool calls well-formed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from farrier.runtime.guided import JSON_WHITESPACE
from farrier.runtime.tokenizer import Tokenizer
from farrier.runtime.tools.json_format import JsonFormat
from farrier.targets.errors import RequestError


def call_grammar(
    style: JsonFormat,
    tokenizer: Tokenizer,
    tools: Sequence[Mapping[str, Any]],
    tool_choice: Literal["auto", "required"],
    parallel: bool,
) -> str:
    """Messages that call `tools`; with `auto`, also any text, which binds from the opener on.

    Raises RequestError when a tool's parameters are no object schema.
    """
    rules = [_message(style, tool_choice, parallel), _call(style, tokenizer, tool_choice, parallel)]
    if tool_choice == "auto":
        rules.append(_text(style, tokenizer))
    rules.append("function: " + " | ".join(f"function_{i}" for i in range(len(tools))))
    rules += [f"function_{i}: {_function(style, tool, f'tools[{i}]')}" for i, tool in enumerate(tools)]
    return "\n".join(rules)


def _message(style: JsonFormat, tool_choice: Literal["auto", "required"], parallel: bool) -> str:
    several = parallel and not style.is_list and not style.is_bare
    if tool_choice == "auto":
        return "start: text (call text)*" if several else "start: text call?"
    return 'start: call ("\\n" call)*' if several else "start: call"


def _call(style: JsonFormat, tokenizer: Tokenizer, tool_choice: Literal["auto", "required"], parallel: bool) -> str:
    if style.is_bare:
        return "call: function"
    padding = f"{_literal(style.padding)}?" if style.padding else ""
    opener, functions = _marker(style.opener, tokenizer), "function"
    if style.is_list:
        functions = 'function (", " function)* "]"' if parallel else 'function "]"'
        if _is_text(opener) and not padding:
            opener = _literal(style.opener + "[")  # the bare word may stand in a text
        else:
            functions = f'"[" {functions}'
    end = f"{padding} {_marker(style.closer, tokenizer)}" if style.closer else ""
    call = f"call: opener {padding} {functions} {end}"
    if tool_choice == "auto" and _is_text(opener):
        return f"{call}\nopener[lazy]: /(.|\\n)*/ {opener}"  # with the text before it, up to where it first stands
    return f"{call}\nopener: {opener}"


def _text(style: JsonFormat, tokenizer: Tokenizer) -> str:
    """Any text. Added tokens that are no control tokens, such as `<think>`, count as text too."""
    markers = {tokenizer.token_id(style.opener), tokenizer.token_id(style.closer)}
    added = sorted(tokenizer.added_token_ids - tokenizer.special_token_ids - markers)
    tokens = f" | <[{','.join(map(str, added))}]>" if added else ""
    return f"text: (TEXT{tokens})*\nTEXT: /(.|\\n)+/"


def _function(style: JsonFormat, tool: Mapping[str, Any], where: str) -> str:
    function = tool["function"]
    schema = {"type": "object", **(function.get("parameters") or {"properties": {}, "additionalProperties": False})}
    if schema["type"] != "object":
        raise RequestError(f"{where}.function.parameters must be the schema of an object.", param="tools")
    options = {"whitespace_pattern": JSON_WHITESPACE, "lenient": not function.get("strict")}
    before = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "{style.arguments_key}": '
    return f'{_literal(before)} %json {json.dumps({**schema, "x-guidance": options})} "}}"'


def _marker(text: str, tokenizer: Tokenizer) -> str:
    """A marker is written as its own token where the vocabulary has one."""
    token_id = tokenizer.token_id(text)
    return _literal(text) if token_id is None else f"<[{token_id}]>"


def _is_text(marker: str) -> bool:
    return marker.startswith('"')


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
