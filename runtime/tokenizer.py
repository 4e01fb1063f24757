"""Text to token ids and back, from the files a Hugging Face model comes with, on the `tokenizers` library."""

import json
import re
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from farrier.runtime.chat_template import ChatTemplate
from farrier.runtime.detokenizer import IncrementalDetokenizer
from farrier.runtime.guided import GrammarCompiler, MatcherGuide
from farrier.runtime.sampling_params import GuidedDecoding, SamplingParams
from farrier.runtime.token_bytes import TokenBytes
from farrier.targets.errors import EngineError, RequestError


class Tokenizer:
    """A model's tokenizer and chat templates. Thread-safe; made by `load`.

    special_tokens: the model's own name (`bos_token`, ...) → the token, as chat templates see them.
    chat_templates: name (`default`, `tool_use`, ...) → Jinja source.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str], chat_templates: dict[str, str]
    ) -> None:
        self._backend = backend
        self._bytes = TokenBytes(backend)
        self._lock = threading.Lock()
        self._grammars: dict[tuple[tuple[int, ...], int], GrammarCompiler] = {}
        self.special_tokens = special_tokens
        self.chat_templates = {name: ChatTemplate(source) for name, source in chat_templates.items()}

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Loads the tokenizer in `path`: an engine's `tokenizer/`, or any Hugging Face model folder.

        Raises EngineError when tokenizer.json is missing, or a file is corrupt or contradicts another.
        """
        backend = _load_backend(path / "tokenizer.json")
        config = _read_json(path / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(path / "special_tokens_map.json") | config)
        for name in ("bos_token", "eos_token"):
            token = special_tokens.get(name)
            if token is not None and backend.token_to_id(token) is None:
                raise EngineError(f"{path} names {token!r} as its {name}, but its tokenizer.json has no such token.")
        return cls(backend, special_tokens, _chat_templates(path, config))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id. The model's own vocabulary may be larger (padded), rarely smaller."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Control tokens: left out of the text unless `skip_special_tokens` is False."""
        return self._bytes.special_ids

    @cached_property
    def added_token_ids(self) -> frozenset[int]:
        """Tokens that are matched as a whole before the text around them is encoded: special tokens, and others."""
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def special_tokens_pattern(self) -> re.Pattern[str]:
        """Matches the text of any special token, the longest where several begin."""
        tokens = [token.content for token in self._backend.get_added_tokens_decoder().values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    @property
    def chat_template(self) -> str | None:
        """The source of the default chat template."""
        template = self.chat_templates.get("default")
        return None if template is None else template.source

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary, spelled as in tokenizer.json."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for in a text, maybe part of a character; empty for an unused id."""
        return self._bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """The same as text, with U+FFFD for parts of characters: for people and logprobs, not for joining."""
        return self._bytes[token_id].decode("utf-8", "replace")

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of `text`.

        add_special_tokens: add what the model expects around a text, such as a BOS token.
        parse_special: a special token written in the text, such as `</s>`, becomes that token, as Hugging Face
        does for prompts; False: it stays plain text (for text that somebody else wrote).
        Raises RequestError when the text is not valid Unicode (an unpaired surrogate).
        """
        backend = self._backend if parse_special else self._plain_backend
        try:
            encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise RequestError("The text is not valid Unicode: it has an unpaired surrogate.") from error
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, bytes that are no UTF-8 replaced by U+FFFD, one for each maximal invalid part.

        The same as Hugging Face's, except that a broken character in SentencePiece's byte tokens costs itself
        alone and not the whole characters in byte tokens beside it.
        """
        detokenizer = self.detokenizer([], SamplingParams(skip_special_tokens=skip_special_tokens))
        return detokenizer.append(token_ids) + detokenizer.finish()

    def detokenizer(self, prompt_ids: list[int], params: SamplingParams) -> IncrementalDetokenizer:
        """Turns the tokens that follow `prompt_ids` into text, one at a time.

        Only one thing of the prompt matters: whether the output begins a text or continues one. It begins one when
        the prompt is empty or ends with a special token (the usual end of a chat prompt). SentencePiece writes a
        space before the first word of a text, which is dropped then, and kept in a text that is continued.
        """
        at_start = not prompt_ids or prompt_ids[-1] in self.special_token_ids
        return IncrementalDetokenizer(self._bytes, params, at_start=at_start)

    def guide(self, params: GuidedDecoding, eos_token_ids: tuple[int, ...], vocab_size: int) -> MatcherGuide:
        """Compiles what constrains one output of a model with `vocab_size` logits.

        The first call takes a moment more (it indexes the vocabulary); compiling a large schema can take 100 ms, so
        call it outside the event loop. Raises RequestError naming the field that is invalid.
        """
        key = (eos_token_ids, vocab_size)
        with self._lock:
            if key not in self._grammars:
                self._grammars[key] = GrammarCompiler(
                    self._backend.to_str(), self.vocab_size, eos_token_ids, vocab_size
                )
        return self._grammars[key].guide(params)

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise EngineError(
            f"{path} is missing; save the model's tokenizer there with transformers' AutoTokenizer.save_pretrained."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise EngineError(f"{path} is not a tokenizer that can be read: {error}.") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EngineError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds {type(content).__name__}, but must hold a JSON object.")
    return content


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Entries such as `"bos_token": "<s>"` or `"bos_token": {"content": "<s>", ...}`."""
    found = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found


def _chat_templates(path: Path, config: dict[str, Any]) -> dict[str, str]:
    """From chat_template.jinja, else chat_template.json, else tokenizer_config.json: the order of transformers."""
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        return {"default": jinja.read_text(encoding="utf-8")}
    template = _read_json(path / "chat_template.json").get("chat_template", config.get("chat_template"))
    match template:
        case None:
            return {}
        case str():
            return {"default": template}
        case [*named] if all(isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in named):
            return {str(entry["name"]): str(entry["template"]) for entry in named}
        case _:
            raise EngineError(f"The chat_template in {path} is neither a template nor a list of named templates.")
