"""The demo model, built and served as a user would, judged by OpenAI's client."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving import FARRIER, client_of, serving

STATUS = {
    "type": "function",
    "function": {
        "name": "get_device_status",
        "description": "The status of a device.",
        "parameters": {
            "type": "object",
            "properties": {"device": {"type": "string"}},
            "required": ["device"],
            "additionalProperties": False,
        },
    },
}
HELLO = {"role": "user", "content": "Hello, who are you?"}
PUMP: dict[str, Any] = {"role": "user", "content": "What is the status of pump-3?"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine: Path = tmp_path_factory.mktemp("demo") / "engine"
    subprocess.run([*FARRIER, "build", "demo", "-o", str(engine)], check=True, capture_output=True)
    with serving(engine) as (_, address):
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as opened:
        yield opened


def ask(client: Any, *messages: Any, **fields: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=list(messages), temperature=0, **fields)


def test_it_says_who_it_is(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["demo"]
    [choice] = ask(client, HELLO).choices
    assert "farrier" in choice.message.content
    assert choice.finish_reason == "stop"


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    whole = ask(client, HELLO)
    *chunks, last = ask(client, HELLO, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_a_tool_is_called_and_its_result_told(client: openai.OpenAI) -> None:
    answer = ask(client, PUMP, tools=[STATUS]).choices[0]
    assert answer.finish_reason == "tool_calls"
    [call] = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_device_status", {"device": "pump-3"})
    deltas = [chunk.choices[0].delta for chunk in ask(client, PUMP, tools=[STATUS], stream=True)]
    fragments = [made.function.arguments for delta in deltas for made in delta.tool_calls or []]
    assert "".join(fragments) == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"status": "offline"}'}
    told = ask(client, PUMP, answer.message, result, tools=[STATUS]).choices[0]
    assert "pump-3" in told.message.content
    assert "offline" in told.message.content


def test_a_call_can_be_demanded(client: openai.OpenAI) -> None:
    message = ask(client, HELLO, tools=[STATUS], tool_choice="required", max_tokens=200).choices[0].message
    assert message.tool_calls[0].function.name == "get_device_status"
    assert isinstance(json.loads(message.tool_calls[0].function.arguments)["device"], str)


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ann", "Bob"]}, "old": {"type": "boolean"}},
        "required": ["name", "old"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    found = json.loads(ask(client, HELLO, response_format=wanted, max_tokens=400).choices[0].message.content)
    assert found["name"] in ("Ann", "Bob")
    assert isinstance(found["old"], bool)


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(client: openai.OpenAI, url: str) -> None:
    drawn = {"model": "demo", "messages": [HELLO], "temperature": 1.5, "max_tokens": 30}
    alone = client.chat.completions.create(**drawn, seed=7).choices[0].message.content  # type: ignore[call-overload]

    async def crowd() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as many:
            seeds = [7, *range(100, 130), 7]
            return list(await asyncio.gather(*(many.chat.completions.create(**drawn, seed=seed) for seed in seeds)))

    answers = [answer.choices[0].message.content for answer in asyncio.run(crowd())]
    assert answers[0] == answers[-1] == alone


def test_health_is_answered_while_64_streams_run(url: str) -> None:
    async def read(http: httpx.AsyncClient, index: int) -> str:
        body = {"model": "demo", "prompt": f"{index} ", "max_tokens": 100, "stream": True, "ignore_eos": True}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            return [line async for line in response.aiter_lines() if line][-1]

    async def run() -> tuple[list[str], int]:
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=100)) as http:
            streams = [asyncio.create_task(read(http, index)) for index in range(64)]
            answered = 0
            while not all(stream.done() for stream in streams):
                answered += (await http.get("/health")).status_code == 200
            return [await stream for stream in streams], answered

    last_lines, answered = asyncio.run(run())
    assert last_lines == ["data: [DONE]"] * 64
    assert answered > 0
