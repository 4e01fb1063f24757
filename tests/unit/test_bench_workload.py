"""What the benchmarks ask for."""

import json
from pathlib import Path

import numpy as np
import pytest

from farrier.runtime.bench.workload import BenchRequest, Lengths, random_requests, read_dataset
from farrier.targets.errors import RequestError


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize(("text", "least", "most"), [("128", 128, 128), ("64:256", 64, 256), ("5:5", 5, 5)])
def test_counts_and_ranges_include_their_ends(text: str, least: int, most: int) -> None:
    drawn = Lengths.parse(text, "--input-len").draw(rng(), 5000)
    assert (min(drawn), max(drawn)) == (least, most)


def test_normal_lengths_have_the_asked_mean_and_deviation_and_are_never_below_1() -> None:
    drawn = Lengths.parse("normal:200:20.5", "--input-len").draw(rng(), 5000)
    assert np.mean(drawn) == pytest.approx(200, abs=2)
    assert np.std(drawn) == pytest.approx(20.5, abs=1)
    assert min(Lengths.parse("normal:1:50", "--input-len").draw(rng(), 1000)) == 1


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "8:4", "0:4", "1:2:3", "a", "normal:", "normal:5", "normal:0:1", "normal:5:-1", "²"]
)
def test_other_spellings_of_lengths_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--input-len is a count"):
        Lengths.parse(text, "--input-len")


def test_random_token_prompts_have_their_lengths_and_share_no_beginning() -> None:
    inputs, outputs = Lengths.parse("10:20", "i"), Lengths.parse("3", "o")
    requests = random_requests(rng(), 100, inputs, outputs, "tokens", 1000)
    prompts = [request.prompt["prompt_token_ids"] for request in requests]  # type: ignore[call-overload, index]
    assert all(10 <= len(prompt) <= 20 and max(prompt) < 1000 for prompt in prompts)
    assert {request.max_tokens for request in requests} == {3}
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 100


def test_equal_seeds_give_equal_requests() -> None:
    lengths = Lengths.parse("normal:20:5", "i")
    first, second = (random_requests(rng(), 10, lengths, lengths, "text", 10) for _ in range(2))
    assert first == second


def test_text_and_chat_prompts_have_a_word_a_token() -> None:
    lengths = Lengths.parse("12", "i")
    [text] = random_requests(rng(), 1, lengths, lengths, "text", 10)
    [chat] = random_requests(rng(), 1, lengths, lengths, "chat", 10)
    assert isinstance(text.prompt, str)
    assert len(text.prompt.split()) == 12
    assert chat.prompt == [{"role": "user", "content": text.prompt}]


def test_a_data_set_holds_text_tokens_and_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    records = [{"prompt": "a"}, {"prompt_token_ids": [1, 2], "max_tokens": 5}, {"messages": messages, "other": 1}]
    path = tmp_path / "set.jsonl"
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    defaults = iter([7, 8])
    assert read_dataset(path, lambda: next(defaults)) == [
        BenchRequest("a", 7),
        BenchRequest({"prompt_token_ids": [1, 2]}, 5),
        BenchRequest(messages, 8),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "not JSON",
        "[]",
        "{}",
        '{"prompt": ""}',
        '{"prompt": 5}',
        '{"prompt_token_ids": []}',
        '{"prompt_token_ids": [1, true]}',
        '{"prompt_token_ids": [1, "2"]}',
        '{"messages": []}',
        '{"prompt": "a", "max_tokens": 0}',
        '{"prompt": "a", "max_tokens": "5"}',
        '{"prompt": "a", "max_tokens": null}',
    ],
)
def test_a_record_that_cannot_be_used_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(RequestError, match="line 2"):
        read_dataset(path, lambda: 1)


def test_a_data_set_that_is_empty_missing_or_binary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    for name in ("empty", "binary", "missing"):
        with pytest.raises(RequestError, match=name):
            read_dataset(tmp_path / f"{name}.jsonl", lambda: 1)
