"""A model's chat template: sandboxed Jinja with what Hugging Face templates expect of their surroundings."""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from farrier.targets.errors import EngineError, RequestError

MAX_CHARS = 1 << 24
"""Of a rendered prompt."""
MAX_ITERATIONS = 1_000_000
"""Of all the loops in one rendering."""

_ITERATIONS_LEFT = "_iterations_left"


class ChatTemplate:
    """source: Jinja, as in `chat_template.jinja`. Compiled when first used; thread-safe."""

    def __init__(self, source: str) -> None:
        self.source = source

    def render(self, variables: dict[str, Any]) -> str:
        """Raises RequestError when the template refuses the conversation, fails on it, or does not come to an end;
        EngineError when it is not valid Jinja."""
        try:
            pieces = self._compiled.generate({**variables, _ITERATIONS_LEFT: iter(range(MAX_ITERATIONS))})
            return "".join(_bounded(pieces))
        except jinja2.TemplateSyntaxError as error:
            raise EngineError(
                f"This model's chat template is not valid Jinja: {error.message} (line {error.lineno})."
            ) from error
        except jinja2.TemplateError as error:
            raise _refusal(f"This model's chat template refuses the conversation: {error.message}") from error
        except Exception as error:  # a template is a program of somebody else's: whatever it runs into is its refusal
            raise _refusal(f"This model's chat template cannot render the conversation: {error}.") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names it may read from outside, such as `tools`; none when it is not valid Jinja, which `render` reports."""
        try:
            return frozenset(meta.find_undeclared_variables(_Environment().parse(self.source)))
        except jinja2.TemplateSyntaxError:
            return frozenset()

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _Environment().from_string(self.source)


def _refusal(message: str) -> RequestError:
    return RequestError(message, param="messages")


def _bounded(pieces: Iterable[str]) -> Iterator[str]:
    chars = 0
    for piece in pieces:
        chars += len(piece)
        if chars > MAX_CHARS:
            raise jinja2.TemplateRuntimeError(f"it renders to more than {MAX_CHARS} characters.")
        yield piece


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's words for training; here it only is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """Behaves as transformers' environment for chat templates, and counts the iterations of loops."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters["counted"] = _counted
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return tree


@jinja2.pass_context
def _counted(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    iterations_left = context.resolve(_ITERATIONS_LEFT)
    for item in items:
        if next(iterations_left, None) is None:
            raise jinja2.TemplateRuntimeError(f"its loops run more than {MAX_ITERATIONS} times.")
        yield item


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
