"""Which format a model writes its tool calls in: a fact of its chat template."""

from farrier.runtime.tokenizer import Tokenizer
from farrier.runtime.tools.parser import ToolParser


def parser_for(tokenizer: Tokenizer) -> ToolParser | None:
    """A parser for one message of this model; None when its chat template names no format of tool calls we know."""
    return None
