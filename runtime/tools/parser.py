"""The parser of one message's tool calls; a subclass for each format (the contract of this package)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from farrier.runtime.sampling_params import GuidedDecoding
from farrier.runtime.tools.events import ToolEvent

ToolChoice = Literal["auto", "required"] | str
"""`auto`, `required`, or the name of the one function that must be called."""


class ToolParser(ABC):
    """Reads one message, as text that arrives in pieces, into content and tool calls. Make one for each message.

    needs_special_tokens: the calls are marked with special tokens: generate with `skip_special_tokens=False`.
    """

    needs_special_tokens: bool

    @abstractmethod
    def feed(self, text: str) -> list[ToolEvent]:
        """What `text`, the next piece, adds. However a text is cut into pieces, the events joined are the same."""

    @abstractmethod
    def finish(self) -> list[ToolEvent]:
        """What is left when the message has ended. Called once."""

    @abstractmethod
    def guide_for(
        self, tools: Sequence[Mapping[str, Any]], tool_choice: ToolChoice, *, parallel: bool = True
    ) -> GuidedDecoding | None:
        """A grammar that makes the calls well-formed, their arguments following the tools' schemas.

        tools: as in OpenAI's API. parallel: several calls in one message are allowed. None: with `auto`, this
        format's calls cannot be told from text as they begin, so nothing is constrained.
        """
