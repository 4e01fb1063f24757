"""What a tool-call parser finds in a model's text, piece by piece."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Ordinary text of the message."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The call number `index` of the message begins. Its arguments follow, one or more pieces."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the arguments of call `index`: the pieces joined are the JSON text the model wrote."""

    index: int
    json_fragment: str


ToolEvent = ContentDelta | ToolCallStart | ToolCallArguments
