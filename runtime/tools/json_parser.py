"""Reads tool calls that are JSON objects behind a marker, character by character."""

import json
import secrets
import string
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

from farrier.runtime.sampling_params import GuidedDecoding
from farrier.runtime.tokenizer import Tokenizer
from farrier.runtime.tools.events import ContentDelta, ToolCallArguments, ToolCallStart, ToolEvent
from farrier.runtime.tools.json_format import JsonFormat
from farrier.runtime.tools.json_grammar import call_grammar
from farrier.runtime.tools.parser import ToolParser

_SPACE = frozenset(" \t\r\n")
_VALUE_ENDS = frozenset(",]}") | _SPACE
_END = ""
_CONTENT = -1

Reading = Generator[None, str, None]
"""A part of the parser: resumed with each next character, `_END` after the last."""


class _NotACallError(Exception):
    """What has been read since the opener, or since the last call, is text."""


class JsonToolParser(ToolParser):
    """A call is an object with a string `name` and an object of `arguments` (or `parameters`), in any order.

    It starts as soon as its name and the beginning of its arguments are there. The arguments are passed on byte for
    byte, even where they are not valid JSON. What turns out not to be a call is content, marker and all; so is what
    stands where a call should end. Whitespace before a call, and between a call and the end, is neither.
    """

    def __init__(self, style: JsonFormat, tokenizer: Tokenizer) -> None:
        self._style = style
        self._tokenizer = tokenizer
        self._char = _END
        self._raw: list[str] = []
        """What has been read since the opener or the last call, in case it is no call."""
        self._space = ""
        """Whitespace that is content unless a call follows."""
        self._follows_call = False
        self._num_calls = 0
        self._events: list[ToolEvent] = []
        self._pending: list[str] = []
        """Text of the next event."""
        self._pending_index = _CONTENT
        """The call whose arguments are pending."""
        self._reading = self._message()
        next(self._reading)

    @property
    def needs_special_tokens(self) -> bool:
        marker = self._tokenizer.token_id(self._style.opener)
        return not self._style.is_bare and marker in self._tokenizer.special_token_ids

    def feed(self, text: str) -> list[ToolEvent]:
        for char in text:
            self._reading.send(char)
        return self._take()

    def finish(self) -> list[ToolEvent]:
        self._reading.send(_END)
        return self._take()

    def guide_for(
        self, tools: Sequence[Mapping[str, Any]], tool_choice: Literal["auto", "required"], *, parallel: bool = True
    ) -> GuidedDecoding | None:
        if self._style.is_bare and tool_choice == "auto":
            return None
        return GuidedDecoding(grammar=call_grammar(self._style, self._tokenizer, tools, tool_choice, parallel))

    # --- the parts of a message; each begins with its first character in `_char` and ends with the one behind it ---

    def _message(self) -> Reading:
        self._char = yield
        if self._style.is_bare:
            yield from self._block()
        while (yield from self._content()):
            yield from self._block()
        yield

    def _content(self) -> Generator[None, str, bool]:
        """Text up to behind an opener (then True) or to the end."""
        opener, held = self._style.opener, ""
        while self._char:
            held += self._char
            while not opener.startswith(held):
                self._write(held[0])
                held = held[1:]
            self._char = yield
            if held == opener:
                self._raw = [self._space, opener]
                self._space = ""
                return True
        self._write(held)
        if not self._follows_call:
            self._emit(_CONTENT, self._space)
        return False

    def _block(self) -> Reading:
        """A call, or a list of them, and the closer. The message may end before the closer does."""
        with suppress(_NotACallError):
            yield from self._calls()
            if self._style.closer:
                yield from self._skip_space()
                for char in self._style.closer:
                    if self._char:
                        yield from self._expect(char)
                self._raw = []
        self._write("".join(self._raw))
        self._raw = []

    def _calls(self) -> Reading:
        yield from self._skip_space()
        is_list = self._char == "["
        separator = "," if is_list else ";" if self._style.is_bare else None
        if is_list:
            yield from self._next()
            yield from self._skip_space()
        yield from self._call()
        yield from self._skip_space()
        while self._char == separator:
            yield from self._next()
            yield from self._skip_space()
            yield from self._call()
            yield from self._skip_space()
        if is_list:
            yield from self._expect("]")
            self._raw = []

    def _call(self) -> Reading:
        name: str | None = None
        arguments: list[str] | None = None
        has_started = False
        yield from self._expect("{")
        yield from self._skip_space()
        while self._char != "}":
            key = yield from self._string()
            yield from self._skip_space()
            yield from self._expect(":")
            yield from self._skip_space()
            if key == "name" and name is None:
                name = yield from self._string()
            elif key not in ("arguments", "parameters") or has_started or arguments is not None:
                yield from self._value(self._raw.append)
            elif self._char != "{":
                raise _NotACallError
            elif name is None:
                arguments = []
                yield from self._value(self._collect(arguments))
            else:
                has_started = True
                yield from self._value(partial(self._emit, self._start(name)))
            yield from self._skip_space()
            if self._char == ",":
                yield from self._next()
                yield from self._skip_space()
            elif self._char != "}":
                raise _NotACallError
        yield from self._next()
        if not has_started:
            self._start_whole(name, arguments)
        self._raw = []

    def _string(self) -> Generator[None, str, str]:
        """A JSON string; what it stands for."""
        chars: list[str] = []
        yield from self._expect('"')
        while self._char != '"':
            is_escape = self._char == "\\"
            for _ in range(1 + is_escape):
                if self._char < " ":  # a control character, or the end
                    raise _NotACallError
                chars.append(self._char)
                yield from self._next()
        yield from self._next()
        try:
            text: str = json.loads(f'"{"".join(chars)}"')
            text.encode()
        except ValueError as error:
            raise _NotACallError from error
        return text

    def _value(self, take: Callable[[str], None]) -> Reading:
        """Any JSON value, given to `take` as it is written; only its strings and brackets are looked at."""
        if self._char not in ("{", "[", '"'):
            while self._char and self._char not in _VALUE_ENDS:
                take(self._char)
                self._char = yield
            return
        depth, in_string, is_escaped = 0, False, False
        while self._char:
            char = self._char
            if in_string:
                in_string = is_escaped or char != '"'
                is_escaped = char == "\\" and not is_escaped
            elif char == '"':
                in_string = True
            else:
                depth += (char in "{[") - (char in "}]")
            take(char)
            self._char = yield
            if depth == 0 and not in_string:
                return

    def _skip_space(self) -> Reading:
        while self._char in _SPACE:
            yield from self._next()

    def _expect(self, char: str) -> Reading:
        if self._char != char:
            raise _NotACallError
        yield from self._next()

    def _next(self) -> Reading:
        self._raw.append(self._char)
        self._char = yield

    def _collect(self, chars: list[str]) -> Callable[[str], None]:
        def take(char: str) -> None:
            chars.append(char)
            self._raw.append(char)

        return take

    # --- events ---

    def _start(self, name: str | None) -> int:
        """Begins a call; its index."""
        if not name:
            raise _NotACallError
        self._flush()
        index = self._num_calls
        self._num_calls += 1
        alphabet = string.ascii_letters + string.digits
        suffix = "".join(secrets.choice(alphabet) for _ in range(self._style.id_length))
        self._events.append(ToolCallStart(index, self._style.id_prefix + suffix, name))
        self._raw = []
        self._follows_call = True
        return index

    def _start_whole(self, name: str | None, arguments: list[str] | None) -> None:
        """A call whose name came last, or that has no arguments, which only a marker tells from other JSON."""
        if arguments is None and self._style.is_bare:
            raise _NotACallError
        self._emit(self._start(name), "".join(arguments or "{}"))

    def _write(self, text: str) -> None:
        """Adds content; whitespace waits until it is clear that no call follows."""
        words = text.rstrip(" \t\r\n")
        if words:
            self._emit(_CONTENT, self._space + words)
            self._space = ""
            self._follows_call = False
        self._space += text[len(words) :]

    def _emit(self, index: int, text: str) -> None:
        if index != self._pending_index:
            self._flush()
            self._pending_index = index
        self._pending.append(text)

    def _flush(self) -> None:
        text = "".join(self._pending)
        self._pending = []
        if text and self._pending_index == _CONTENT:
            self._events.append(ContentDelta(text))
        elif text:
            self._events.append(ToolCallArguments(self._pending_index, text))

    def _take(self) -> list[ToolEvent]:
        self._flush()
        events, self._events = self._events, []
        return events
