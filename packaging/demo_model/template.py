"""The chat template, rendered as transformers does it: sandboxed, blocks trimmed, JSON without HTML escapes."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from demo_model.conversation import Message, Tool

SOURCE = Path(__file__).parent / "chat_template.jinja"


def render(messages: list[Message], tools: list[Tool], add_generation_prompt: bool = False) -> str:
    return compiled().render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)


@cache
def compiled() -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(SOURCE.read_text())


def raise_exception(message: str) -> Any:
    raise TemplateError(message)
