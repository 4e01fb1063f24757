"""What a benchmark asks for: random prompts of given lengths, or the records of a JSONL file."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any, Literal

import numpy as np

from farrier.runtime.request import TokensPrompt
from farrier.targets.errors import RequestError

PromptKind = Literal["tokens", "text", "chat"]
Message = dict[str, Any]


@dataclass(frozen=True)
class BenchRequest:
    """One prompt, as text, token ids or a conversation, and how many tokens to generate."""

    prompt: str | TokensPrompt | list[Message]
    max_tokens: int


@dataclass(frozen=True)
class Lengths:
    """A distribution of token counts, all of them 1 or more. `text` is how a user spelled it."""

    text: str
    kind: Literal["uniform", "normal"]
    first: float
    second: float

    @classmethod
    def parse(cls, text: str, param: str) -> "Lengths":
        """`128`; `64:256`, uniform and inclusive; `normal:128:32`, mean and standard deviation, cut off below 1.

        Raises RequestError naming `param`.
        """
        match _numbers(text):
            case "uniform", [float(count)] if count >= 1:
                return cls(text, "uniform", count, count)
            case "uniform", [float(least), float(most)] if 1 <= least <= most:
                return cls(text, "uniform", least, most)
            case "normal", [float(mean), float(deviation)] if mean >= 1:
                return cls(text, "normal", mean, deviation)
        raise RequestError(f"{param} is a count (128), a range (64:256) or normal:MEAN:STD, not {text!r}.", param=param)

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        if self.kind == "normal":
            lengths = np.rint(rng.normal(self.first, self.second, count))
        else:
            lengths = rng.integers(int(self.first), int(self.second) + 1, count)
        return [max(1, int(length)) for length in lengths]


def _numbers(text: str) -> tuple[str, list[float]]:
    kind = "normal" if text.startswith("normal:") else "uniform"
    pattern = r"\d+(?:\.\d+)?" if kind == "normal" else r"\d+"
    parts = text.removeprefix("normal:").split(":")
    return kind, [float(part) for part in parts] if all(re.fullmatch(pattern, part, re.ASCII) for part in parts) else []


def random_requests(
    rng: np.random.Generator, count: int, inputs: Lengths, outputs: Lengths, kind: PromptKind, vocab_size: int
) -> list[BenchRequest]:
    """`count` prompts that have nothing in common: no prefix of one is found in a cache because of another.

    Token ids are below `vocab_size`. A text or chat prompt has one letter for each token it should have: how many
    tokens that really is, the tokenizer says.
    """
    lengths = zip(inputs.draw(rng, count), outputs.draw(rng, count), strict=True)
    return [BenchRequest(_random_prompt(rng, length, kind, vocab_size), output) for length, output in lengths]


def _random_prompt(
    rng: np.random.Generator, length: int, kind: PromptKind, vocab_size: int
) -> str | TokensPrompt | list[Message]:
    if kind == "tokens":
        return TokensPrompt(prompt_token_ids=rng.integers(0, vocab_size, length).tolist())
    text = " ".join(ascii_lowercase[index] for index in rng.integers(0, len(ascii_lowercase), length))
    return text if kind == "text" else [{"role": "user", "content": text}]


def read_dataset(path: Path, default_max_tokens: Callable[[], int]) -> list[BenchRequest]:
    """A record a line: `prompt`, `prompt_token_ids` or `messages`, and perhaps `max_tokens`.

    Raises RequestError naming the line that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"The data set {path} cannot be read ({error}).", param="dataset") from error
    requests = [
        _record(line, f"{path}, line {number}", default_max_tokens)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not requests:
        raise RequestError(f"The data set {path} holds no records.", param="dataset")
    return requests


def _record(line: str, where: str, default_max_tokens: Callable[[], int]) -> BenchRequest:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    match record:
        case {"prompt": str(text)} if text:
            prompt: str | TokensPrompt | list[Message] = text
        case {"prompt_token_ids": [int(), *_] as token_ids} if all(type(token_id) is int for token_id in token_ids):
            prompt = TokensPrompt(prompt_token_ids=token_ids)
        case {"messages": [dict(), *_] as messages}:
            prompt = messages
        case _:
            raise RequestError(
                f'{where}: a record is a JSON object with "prompt" (text), "prompt_token_ids" or "messages".',
                param="dataset",
            )
    max_tokens = record["max_tokens"] if "max_tokens" in record else default_max_tokens()
    if type(max_tokens) is not int or max_tokens < 1:
        raise RequestError(f"{where}: max_tokens must be a whole number above 0.", param="dataset")
    return BenchRequest(prompt, max_tokens)
