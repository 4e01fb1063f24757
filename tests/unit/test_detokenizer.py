import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from farrier.runtime.detokenizer import held_suffix
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.token_bytes import TokenBytes
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.errors import EngineError

PIECES = [
    "👩‍👩‍👧‍👦",
    "🇨🇭",
    "é",
    "e\u0301",
    "你好",
    "  ",
    "\n",
    "▁",
    "<0xE4>",
    "a",
    " the",
    "\u200d",
    "\ufffd",
    "�",
    "</s>",
    "Ġ",
]
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5))).map("".join)


def pieces_of(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, prompt: list[int] | None = None
) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt or [], params)
    pieces = [detokenizer.append([token_id]) for token_id in ids]
    return [*pieces, detokenizer.finish()]


@given(text=texts)
def test_text_survives_the_round_trip_and_comes_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    if tokenizer.token_id("Ġ") is None:
        text = text.replace("▁", " ")  # what SentencePiece writes spaces with is a space to it
    pieces = pieces_of(tokenizer, ids, SamplingParams())
    assert "".join(pieces) == tokenizer.decode(ids) == text
    sizes = [len(tokenizer.token_bytes(token_id)) for token_id in ids]
    read, out = len(text.encode()) - sum(sizes), ""  # below 0 by the leading space that is dropped
    for size, piece in zip(sizes, pieces, strict=False):
        read += size
        out += piece
        assert out == text.encode()[:read].decode(errors="ignore")  # all whole characters, at once


@given(data=st.data())
def test_pieces_of_any_tokens_make_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3)))
    skip = data.draw(st.booleans())
    pieces = pieces_of(tokenizer, ids, SamplingParams(skip_special_tokens=skip))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    detokenizer = tokenizer.detokenizer([], SamplingParams(skip_special_tokens=skip))
    joined = "".join(detokenizer.append(ids[a:b]) for a, b in itertools.pairwise([0, *cuts, len(ids)]))
    assert joined + detokenizer.finish() == "".join(pieces)


@given(data=st.data())
def test_byte_level_decodes_as_hugging_face_does(byte_level: Tokenizer, byte_level_folder, data: st.DataObject) -> None:
    backend = Backend.from_file(str(byte_level_folder / "tokenizer.json"))
    ids = data.draw(st.lists(st.integers(0, byte_level.vocab_size + 3)))
    skip = data.draw(st.booleans())
    assert byte_level.decode(ids, skip_special_tokens=skip) == backend.decode(ids, skip_special_tokens=skip)


@given(data=st.data())
def test_sentencepiece_decodes_as_hugging_face_does_where_bytes_are_whole_characters(
    sentencepiece: Tokenizer, sentencepiece_folder, data: st.DataObject
) -> None:
    backend = Backend.from_file(str(sentencepiece_folder / "tokenizer.json"))
    first_byte = sentencepiece.token_id("<0x00>")
    token = st.one_of(
        st.integers(0, first_byte - 1).map(lambda token_id: [token_id]),
        st.integers(first_byte + 256, sentencepiece.vocab_size + 3).map(lambda token_id: [token_id]),
        st.characters(codec="utf-8").map(lambda char: [first_byte + byte for byte in char.encode()]),
    )
    ids = list(itertools.chain.from_iterable(data.draw(st.lists(token))))
    skip = data.draw(st.booleans())
    assert sentencepiece.decode(ids, skip_special_tokens=skip) == backend.decode(ids, skip_special_tokens=skip)


def test_a_broken_character_costs_itself_alone(sentencepiece: Tokenizer) -> None:
    first_byte = sentencepiece.token_id("<0x00>")
    ids = [first_byte + byte for byte in b"\xe4\xbd\xa0\xff\xe4\xbd\xa0\xe4\xbd"]
    assert pieces_of(sentencepiece, ids, SamplingParams()) == ["", "", "你", "�", "", "", "你", "", "", "�"]


def test_a_leading_space_is_dropped_only_where_a_text_begins(sentencepiece: Tokenizer) -> None:
    the = sentencepiece.encode("the", add_special_tokens=False)
    bos, text = sentencepiece.bos_token_id, sentencepiece.encode("dog", add_special_tokens=False)
    assert "".join(pieces_of(sentencepiece, the, SamplingParams(), prompt=[])) == "the"
    assert "".join(pieces_of(sentencepiece, the, SamplingParams(), prompt=[*text, bos])) == "the"
    assert "".join(pieces_of(sentencepiece, the, SamplingParams(), prompt=[bos, *text])) == " the"
    assert "".join(pieces_of(sentencepiece, [bos, *the], SamplingParams())) == "the"


@given(data=st.data())
def test_output_continues_the_prompt(sentencepiece: Tokenizer, data: st.DataObject) -> None:
    words = st.lists(st.sampled_from(["the", "dog", " jumps", "fox,", "你好", "🙂"])).map(" ".join)
    prompt = sentencepiece.encode(data.draw(words) + "x")
    output = sentencepiece.encode(data.draw(words), add_special_tokens=False)
    text = "".join(pieces_of(sentencepiece, output, SamplingParams(), prompt))
    assert sentencepiece.decode(prompt) + text == sentencepiece.decode(prompt + output)


def test_special_tokens_are_skipped_or_shown(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_id("</s>"), *tokenizer.encode("fox", add_special_tokens=False), tokenizer.token_id("[INST]")]
    assert tokenizer.decode(ids) == "fox"
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert shown.replace(" ", "") == "</s>fox[INST]"


# --- stop strings ---

stop_texts = st.text("ab<>🙂", max_size=30)
stops = st.lists(st.text("ab<>🙂", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """By definition: the shortest beginning of the text that ends with a stop string; of those, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return end - len(stop), stop
    return None


def held_by_definition(text: str, stops: tuple[str, ...]) -> int:
    return max(
        (n for n in range(len(text) + 1) for stop in stops if n < len(stop) and text.endswith(stop[:n])), default=0
    )


@given(text=stop_texts, stops=stops)
def test_held_suffix_is_the_longest_that_may_become_a_stop_string(text: str, stops: tuple[str, ...]) -> None:
    assert held_suffix(text, stops) == held_by_definition(text, stops)


@given(text=stop_texts, stops=stops, include=st.booleans(), data=st.data())
def test_the_first_stop_string_wins_however_the_text_is_cut(
    byte_level: Tokenizer, text: str, stops: tuple[str, ...], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    detokenizer = byte_level.detokenizer([], params)
    out, seen, expected = "", "", first_stop(text, stops)
    for chunk in chunks:
        out += detokenizer.append(byte_level.encode(chunk, add_special_tokens=False))
        seen += chunk
        if detokenizer.stopped_by is None:
            assert seen[len(out) :] == seen[len(seen) - held_by_definition(seen, stops) :]
    out += detokenizer.finish()
    if expected is None:
        assert (out, detokenizer.stopped_by) == (text, None)
    else:
        start, stop = expected
        assert (out, detokenizer.stopped_by) == (text[: start + len(stop) * include], stop)


def test_stop_strings_do_not_count_within_min_tokens(byte_level: Tokenizer) -> None:
    ids = [byte_level.token_id(char) for char in "abcabcab"]
    detokenizer = byte_level.detokenizer([], SamplingParams(stop=("abc", "b"), min_tokens=3))
    assert detokenizer.append(ids) == "abca"
    assert detokenizer.stopped_by == "b"
    assert detokenizer.append(ids) == detokenizer.finish() == ""


# --- decoders ---


def token_bytes(decoder: decoders.Decoder | None, tokens: list[str]) -> TokenBytes:
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    if decoder is not None:
        backend.decoder = decoder
    return TokenBytes(backend)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_decodes_as_hugging_face_does(scheme: str) -> None:
    tokens = ["▁▁a▁", "▁b", "▁", "c"]
    decoder = decoders.Metaspace(prepend_scheme=scheme)
    vocabulary = token_bytes(decoder, tokens)
    for order in itertools.permutations(range(4)):
        text = vocabulary.at_start(order[0]) + b"".join(vocabulary[i] for i in order[1:])
        assert text.decode() == decoder.decode([tokens[i] for i in order])


def test_an_added_token_outside_of_the_byte_alphabet_is_itself() -> None:
    vocabulary = token_bytes(decoders.ByteLevel(), ["Ġa", "<｜end▁of▁text｜>"])
    assert (vocabulary[0], vocabulary[1].decode()) == (b" a", "<｜end▁of▁text｜>")


def test_gemma_keeps_leading_spaces() -> None:
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert token_bytes(decoder, ["▁a"]).at_start(0) == b" a"


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0)]), "Strip"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), "ByteLevel"),
        (None, "no decoder"),
    ],
)
def test_an_unknown_decoder_is_refused_by_name(decoder: decoders.Decoder | None, name: str) -> None:
    with pytest.raises(EngineError, match=name):
        token_bytes(decoder, ["a"])
