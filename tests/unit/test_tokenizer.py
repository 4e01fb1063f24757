import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.errors import EngineError, RequestError


@pytest.fixture
def folder(byte_level_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(byte_level_folder, tmp_path / "model"))


def configure(folder: Path, **config: object) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece"])
@given(text=st.text())
def test_encodes_as_transformers_does(name: str, request: pytest.FixtureRequest, text: str) -> None:
    ours: Tokenizer = request.getfixturevalue(name)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(request.getfixturevalue(f"{name}_folder") / "tokenizer.json"))
    for example in (text, f"<s>{text}</s><|im_end|>"):
        assert ours.encode(example) == theirs(example)["input_ids"]
        assert ours.encode(example, add_special_tokens=False) == theirs(example, add_special_tokens=False)["input_ids"]


def test_special_tokens_in_a_text_are_parsed_or_left_as_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_id
    parsed = tokenizer.encode("fox</s>", add_special_tokens=False)
    plain = tokenizer.encode("fox</s>", add_special_tokens=False, parse_special=False)
    assert end in parsed
    assert tokenizer.special_token_ids.isdisjoint(plain)
    assert tokenizer.decode(plain) == "fox</s>"
    assert tokenizer.encode("fox", parse_special=False)[0] == tokenizer.bos_token_id


def test_what_it_knows_of_its_tokens(byte_level: Tokenizer) -> None:
    assert byte_level.bos_token_id == 1
    assert byte_level.eos_token_id == 2
    assert byte_level.vocab_size == 402
    assert byte_level.token_bytes(byte_level.token_id("Ġ")) == b" "
    assert byte_level.token_text(byte_level.token_id("Ġ")) == " "
    first_of_two = byte_level.encode("ß", add_special_tokens=False)[0]
    assert byte_level.token_bytes(first_of_two) == "ß".encode()[:1]
    assert byte_level.token_text(first_of_two) == "\ufffd"
    assert byte_level.token_bytes(10_000) == b""
    assert byte_level.token_id("<tool_call>") not in byte_level.special_token_ids


def test_unpaired_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    for parse_special in (True, False):
        with pytest.raises(RequestError, match="not valid Unicode"):
            tokenizer.encode("a\ud800b", parse_special=parse_special)


def test_threads_share_a_tokenizer(byte_level_folder: Path) -> None:
    fresh = Tokenizer.load(byte_level_folder)
    texts = [f"{i} the quick </s> fox 🙂" for i in range(200)]

    def there_and_back(text: str) -> str:
        return fresh.decode(fresh.encode(text, add_special_tokens=False, parse_special=False))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, texts)) == texts


# --- loading ---


def test_special_tokens_may_be_objects_or_in_their_own_file(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<unk>"}))
    loaded = Tokenizer.load(configure(folder, eos_token={"content": "</s>", "special": True}, add_bos_token=True))
    assert loaded.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)


def test_a_tokenizer_json_alone_will_do(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    loaded = Tokenizer.load(folder)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.chat_template) == (None, None, None)


def test_chat_templates_where_transformers_looks_for_them(folder: Path) -> None:
    assert Tokenizer.load(configure(folder, chat_template="one")).chat_template == "one"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "three"}]
    loaded = Tokenizer.load(configure(folder, chat_template=named))
    assert loaded.chat_template == "two"
    assert loaded.chat_templates["tool_use"].source == "three"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "four"}))
    assert Tokenizer.load(folder).chat_template == "four"
    (folder / "chat_template.jinja").write_text("five")
    assert Tokenizer.load(folder).chat_template == "five"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "is missing"),
        ("tokenizer.json", "", "cannot be read|can be read"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE"', "can be read"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"eos_token": "<gone>"}', "no such token"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": ["default"]}', "chat_template"),
    ],
)
def test_what_is_missing_or_corrupt_is_one_clear_error(
    folder: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(EngineError, match=message):
        Tokenizer.load(folder)


def test_truncation_and_padding_of_the_file_are_not_applied(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len(Tokenizer.load(folder).encode("the quick brown fox jumps")) > 3
