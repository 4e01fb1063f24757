"""Tool calls: what a model writes, turned into OpenAI's tool calls, and grammars that make it write them well."""

from farrier.runtime.tools.events import ContentDelta, ToolCallArguments, ToolCallStart, ToolEvent
from farrier.runtime.tools.formats import parser_for
from farrier.runtime.tools.parser import ToolParser

__all__ = ["ContentDelta", "ToolCallArguments", "ToolCallStart", "ToolEvent", "ToolParser", "parser_for"]
