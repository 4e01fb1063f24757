import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farrier.runtime.guided import MatcherGuide
from farrier.runtime.sampling_params import GuidedDecoding
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.errors import EngineError, RequestError

EOS = (2, 4)  # </s>, <|im_end|>
PADDING = 70
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def guide(tokenizer: Tokenizer, eos: tuple[int, ...] = EOS, **constraint: object) -> MatcherGuide:
    return tokenizer.guide(GuidedDecoding(**constraint), eos, tokenizer.vocab_size + PADDING)


def allowed(guide: MatcherGuide, tokenizer: Tokenizer) -> list[int]:
    row = np.full((tokenizer.vocab_size + PADDING + 31) // 32, 0xFFFFFFFF, np.uint32)
    guide.fill_mask(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def sample(guide: MatcherGuide, tokenizer: Tokenizer, seed: int, prefer: str = "", steps: int = 400) -> str | None:
    """A text made of random allowed tokens, those of characters in `prefer` first; None when it has no end."""
    generator, ids = random.Random(seed), []
    while not guide.is_finished:
        tokens = allowed(guide, tokenizer)
        assert tokens
        preferred = [t for t in tokens if t not in EOS and tokenizer.token_text(t).strip(prefer) == ""]
        token = generator.choice(preferred if prefer and preferred else tokens)
        if token in EOS:
            break
        guide.accept(token)
        ids.append(token)
        if len(ids) == steps:
            return None
    return tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(8))
def test_json_schema(tokenizer: Tokenizer, seed: int) -> None:
    text = sample(guide(tokenizer, json_schema=PERSON), tokenizer, seed)
    person = json.loads(text)
    assert isinstance(person["name"], str)
    assert 0 <= person["age"] <= 150
    assert set(person.get("tags", [])) <= {"a", "b"}
    assert list(person) == [name for name in PERSON["properties"] if name in person]


def test_json_object(tokenizer: Tokenizer) -> None:
    texts = [sample(guide(tokenizer, json_object=True), tokenizer, seed) for seed in range(20)]
    objects = [json.loads(text) for text in texts if text is not None]
    assert objects
    assert all(isinstance(value, dict) for value in objects)


def test_json_may_be_indented_but_whitespace_ends(tokenizer: Tokenizer) -> None:
    indented = json.dumps({"name": "Ada", "age": 36}, indent=4)
    follow = guide(tokenizer, json_schema=PERSON)
    # behind a newline, because SentencePiece puts a space before the first word
    newline = tokenizer.encode("\n", add_special_tokens=False)
    for token in tokenizer.encode("\n" + indented, add_special_tokens=False)[len(newline) :]:
        assert token in allowed(follow, tokenizer)
        follow.accept(token)
    assert follow.is_finished
    text = sample(guide(tokenizer, json_schema=PERSON), tokenizer, seed=1, prefer=" \n\r\t")
    gaps = re.findall(r"[ \n\r\t]+", re.sub(r'"([^"\\]|\\.)*"', "x", text))
    assert len(gaps) > 5
    assert max(map(len, gaps)) == 32


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("regex", [r"\d{3}-[a-f]+", r"(ja|nein)?", "[一-龯]{2}🙂?", r"a/b\"'"])
def test_regex(tokenizer: Tokenizer, regex: str, seed: int) -> None:
    text = sample(guide(tokenizer, regex=regex), tokenizer, seed)
    assert text is None or re.fullmatch(regex, text)


@pytest.mark.parametrize("seed", range(4))
def test_grammar(tokenizer: Tokenizer, seed: int) -> None:
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]?/'
    text = sample(guide(tokenizer, grammar=grammar), tokenizer, seed)
    assert text is None or re.fullmatch(r"[1-9][0-9]?(\+[1-9][0-9]?)*", text)


@settings(max_examples=50)
@given(
    choices=st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_choice(byte_level: Tokenizer, choices: list[str], seed: int) -> None:
    assert sample(guide(byte_level, choice=tuple(choices)), byte_level, seed) in choices


def test_a_finished_grammar_allows_each_end_token_only(tokenizer: Tokenizer) -> None:
    yes = guide(tokenizer, choice=("a",))
    assert not yes.is_finished
    yes.accept(tokenizer.token_id("a"))
    assert yes.is_finished
    assert allowed(yes, tokenizer) == list(EOS)


def test_a_grammar_that_may_end_or_go_on_allows_both(tokenizer: Tokenizer) -> None:
    some = guide(tokenizer, regex="a+")
    some.accept(tokenizer.token_id("a"))
    assert not some.is_finished
    assert {*EOS, tokenizer.token_id("a")} <= set(allowed(some, tokenizer))
    some.accept(EOS[1])
    assert some.is_finished


def test_the_padding_of_the_models_vocabulary_and_special_tokens_are_never_allowed(tokenizer: Tokenizer) -> None:
    tokens = set(allowed(guide(tokenizer, regex="(.|\n)*"), tokenizer))
    assert max(tokens) < tokenizer.vocab_size
    assert tokens & tokenizer.special_token_ids == set(EOS)


def test_a_model_may_have_fewer_logits_than_its_tokenizer_has_tokens(byte_level: Tokenizer) -> None:
    vocab_size = byte_level.vocab_size - 3
    row = np.zeros((vocab_size + 31) // 32, np.uint32)
    byte_level.guide(GuidedDecoding(regex="(.|\n)*"), EOS, vocab_size).fill_mask(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    assert bits[:vocab_size].any()
    assert not bits[vocab_size:].any()


def test_a_token_against_the_grammar_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(EngineError, match="grammar"):
        guide(tokenizer, regex="a").accept(tokenizer.token_id("b"))


def test_a_grammar_too_complex_to_follow_is_the_requests_fault(byte_level: Tokenizer) -> None:
    ambiguous = guide(byte_level, grammar='start: e\ne: e e e | e e | "a"')
    letter = byte_level.token_id("a")
    with pytest.raises(RequestError, match="too complex") as refused:
        any(ambiguous.accept(letter) for _ in range(1000))
    assert "\n" not in str(refused.value)
    properties = {f"p{i}": {"type": "null"} for i in range(1000)}
    large = guide(byte_level, json_schema={"type": "object", "properties": properties})
    with pytest.raises(RequestError, match="too complex"):
        any(large.accept(token) for token in byte_level.encode('{"p1"', add_special_tokens=False))


@pytest.mark.parametrize(
    ("constraint", "field", "message"),
    [
        ({"regex": "a(b"}, "guided_regex", "unclosed group"),
        ({"regex": "(?=a)b"}, "guided_regex", "look-around"),
        ({"grammar": "start: gone"}, "guided_grammar", "gone"),
        ({"grammar": "nothing"}, "guided_grammar", "Expected token"),
        ({"grammar": ""}, "guided_grammar", "Empty grammar"),
        ({"json_schema": {"type": "thing"}}, "guided_json", "thing"),
        ({"json_schema": {"type": "string", "format": "postcode"}}, "guided_json", "postcode"),
        ({"json_schema": {"$ref": "https://example.com/a"}}, "guided_json", "https://example.com/a"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "guided_json", "unclosed"),
        ({"choice": ("a\ud800",)}, "guided_choice", "Unicode"),
        ({"regex": "a\ud800"}, "guided_regex", "surrogates"),
        ({"json_schema": {"const": "a\ud800"}}, "guided_json", "not JSON serializable"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
    ],
)
def test_what_does_not_compile_is_refused_in_one_sentence(
    byte_level: Tokenizer, constraint: dict[str, object], field: str, message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as refused:
        guide(byte_level, **constraint)
    assert refused.value.param == field
    assert str(refused.value).startswith(f"{field} is not valid: ")
    assert "\n" not in str(refused.value)


def test_a_model_without_an_end_token_cannot_be_guided(byte_level: Tokenizer) -> None:
    with pytest.raises(EngineError, match="end-of-text"):
        guide(byte_level, eos=(), regex="a")


def test_guides_are_compiled_in_many_threads(byte_level_folder) -> None:
    fresh = Tokenizer.load(byte_level_folder)
    with ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda seed: sample(guide(fresh, json_schema=PERSON), fresh, seed), range(16))
    assert all(json.loads(text) for text in texts)
