"""Incremental detokenization: tokens in, whole characters out, up to a stop string.

The pieces joined, with `finish()` at the end, are `Tokenizer.decode` of all the tokens (as long as no stop string
matches): bytes that are no UTF-8 become U+FFFD, and so do those of a character left unfinished at the end.
"""

import codecs
from collections.abc import Iterable

from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.token_bytes import TokenBytes


def held_suffix(text: str, patterns: Iterable[str]) -> int:
    """Length of the longest suffix of `text` that is the beginning, but not all, of one of `patterns`."""
    longest = 0
    for pattern in patterns:
        for length in range(min(len(pattern) - 1, len(text)), longest, -1):
            if text.endswith(pattern[:length]):
                longest = length
                break
    return longest


class IncrementalDetokenizer:
    """Implements `farrier.runtime.request.Detokenizer`.

    at_start: the output begins a text instead of continuing one; see `Tokenizer.detokenizer`.

    The stop string that is complete first wins (of several that end together, the longest). It is searched for in
    the text, so it may span tokens; the text held back is exactly the longest suffix that may still become one.
    """

    def __init__(self, vocabulary: TokenBytes, params: SamplingParams, *, at_start: bool) -> None:
        self.stopped_by: str | None = None
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if params.skip_special_tokens else frozenset()
        self._at_start = at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = params.stop
        self._include_stop = params.include_stop_str_in_output
        self._unstoppable_tokens = params.min_tokens
        self._held = ""

    def append(self, token_ids: list[int]) -> str:
        """The text these tokens complete. Nothing more comes once a stop string has matched."""
        return "".join([self._append(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """The text that was held back; a character left unfinished becomes U+FFFD."""
        if self.stopped_by is not None:
            return ""
        text = self._held + self._utf8.decode(b"", final=True)
        self._held = ""
        return text

    def _append(self, token_id: int) -> str:
        if self.stopped_by is not None:
            return ""
        text = self._utf8.decode(self._bytes(token_id))
        if not self._stops:
            return text
        self._unstoppable_tokens -= 1
        return self._until_stop(text, may_stop=self._unstoppable_tokens < 0)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        token = self._vocabulary[token_id]
        if token and self._at_start:
            self._at_start = False
            return self._vocabulary.at_start(token_id)
        return token

    def _until_stop(self, new: str, *, may_stop: bool) -> str:
        text = self._held + new
        if may_stop and (match := self._first_stop(text, len(self._held))) is not None:
            start, self.stopped_by = match
            self._held = ""
            return text[: start + len(self.stopped_by)] if self._include_stop else text[:start]
        kept = len(text) - held_suffix(text, self._stops)
        self._held = text[kept:]
        return text[:kept]

    def _first_stop(self, text: str, searched: int) -> tuple[int, str] | None:
        """Where the first stop string that ends after `searched` characters starts, and which one it is."""
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop, max(0, searched - len(stop) + 1))) >= 0
        ]
        return min(found)[1:] if found else None
