"""Tool calling, judged by OpenAI's client. The model repeats the last message, so that says what it calls."""

import json
from typing import Any

import openai
import pytest

from farrier.runtime.tokenizer import Tokenizer
from tests.integration.parrot import Parrot

Client = openai.OpenAI

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather somewhere.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
PING = {
    "type": "function",
    "function": {
        "name": "ping",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"host": {"enum": ["a", "b"]}},
            "required": ["host"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def parrot(byte_tokenizer: Tokenizer) -> Parrot:
    return Parrot(byte_tokenizer, max_seq_len=2048)


def call(name: str, **arguments: Any) -> str:
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{written}\n</tool_call>"


def ask(client: Client, content: str, **fields: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        **{"model": "parrot", "messages": messages, "tools": [WEATHER, TIME, PING], "temperature": 0, **fields}
    )


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(made.function.name, json.loads(made.function.arguments)) for made in message.tool_calls]


def test_a_call_is_found(client: Client) -> None:
    [choice] = ask(client, call("get_weather", city="Zürich", days=3)).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [made] = choice.message.tool_calls
    assert (made.type, made.function.name) == ("function", "get_weather")
    assert json.loads(made.function.arguments) == {"city": "Zürich", "days": 3}
    assert made.id


def test_text_and_several_calls(client: Client) -> None:
    text = "Let me see.\n" + call("get_weather", city="Bern") + "\n" + call("get_time")
    [choice] = ask(client, text).choices
    assert choice.message.content.strip() == "Let me see."
    assert calls_of(choice.message) == [("get_weather", {"city": "Bern"}), ("get_time", {})]
    assert len({made.id for made in choice.message.tool_calls}) == 2


def test_no_call_is_an_ordinary_answer(client: Client) -> None:
    [choice] = ask(client, "Just 1 < 2.").choices
    assert (choice.finish_reason, choice.message.content) == ("stop", "Just 1 < 2.")
    assert choice.message.tool_calls is None


def test_calls_are_streamed_in_openais_shape(client: Client) -> None:
    text = "See. " + call("get_weather", city="Zürich") + "\n" + call("get_time")
    chunks = [chunk.choices[0] for chunk in ask(client, text, stream=True)]
    assert chunks[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in chunks).strip() == "See."
    deltas = [made for choice in chunks for made in choice.delta.tool_calls or []]
    first = {index: next(made for made in deltas if made.index == index) for index in (0, 1)}
    assert [first[index].function.name for index in (0, 1)] == ["get_weather", "get_time"]
    for made in deltas:
        if made is first[made.index]:
            assert (made.type, made.function.arguments) == ("function", "")
            assert made.id
        else:
            assert (made.id, made.type, made.function.name) == (None, None, None)
    arguments = ["".join(made.function.arguments for made in deltas if made.index == index) for index in (0, 1)]
    assert [json.loads(text) for text in arguments] == [{"city": "Zürich"}, {}]
    assert sum(made.index == 0 for made in deltas) > 3
    assert [choice.finish_reason for choice in chunks if choice.finish_reason] == ["tool_calls"]


def test_openais_stream_helper_puts_the_calls_together(client: Client) -> None:
    messages: Any = [{"role": "user", "content": call("ping", host="b")}]
    with client.chat.completions.stream(model="parrot", messages=messages, tools=[PING], temperature=0) as stream:  # type: ignore[list-item]
        final = stream.get_final_completion()
    [made] = final.choices[0].message.tool_calls or []
    assert made.function.parsed_arguments == {"host": "b"}


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_calls_for_itself(client: Client, stream: bool) -> None:
    answer = ask(client, call("ping", host="a"), n=2, stream=stream)
    names: dict[int, str] = {}
    for part in answer if stream else [answer]:
        for choice in part.choices:
            for made in (choice.delta if stream else choice.message).tool_calls or []:
                names[choice.index] = names.get(choice.index, "") + (made.function.name or "")
    assert names == {0: "ping", 1: "ping"}


def test_a_required_call_is_made(client: Client) -> None:
    [choice] = ask(client, "no call here", tool_choice="required", tools=[PING], max_tokens=200).choices
    assert choice.finish_reason == "tool_calls"
    [(name, arguments), *_] = calls_of(choice.message)
    assert name == "ping"
    assert arguments["host"] in ("a", "b")


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called_once(client: Client, stream: bool) -> None:
    wanted = {"type": "function", "function": {"name": "ping"}}
    answer = ask(client, "no call here", tool_choice=wanted, stream=stream, max_tokens=200)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        deltas = [made for choice in chunks for made in choice.delta.tool_calls or []]
        assert {made.index for made in deltas} == {0}
        assert deltas[0].function.name == "ping"
        assert chunks[-1].finish_reason == "tool_calls"
    else:
        assert [name for name, _ in calls_of(answer.choices[0].message)] == ["ping"]


def test_one_call_at_a_time(client: Client) -> None:
    text = call("ping", host="a") + "\n" + call("ping", host="b")
    both = ask(client, text).choices[0].message
    assert calls_of(both) == [("ping", {"host": "a"}), ("ping", {"host": "b"})]
    one = ask(client, text, parallel_tool_calls=False).choices[0].message
    assert calls_of(one) == [("ping", {"host": "a"})]


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": openai.NOT_GIVEN}])
def test_without_tools_nothing_is_a_call(client: Client, fields: dict[str, Any]) -> None:
    [choice] = ask(client, call("ping", host="a"), **fields).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", call("ping", host="a"))


def test_a_call_cut_short_is_not_finished(client: Client) -> None:
    [choice] = ask(client, call("get_weather", city="Bern"), max_tokens=55).choices
    assert choice.finish_reason == "length"


def test_results_go_back_to_the_model(client: Client) -> None:
    messages: list[Any] = [{"role": "user", "content": call("ping", host="a")}]
    answer = client.chat.completions.create(model="parrot", messages=messages, tools=[PING], temperature=0)  # type: ignore[list-item]
    message = answer.choices[0].message
    assert message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "pong after 3 ms"}]
    final = client.chat.completions.create(model="parrot", messages=messages, tools=[PING], temperature=0)  # type: ignore[list-item]
    assert final.choices[0].message.content == "pong after 3 ms"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"extra_body": {"guided_regex": "a"}}, "tools"),
        ({"tools": openai.NOT_GIVEN, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}]}, "tools"),
    ],
)
def test_what_cannot_be_called_is_refused(client: Client, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "hello", **fields)
    assert caught.value.param == param
