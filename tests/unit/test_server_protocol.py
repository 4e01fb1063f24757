"""Bodies to requests: what is accepted, what is refused, and which field the refusal names."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farrier.runtime.sampling_params import GuidedDecoding, SamplingParams
from farrier.runtime.server.body import parse
from farrier.runtime.server.protocol import ChatCompletionRequest, CompletionRequest
from farrier.targets.errors import RequestError

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse(json.dumps(CHAT | fields).encode(), ChatCompletionRequest)


def completion(**fields: Any) -> CompletionRequest:
    return parse(json.dumps(COMPLETION | fields).encode(), CompletionRequest)


def user(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **message}]}


def function(**definition: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": definition}]}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"temperature": True}, "temperature", "invalid_value"),
        ({"n": 1.0}, "n", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 10**30}, "n", "invalid_value"),
        ({"top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stop": 3}, "stop", "invalid_value"),
        ({"stop": ["a", 3]}, "stop[1]", "invalid_value"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a", "invalid_value"),
        ({"logit_bias": {"7": "x"}}, "logit_bias.7", "invalid_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_value"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "alien", "content": "hi"}]}, "messages[0].role", "invalid_value"),
        (user(), "messages[0].content", "missing_required_parameter"),
        (user(content=3), "messages[0].content", "invalid_value"),
        (user(content="x", mood="good"), "messages[0].mood", "unknown_parameter"),
        (user(content=[{"type": "image_url", "image_url": {}}]), "messages[0].content[0].type", "invalid_value"),
        (function(name="not a name"), "tools[0].function.name", "invalid_value"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "invalid_value"),
        ({"tool_choice": "maybe"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "missing_required_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        ({"structured_outputs": {"json": 3}}, "structured_outputs.json", "invalid_value"),
    ],
)
def test_a_refusal_names_the_field(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert f"'{param}'" in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (3, "prompt"),
        (None, "prompt"),
        ([], "prompt"),
        (["a", 1], "prompt[1]"),
        ([1, "a"], "prompt[1]"),
        ([1, -1], "prompt[1]"),
        ([1, 2**40], "prompt[1]"),
        ([[1], [2, "x"]], "prompt[1][1]"),
    ],
)
def test_a_prompt_is_text_or_token_ids_or_lists_of_one_of_them(prompt: object, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == param


@pytest.mark.parametrize("prompt", ["hi", ["hi", "ho"], [1, 2], [[1, 2], [3]]])
def test_every_kind_of_prompt_is_taken(prompt: object) -> None:
    assert completion(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    "refused",
    [
        {"audio": {"voice": "alloy", "format": "wav"}},
        {"functions": []},
        {"function_call": "auto"},
        {"prediction": {"type": "content", "content": "x"}},
        {"reasoning_effort": "low"},
        {"web_search_options": {}},
        {"moderation": {}},
        {"modalities": ["text", "audio"]},
        {"store": True},
        {"service_tier": "flex"},
        {"verbosity": "low"},
    ],
)
def test_what_would_change_the_answer_and_cannot_be_honoured_is_refused(refused: dict[str, Any]) -> None:
    [name] = refused
    with pytest.raises(RequestError) as caught:
        chat(**refused)
    assert caught.value.param is not None
    assert caught.value.param.startswith(name)
    chat(**{name: None})


def test_what_changes_nothing_is_accepted() -> None:
    chat(
        user="me",
        metadata={"a": "b"},
        safety_identifier="x",
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        service_tier="auto",
        store=False,
        modalities=["text"],
        verbosity="medium",
        parallel_tool_calls=True,
    )


def test_an_assistant_message_can_be_sent_back_as_it_came() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answer = {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]}
    result = {"role": "tool", "content": [{"type": "text", "text": "3"}], "tool_call_id": "c"}
    assert len(chat(messages=[*CHAT["messages"], answer, result]).messages) == 3


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"model": "m"} x',
        b'{"model": NaN}',
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 10_000 + b"}",
        b"\xef\xbb\xbf{}",
    ],
)
def test_what_is_not_strict_json_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(raw, CompletionRequest)
    assert caught.value.code == "invalid_json"


def test_infinity_is_no_temperature() -> None:
    with pytest.raises(RequestError) as caught:
        parse(b'{"model": "m", "prompt": "x", "temperature": 1e999}', CompletionRequest)
    assert caught.value.param == "temperature"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=10,
)
fields = st.sampled_from([*ChatCompletionRequest.model_fields, "messages", "unknown"])


@given(st.dictionaries(fields, json_values, max_size=5))
def test_any_body_is_accepted_or_refused(body: dict[str, Any]) -> None:
    with suppress(RequestError):
        request = parse(json.dumps(CHAT | body).encode(), ChatCompletionRequest)
        request.sampling_params(guided=request.guided_decoding())


def test_fields_left_out_keep_the_defaults() -> None:
    assert completion().sampling_params() == SamplingParams()


def test_fields_become_sampling_params() -> None:
    params = completion(
        n=2,
        top_k=-1,
        stop="x",
        logit_bias={"5": 1},
        seed=7,
        min_p=0.1,
        ignore_eos=True,
        stop_token_ids=[3],
        priority=-1,
    ).sampling_params()
    assert params == SamplingParams(
        n=2,
        top_k=0,
        stop=("x",),
        logit_bias={5: 1.0},
        seed=7,
        min_p=0.1,
        ignore_eos=True,
        stop_token_ids=(3,),
        priority=-1,
    )


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "guided"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, GuidedDecoding(json_object=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            GuidedDecoding(json_schema=SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, GuidedDecoding(json_schema=SCHEMA)),
        ({"structured_outputs": {"json_object": True}}, GuidedDecoding(json_object=True)),
        ({"structured_outputs": {"choice": ["a", "b"]}}, GuidedDecoding(choice=("a", "b"))),
        ({"guided_json": json.dumps(SCHEMA)}, GuidedDecoding(json_schema=SCHEMA)),
        ({"guided_regex": "a+"}, GuidedDecoding(regex="a+")),
        ({"guided_choice": ["a"]}, GuidedDecoding(choice=("a",))),
        ({"guided_grammar": "start: A"}, GuidedDecoding(grammar="start: A")),
        ({"guided_regex": "a+", "response_format": {"type": "text"}}, GuidedDecoding(regex="a+")),
    ],
)
def test_guided_decoding_has_openais_and_vllms_names(fields: dict[str, Any], guided: GuidedDecoding | None) -> None:
    assert chat(**fields).guided_decoding() == guided


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
    ],
)
def test_guided_decoding_takes_one_constraint(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields).guided_decoding()
    assert caught.value.param == param


def test_stream_options_need_a_stream() -> None:
    with pytest.raises(RequestError) as caught:
        chat(stream_options={"include_usage": True}).sampling_params()
    assert caught.value.param == "stream_options"


@pytest.mark.parametrize(
    ("request_", "param", "name"),
    [
        (chat(max_completion_tokens=5), "max_tokens", "max_completion_tokens"),
        (chat(max_tokens=5), "max_tokens", "max_tokens"),
        (chat(), "prompt", "messages"),
        (chat(response_format={"type": "json_object"}), "guided_json", "response_format"),
        (chat(guided_regex="("), "guided_regex", "guided_regex"),
        (chat(**function(name="f")), "guided_grammar", "tools"),
        (completion(), "prompt", "prompt"),
        (completion(), None, None),
    ],
)
def test_errors_of_the_runtime_name_what_the_client_wrote(
    request_: ChatCompletionRequest | CompletionRequest, param: str | None, name: str | None
) -> None:
    error = request_.in_its_words(RequestError("No.", param=param, code="nope"))
    assert (str(error), error.param, error.code) == ("No.", name, "nope")
