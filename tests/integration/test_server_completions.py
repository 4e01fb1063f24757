"""POST /v1/completions, judged by OpenAI's client. The model goes on with the alphabet and ends after the z."""

from typing import Any

import openai
import pytest

from farrier.runtime.tokenizer import Tokenizer

Client = openai.OpenAI


def complete(client: Client, **fields: Any) -> Any:
    return client.completions.create(**{"model": "parrot", "prompt": "abc", **fields})


def test_a_prompt_is_continued_to_its_end(client: Client) -> None:
    answer = complete(client, max_tokens=100)
    assert answer.object == "text_completion"
    assert answer.model == "parrot"
    assert answer.choices[0].text == "defghijklmnopqrstuvwxyz"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 24, 27)


def test_sixteen_tokens_are_the_default(client: Client) -> None:
    answer = complete(client)
    assert answer.choices[0].text == "defghijklmnopqrs"
    assert answer.choices[0].finish_reason == "length"


def test_token_ids_are_a_prompt(client: Client, byte_tokenizer: Tokenizer) -> None:
    answer = complete(client, prompt=byte_tokenizer.encode("abc"), max_tokens=2)
    assert answer.choices[0].text == "de"


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_with_several_choices_each(client: Client, byte_tokenizer: Tokenizer, as_ids: bool) -> None:
    prompts: Any = ["a", "k", "x"]
    if as_ids:
        prompts = [byte_tokenizer.encode(prompt) for prompt in prompts]
    answer = complete(client, prompt=prompts, n=2, max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    assert [choice.text for choice in answer.choices] == ["bcd", "bcd", "lmn", "lmn", "yz", "yz"]
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 4 + ["stop"] * 2
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 2 * (3 + 3 + 3)


def test_several_prompts_streamed(client: Client) -> None:
    texts = [""] * 4
    finished = {}
    chunks = list(
        complete(client, prompt=["a", "x"], n=2, max_tokens=3, stream=True, stream_options={"include_usage": True})
    )
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason is not None:
            finished[choice.index] = choice.finish_reason
    assert texts == ["bcd", "bcd", "yz", "yz"]
    assert finished == {0: "length", 1: "length", 2: "stop", 3: "stop"}
    assert chunks[-1].choices == []
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (2, 12)
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt(client: Client, stream: bool, byte_tokenizer: Tokenizer) -> None:
    answer = complete(client, prompt=["ab", "x"], echo=True, max_tokens=2, stream=stream)
    texts = ["", ""]
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == ["abcd", "xyz"]
    assert complete(client, prompt=byte_tokenizer.encode("ab"), echo=True, max_tokens=1).choices[0].text == "abc"


def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    choice = complete(client, stop=["zz", "gh"]).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("def", "stop", "gh")
    included = complete(client, stop="gh", extra_body={"include_stop_str_in_output": True}).choices[0]
    assert included.text == "defgh"


def test_a_streamed_stop_string_never_shows(client: Client) -> None:
    chunks = [chunk.choices[0] for chunk in complete(client, stop="gh", stream=True)]
    assert "".join(choice.text for choice in chunks) == "def"
    assert chunks[-1].stop_reason == "gh"


def test_a_stop_token_id_ends_the_output(client: Client, byte_tokenizer: Tokenizer) -> None:
    [g] = byte_tokenizer.encode("g")
    choice = complete(client, extra_body={"stop_token_ids": [g]}).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("def", "stop", g)


def test_the_end_can_be_ignored(client: Client) -> None:
    choice = complete(client, prompt="y", max_tokens=4, extra_body={"ignore_eos": True}).choices[0]
    assert (choice.text, choice.finish_reason) == ("zab", "length")
    special = complete(
        client, prompt="y", max_tokens=4, extra_body={"ignore_eos": True, "skip_special_tokens": False}
    ).choices[0]
    assert special.text == "z</s>ab"


def test_min_tokens_keep_the_end_away(client: Client) -> None:
    answer = complete(client, prompt="y", max_tokens=9, temperature=0, extra_body={"min_tokens": 5})
    assert answer.usage.completion_tokens >= 5


def test_logit_bias_changes_the_choice(client: Client, byte_tokenizer: Tokenizer) -> None:
    [d], [q] = byte_tokenizer.encode("d"), byte_tokenizer.encode("q")
    choice = complete(client, temperature=0, max_tokens=2, logit_bias={str(d): -100, str(q): 100}).choices[0]
    assert choice.text == "qq"


def test_logprobs_have_tokens_alternatives_and_offsets(client: Client) -> None:
    logprobs = complete(client, max_tokens=3, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["d", "e", "f"]
    assert logprobs.token_logprobs == pytest.approx([0, 0, 0], abs=1e-5)
    assert logprobs.text_offset == [0, 1, 2]
    assert [sorted(top) for top in logprobs.top_logprobs] == [["</s>", "d"], ["</s>", "e"], ["</s>", "f"]]


def test_streamed_logprobs_are_those_of_the_whole(client: Client) -> None:
    whole = complete(client, max_tokens=5, logprobs=1).choices[0].logprobs
    pieces = [chunk.choices[0].logprobs for chunk in complete(client, max_tokens=5, logprobs=1, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for piece in pieces for entry in getattr(piece, name)] == getattr(whole, name)


def test_parts_of_characters_in_logprobs_are_bytes(client: Client, byte_tokenizer: Tokenizer) -> None:
    first = byte_tokenizer.encode("ä")[0]
    only = {"logit_bias": {str(first): 100}, "max_tokens": 1}
    assert complete(client, logprobs=0, **only).choices[0].logprobs.tokens == ["bytes:\\xc3"]
    assert complete(client, logprobs=0, echo=False, **only).choices[0].text == "\ufffd"


def test_token_ids_are_returned_when_asked_for(client: Client, byte_tokenizer: Tokenizer) -> None:
    choice = complete(client, max_tokens=2, extra_body={"return_token_ids": True}).choices[0]
    assert choice.token_ids == byte_tokenizer.encode("de")
    assert choice.prompt_token_ids == byte_tokenizer.encode("abc")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"structured_outputs": {"choice": ["stop", "go"]}}, "go"),
        ({"guided_choice": ["stop", "go"]}, "go"),
        ({"guided_regex": "[0-9]{3}"}, "000"),
        ({"guided_grammar": 'start: "x" | "y"'}, "x"),
        ({"structured_outputs": {"json": {"const": 7}}}, "7"),
    ],
)
def test_output_can_be_guided(client: Client, fields: dict[str, Any], text: str) -> None:
    choice = complete(client, temperature=0, extra_body=fields).choices[0]
    assert (choice.text, choice.finish_reason) == (text, "stop")


def test_equal_seeds_give_equal_outputs(client: Client) -> None:
    flat = {"temperature": 100, "max_tokens": 8}
    first, again, other = (complete(client, seed=seed, **flat).choices[0].text for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_prompt_seen_before_is_cached(client: Client) -> None:
    prompt = "the quick brown fox jumps over the lazy dog " * 2
    complete(client, prompt=prompt, max_tokens=1)
    usage = complete(client, prompt=prompt, max_tokens=1).usage
    assert usage.prompt_tokens_details.cached_tokens == 80
    assert usage.prompt_tokens == 88
