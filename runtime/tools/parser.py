"""The contract of this package: what reads one message's tool calls."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from farrier.runtime.sampling_params import GuidedDecoding
from farrier.runtime.tools.events import ToolEvent


class ToolParser(ABC):
    """Reads one message, as text that arrives in pieces, into content and tool calls. Make one for each message."""

    @property
    @abstractmethod
    def needs_special_tokens(self) -> bool:
        """The calls are marked with special tokens: generate with `skip_special_tokens=False`."""

    @abstractmethod
    def feed(self, text: str) -> list[ToolEvent]:
        """What `text`, the next piece, adds. However a text is cut into pieces, the events joined are the same."""

    @abstractmethod
    def finish(self) -> list[ToolEvent]:
        """What is left when the message has ended. Called once."""

    @abstractmethod
    def guide_for(
        self, tools: Sequence[Mapping[str, Any]], tool_choice: Literal["auto", "required"], *, parallel: bool = True
    ) -> GuidedDecoding | None:
        """A grammar that makes the calls well-formed, their arguments following the tools' schemas.

        tools: as in OpenAI's API; a schema's keywords that grammars do not know are an error with `strict`, else not
        enforced. To demand one function, give that one only. tool_choice: whether the message may be text instead.
        parallel: whether it may hold several calls. None: text that begins a call cannot be told from other text,
        so `auto` constrains nothing.
        Raises RequestError when a tool's parameters are no object schema.
        """
