"""POST /v1/chat/completions, judged by OpenAI's client. The model repeats the last message."""

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest

Client = openai.OpenAI


def ask(client: Client, content: str, **fields: Any) -> Any:
    messages = [{"role": "system", "content": "You repeat."}, {"role": "user", "content": content}]
    return client.chat.completions.create(**{"model": "parrot", "messages": messages, **fields})


def text_of(chunks: list[Any]) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_a_message_is_answered(client: Client) -> None:
    answer = ask(client, "Grüße an 你好 🙂")
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "Grüße an 你好 🙂")
    assert choice.message.tool_calls is None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id == answer.id


def test_a_stream_starts_with_the_role_and_ends_with_the_reason(client: Client) -> None:
    chunks = list(ask(client, "Grüße an 你好 🙂", stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert text_of(chunks) == "Grüße an 你好 🙂"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_tells_its_usage_when_asked(client: Client) -> None:
    *chunks, last = ask(client, "hello", stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    whole = ask(client, "hello").usage
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert all(chunk.usage is None for chunk in chunks)


def test_streamed_choices_keep_apart(client: Client) -> None:
    texts, roles, finished = [""] * 3, [0] * 3, [0] * 3
    for chunk in ask(client, "one of three", n=3, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        finished[choice.index] += choice.finish_reason == "stop"
    assert texts == ["one of three"] * 3
    assert roles == finished == [1] * 3


def test_output_ends_at_the_engines_length_unless_told(client: Client) -> None:
    answer = ask(client, "x" * 300)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == 512
    assert ask(client, "hello", max_tokens=2).choices[0].message.content == "he"
    assert ask(client, "hello", max_completion_tokens=2).choices[0].message.content == "he"


def test_content_may_come_in_parts(client: Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = client.chat.completions.create(model="parrot", messages=[{"role": "user", "content": parts}])  # type: ignore[misc, list-item]
    assert answer.choices[0].message.content == "ab"


def test_the_conversation_can_go_on(client: Client) -> None:
    messages: list[Any] = [{"role": "user", "content": "first"}]
    messages.append(client.chat.completions.create(model="parrot", messages=messages).choices[0].message)
    messages.append({"role": "user", "content": "second"})
    assert client.chat.completions.create(model="parrot", messages=messages).choices[0].message.content == "second"


def test_the_final_message_can_be_continued(client: Client) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "he"}]
    answer = client.chat.completions.create(
        model="parrot", messages=messages, extra_body={"continue_final_message": True}
    )
    assert answer.choices[0].message.content == "llo"


def test_control_tokens_in_a_message_are_text(client: Client) -> None:
    assert ask(client, "a<|im_end|>b").choices[0].message.content == "a<|im_end|>b"


def test_logprobs_of_a_chat_have_bytes(client: Client) -> None:
    logprobs = ask(client, "aä", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.token for entry in logprobs] == ["a", "\ufffd", "\ufffd", "</s>"]
    assert [entry.bytes for entry in logprobs[:3]] == [[97], [0xC3], [0xA4]]
    assert logprobs[0].logprob == pytest.approx(0, abs=1e-5)
    assert [[top.token for top in entry.top_logprobs] for entry in logprobs[:1]] == [["a", "</s>"]]
    assert ask(client, "a", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_streamed_logprobs_are_those_of_the_whole(client: Client) -> None:
    whole = ask(client, "hä", logprobs=True, top_logprobs=1).choices[0].logprobs.content
    chunks = list(ask(client, "hä", logprobs=True, top_logprobs=1, stream=True))
    pieces = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert pieces == whole
    assert text_of(chunks) == "hä"


def test_a_json_object_is_one(client: Client) -> None:
    answer = ask(client, '{"a": [1, 2]} and more', response_format={"type": "json_object"}, temperature=0)
    assert json.loads(answer.choices[0].message.content) == {"a": [1, 2]}


def test_a_json_schema_is_followed(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"enum": ["small", "large"]}, "count": {"const": 3}},
        "required": ["size", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "order", "strict": True, "schema": schema}}
    answer = ask(client, "whatever", response_format=wanted, temperature=0, max_tokens=200)
    order = json.loads(answer.choices[0].message.content)
    assert order["size"] in ("small", "large")
    assert order["count"] == 3


def test_openais_own_parser_accepts_a_schema_answer(client: Client) -> None:
    class Point(pydantic.BaseModel):
        x: int
        y: int

    answer = client.chat.completions.parse(
        model="parrot",
        messages=[{"role": "user", "content": '{"x": 1, "y": -2}'}],
        response_format=Point,
        temperature=0,
    )
    assert answer.choices[0].message.parsed == Point(x=1, y=-2)


async def collect(client: openai.AsyncOpenAI, content: str) -> str:
    stream = await client.chat.completions.create(
        model="parrot", messages=[{"role": "user", "content": content}], stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_many_streams_at_once_do_not_mix(url: str) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return list(await asyncio.gather(*(collect(client, f"message number {i} 🙂") for i in range(64))))

    assert asyncio.run(ask_all()) == [f"message number {i} 🙂" for i in range(64)]
