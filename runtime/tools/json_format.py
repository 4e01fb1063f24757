"""What sets the formats of tool calls apart that are JSON objects behind a marker."""

from dataclasses import dataclass


@dataclass(frozen=True)
class JsonFormat:
    """How a family of models writes its calls, `{"name": …, "arguments": {…}}`.

    opener, closer: around each call, or around a list of calls. padding: what models may write inside of these.
    is_list: calls come as `[{…}, {…}]`. is_bare: the opener may be left out at the beginning of the message: a JSON
    object with a name and arguments is a call there, and several are separated by `;`.
    """

    opener: str
    closer: str = ""
    padding: str = ""
    is_list: bool = False
    is_bare: bool = False
    arguments_key: str = "arguments"
    id_prefix: str = "call_"
    id_length: int = 24
    """Random letters and digits behind the prefix."""
