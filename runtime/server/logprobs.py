"""Logprobs in OpenAI's two shapes."""

from typing import Any

from farrier.runtime.outputs import TokenLogprobs
from farrier.runtime.tokenizer import Tokenizer

_LEAST = -9999.0
"""OpenAI's number for "very unlikely": JSON has no minus infinity."""


def chat_logprobs(tokenizer: Tokenizer, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of one of its chunks."""
    return {
        "content": [
            _entry(tokenizer, position.token_id, position.logprob)
            | {"top_logprobs": [_entry(tokenizer, *likely) for likely in position.top]}
            for position in logprobs
        ],
        "refusal": None,
    }


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, _LEAST),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """Writes the `logprobs` of one completion choice, piece by piece."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def add(self, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        """The next piece. A token's text_offset is the number of characters before it in the choice's text."""
        offsets = []
        for position in logprobs:
            offsets.append(self._offset)
            self._offset += self._characters(position.token_id)
        return {
            "tokens": [self._name(position.token_id) for position in logprobs],
            "token_logprobs": [max(position.logprob, _LEAST) for position in logprobs],
            "top_logprobs": [self._top(position) for position in logprobs],
            "text_offset": offsets,
        }

    def _top(self, position: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and, as OpenAI has it, the sampled one even where it is none of them."""
        likely = [*position.top, (position.token_id, position.logprob)]
        return {self._name(token_id): max(logprob, _LEAST) for token_id, logprob in likely}

    def _name(self, token_id: int) -> str:
        """The token's text; OpenAI's `bytes:\\xe2` for part of a character; vLLM's `token_id:7` without a tokenizer."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _characters(self, token_id: int) -> int:
        if self._tokenizer is None or token_id in self._tokenizer.special_token_ids:
            return 0
        # A character belongs to the token with its first byte; the others are UTF-8 continuations, 0b10xxxxxx.
        return sum(byte & 0xC0 != 0x80 for byte in self._tokenizer.token_bytes(token_id))
