"""Guided decoding through llguidance: a grammar becomes, at each position, the set of tokens allowed next."""

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from farrier.runtime.sampling_params import GuidedDecoding
from farrier.targets.errors import EngineError, FarrierError, RequestError

JSON_WHITESPACE = r"[ \t\r\n]{1,32}"
"""Between two JSON tokens: enough to indent with, but a model cannot write whitespace for ever."""

_LIMITS = LLParserLimits(verbose_errors=False)


class MatcherGuide:
    """Implements `farrier.runtime.request.Guide`. Holds the state of one output; not thread-safe."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._last_word = np.uint32((1 << (vocab_size % 32 or 32)) - 1)

    @property
    def is_finished(self) -> bool:
        """The grammar is complete and nothing may follow but the end."""
        return self._matcher.is_stopped()

    def fill_mask(self, row: npt.NDArray[np.uint32]) -> None:
        """Writes the tokens allowed next as bits, little end first, `[ceil(vocab / 32)]`.

        Raises RequestError when the grammar turns out too complex to follow.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            raise self._error()
        row[:] = mask[: len(row)]
        row[-1] &= self._last_word

    def accept(self, token_id: int) -> None:
        """`token_id` was sampled. Raises EngineError when the mask did not allow it, RequestError as `fill_mask`."""
        if not self._matcher.consume_token(token_id):
            raise self._error()

    def _error(self) -> FarrierError:
        message = self._matcher.get_error()
        if "satisfy the grammar" in message:
            return EngineError(f"A token was sampled that the grammar does not allow: {_sentence(message)}")
        return RequestError(f"The grammar is too complex to follow: {_sentence(message)}", param="guided")


class GrammarCompiler:
    """Makes guides for one tokenizer. Expensive to make (it indexes the vocabulary); thread-safe.

    tokenizer_json: the text of a tokenizer.json. tokenizer_size: one more than its highest token id.
    eos_token_ids: allowed wherever the grammar may end. vocab_size: number of the model's logits.
    """

    def __init__(
        self, tokenizer_json: str, tokenizer_size: int, eos_token_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        if not eos_token_ids:
            raise EngineError("Guided decoding needs a model with an end-of-text token, and this one names none.")
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(
            tokenizer_json, n_vocab=max(vocab_size, tokenizer_size), eos_token=list(eos_token_ids)
        )

    def guide(self, params: GuidedDecoding) -> MatcherGuide:
        """Raises RequestError naming the field that does not compile."""
        field = _field(params)
        try:
            matcher = LLMatcher(self._tokenizer, _grammar(params), log_level=0, limits=_LIMITS)
        except ValueError as error:  # text that is not valid Unicode; everything else is reported by the matcher
            raise RequestError(f"{field} is not valid: {error}.", param=field) from error
        matcher.compute_bitmask()  # some grammars turn out too complex only here; and the lexer is warm then
        if matcher.is_error():
            raise RequestError(f"{field} is not valid: {_sentence(matcher.get_error())}", param=field)
        return MatcherGuide(matcher, self._vocab_size)


def _field(params: GuidedDecoding) -> str:
    """The name of the one field that constrains, as requests call it."""
    if params.json_schema is not None or params.json_object:
        return "guided_json"
    if params.regex is not None:
        return "guided_regex"
    return "guided_grammar" if params.grammar is not None else "guided_choice"


def _grammar(params: GuidedDecoding) -> str:
    """In llguidance's own format."""
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.grammar is not None:
        return LLMatcher.grammar_from_lark(params.grammar)
    if params.choice is not None:
        return LLMatcher.grammar_from_regex("|".join(map(_escape, params.choice)))
    return LLMatcher.grammar_from_json_schema(
        params.json_schema if params.json_schema is not None else {"type": "object"},
        overrides={"whitespace_pattern": JSON_WHITESPACE},
    )


def _escape(text: str) -> str:
    """A regex that matches `text` only; every character but plain letters and digits by number."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _sentence(message: str) -> str:
    """The gist of llguidance's message, which may be many lines with a drawing of the place."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    gist = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return gist.rstrip(".:") + "."
