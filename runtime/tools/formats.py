"""Which format a model writes its tool calls in: a fact of its chat template."""

from farrier.runtime.tokenizer import Tokenizer
from farrier.runtime.tools.json_format import JsonFormat
from farrier.runtime.tools.json_parser import JsonToolParser
from farrier.runtime.tools.parser import ToolParser

HERMES = JsonFormat(opener="<tool_call>", closer="</tool_call>", padding="\n")
"""Hermes, Qwen 2.5 and 3, farrier's demo model."""
MISTRAL = JsonFormat(opener="[TOOL_CALLS]", padding=" ", is_list=True, id_prefix="", id_length=9)
"""Mistral 7B v0.3, Nemo, Mixtral 8x22B. Their templates demand ids of nine letters and digits."""
LLAMA = JsonFormat(opener="<|python_tag|>", is_bare=True, arguments_key="parameters")
"""Llama 3.1 and later: the whole message is the call."""
FUNCTOOLS = JsonFormat(opener="functools", is_list=True)
"""Phi-4-mini."""
PHI_TAGS = JsonFormat(opener="<|tool_call|>", closer="<|/tool_call|>", is_list=True)
"""Phi-4-mini with templates that mark calls by its tokens."""


def parser_for(tokenizer: Tokenizer) -> ToolParser | None:
    """A parser for one message of this model; None when its chat template names no format that we know."""
    template = tokenizer.chat_templates.get("tool_use") or tokenizer.chat_templates.get("default")
    style = None if template is None else _format(template.source)
    return None if style is None else JsonToolParser(style, tokenizer)


def _format(template: str) -> JsonFormat | None:
    def has(*parts: str) -> bool:
        return all(part in template for part in parts)

    if has("<tool_call>") and (has('"arguments": ') or has('\\"arguments\\": ')):
        return HERMES  # other models put XML or bare names into the same tag
    if has("[TOOL_CALLS]") and not has("[ARGS]"):  # newer templates: a name, [ARGS], and the arguments alone
        return MISTRAL
    if has("functools["):
        return FUNCTOOLS
    if has("<|tool_call|>"):
        return PHI_TAGS
    if has('"parameters": ', "ipython"):
        return LLAMA
    return None
