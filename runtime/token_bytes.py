"""Which bytes each token stands for, read off the `decoder` of a tokenizer.json.

Text is then the UTF-8 reading of joined bytes, so tokens can be turned into text one at a time, exactly and cheaply.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers

from farrier.targets.errors import EngineError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE writes its 256 bytes with."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True)
class _Decoder:
    """`token`: the bytes of a token. `first`: what becomes of the bytes of the first token of a text."""

    token: Callable[[str], bytes]
    first: Callable[[bytes], bytes]


def _byte_level() -> _Decoder:
    alphabet = _byte_alphabet()

    def token(text: str) -> bytes:
        if all(char in alphabet for char in text):
            return bytes(alphabet[char] for char in text)
        return text.encode()  # an added token, written as it is

    return _Decoder(token, lambda first: first)


def _sentencepiece(steps: list[dict[str, Any]]) -> _Decoder:
    """Metaspace or Replace write spaces, ByteFallback writes bytes, Strip drops the space before the first word."""
    replacements: list[tuple[str, str]] = []
    byte_fallback = fused = False
    first: Callable[[bytes], bytes] = lambda token: token  # noqa: E731
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old), "prepend_scheme": scheme}:
                replacements.append((old, " "))
                if scheme != "never":
                    first = _without_spaces
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if fused:
                first = _without_leading_space
            case _:
                raise EngineError(f"The tokenizer's decoder has a step that farrier does not know: {step!r}.")

    def token(text: str) -> bytes:
        for old, new in replacements:
            text = text.replace(old, new)
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(match[1], 16)])
        return text.encode()

    return _Decoder(token, first)


def _without_leading_space(token: bytes) -> bytes:
    return token.removeprefix(b" ")


def _without_spaces(token: bytes) -> bytes:
    return token.replace(b" ", b"")


def _read_decoder(backend: tokenizers.Tokenizer) -> _Decoder:
    if backend.decoder is None:
        raise EngineError("The tokenizer has no decoder, so its tokens cannot be turned into text.")
    spec = json.loads(backend.decoder.__getstate__())  # as in tokenizer.json, without serializing the vocabulary
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _byte_level()
    return _sentencepiece(steps)


class TokenBytes:
    """The bytes of each token of `backend`, worked out when first asked for. Thread-safe.

    Raises EngineError when its decoder has a step that is not known.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._decoder = _read_decoder(backend)
        self._known: dict[int, bytes] = {}
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )

    def __getitem__(self, token_id: int) -> bytes:
        """Empty for an id that stands for nothing (models pad their vocabulary)."""
        known = self._known.get(token_id)
        if known is None:
            text = self._backend.id_to_token(token_id)
            known = self._known[token_id] = b"" if text is None else self._decoder.token(text)
        return known

    def at_start(self, token_id: int) -> bytes:
        """Its bytes as the first token of a text: SentencePiece puts a space before the first word."""
        return self._decoder.first(self[token_id])
