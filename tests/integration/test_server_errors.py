"""What the server refuses: always in OpenAI's error shape, with a status below 500 and the field by name."""

import json
import socket
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farrier.runtime.server.protocol import ChatCompletionRequest, CompletionRequest
from tests.integration.conftest import RunServer
from tests.integration.parrot import VOCAB_SIZE, Parrot

CHAT = {"model": "parrot", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETION = {"model": "parrot", "prompt": "hi", "max_tokens": 4}
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_request"),
        ({"top_p": 0}, "top_p", "invalid_request"),
        ({"frequency_penalty": 3}, "frequency_penalty", "invalid_request"),
        ({"n": 129}, "n", "invalid_request"),
        ({"min_tokens": 5}, "min_tokens", "invalid_request"),
        ({"max_tokens": 600}, "max_tokens", "context_length_exceeded"),
        ({"max_tokens": None, "max_completion_tokens": 600}, "max_completion_tokens", "context_length_exceeded"),
        ({"max_completion_tokens": 5}, "max_tokens", "invalid_request"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "context_length_exceeded"),
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias", "invalid_request"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "invalid_request"),
        ({"stop": [""]}, "stop", "invalid_request"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_request"),
        ({"tool_choice": "auto"}, "tool_choice", "invalid_request"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options", "invalid_request"),
        ({"guided_regex": "("}, "guided_regex", "invalid_request"),
        ({"chat_template_kwargs": {"nonsense": 1}}, "chat_template_kwargs", "invalid_request"),
        ({"nonsense": 1}, "nonsense", "unknown_parameter"),
        ({"audio": {}}, "audio", "unsupported_parameter"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
            "response_format",
            "invalid_request",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_chat_field_is_named(
    client: openai.OpenAI, fields: dict[str, Any], param: str, code: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"extra_body": CHAT | {"stream": stream} | fields, **CHAT})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "invalid_request"),
        ({"prompt": [[]]}, "prompt", "invalid_request"),
        ({"prompt": [VOCAB_SIZE]}, "prompt", "invalid_request"),
        ({"prompt": "x" * 600}, "prompt", "context_length_exceeded"),
        ({"prompt": ["x"] * 600}, "prompt", "invalid_request"),
        ({"logprobs": 21}, "logprobs", "invalid_request"),
        ({"echo": True, "logprobs": 1}, "echo", "invalid_request"),
        ({"best_of": 2}, "best_of", "invalid_request"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
    ],
)
def test_a_bad_completion_field_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**COMPLETION, "extra_body": fields})
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_model_that_is_not_there(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="hi")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")
    for path in PATHS[2:]:
        body = {"model": "gpt-4", "prompt": "x"} if path == "/tokenize" else {"model": "gpt-4", "tokens": [1]}
        assert error_of(httpx.post(url + path, json=body), 404)["code"] == "model_not_found"


def test_unknown_routes_and_methods(url: str) -> None:
    assert error_of(httpx.get(f"{url}/v1/nothing"), 404)["code"] == "unknown_url"
    assert error_of(httpx.post(f"{url}/v1/embeddings", json={}), 404)["code"] == "unknown_url"
    response = httpx.get(f"{url}/v1/chat/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert error_of(httpx.get(f"{url}/docs"), 404)["code"] == "unknown_url"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff\xfe", b'{"model": NaN}', b'"\\udc00"', b"[" * 10_000, b"{}}", b"[1]", b"null", b"7" * 5000],
)
def test_bodies_that_are_no_request(url: str, path: str, raw: bytes) -> None:
    error = error_of(httpx.post(url + path, content=raw, headers={"content-type": "application/json"}), 400)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_that_is_not_declared_json_is_refused(url: str, kind: str) -> None:
    response = httpx.post(f"{url}/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": kind})
    assert error_of(response, 415)["code"] == "unsupported_media_type"


def test_headers_that_are_no_request_do_not_hurt(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    for junk in (b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(junk)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_large_body_is_refused_before_it_is_read(byte_tokenizer: Any, run_server: RunServer) -> None:
    with run_server(Parrot(byte_tokenizer), max_body_bytes=1000) as url:
        declared = httpx.post(f"{url}/v1/completions", json=COMPLETION | {"prompt": "x" * 3_000_000})
        assert error_of(declared, 413)["code"] == "body_too_large"
        json_type = {"content-type": "application/json"}
        chunked = httpx.post(f"{url}/v1/completions", content=iter([b"x" * 600, b"x" * 600]), headers=json_type)
        assert error_of(chunked, 413)["code"] == "body_too_large"
        assert httpx.post(f"{url}/v1/completions", json=COMPLETION).status_code == 200


def test_a_key_is_wanted_everywhere_but_for_health(byte_tokenizer: Any, run_server: RunServer) -> None:
    with run_server(Parrot(byte_tokenizer), api_keys=("secret", "other")) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/nothing"):
            response = httpx.get(url + path)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for bad in ("Bearer wrong", "Bearer", "secret", "Basic secret", "Bearer secret2"):
            assert httpx.get(f"{url}/v1/models", headers={"authorization": bad}).status_code == 401
        wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError):
            wrong.completions.create(model="parrot", prompt="a")
        for key in ("secret", "other"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                assert client.completions.create(model="parrot", prompt="y").choices[0].text == "z"
        assert httpx.get(f"{url}/metrics", headers={"authorization": "bearer secret"}).status_code == 200
        named = {"authorization": "Bearer secret", "host": "example.com"}
        assert httpx.get(f"{url}/v1/models", headers=named).status_code == 200


def test_without_a_key_only_loopback_names_are_answered(url: str) -> None:
    for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert error_of(httpx.get(f"{url}/v1/models", headers={"host": name}), 403)["code"] == "bad_host"
    for name in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "127.1.2.3"):
        assert httpx.get(f"{url}/v1/models", headers={"host": name}).status_code == 200


def test_no_other_site_may_read_answers(url: str) -> None:
    headers = {"origin": "https://evil.example"}
    assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers=headers).headers
    preflight = httpx.options(f"{url}/v1/completions", headers=headers | {"access-control-request-method": "POST"})
    assert error_of(preflight, 405)


def test_without_a_tokenizer_only_token_ids_are_served(byte_tokenizer: Any, run_server: RunServer) -> None:
    with run_server(Parrot(byte_tokenizer), tokenizer=None) as url:
        text = httpx.post(f"{url}/v1/completions", json=COMPLETION)
        assert error_of(text, 400)["param"] == "prompt"
        assert error_of(httpx.post(f"{url}/v1/chat/completions", json=CHAT), 400)["param"] == "messages"
        assert error_of(httpx.post(f"{url}/tokenize", json={"prompt": "a"}), 400)["param"] == "prompt"
        prompt = byte_tokenizer.encode("ab")
        body = COMPLETION | {"prompt": prompt, "logprobs": 1}
        [choice] = httpx.post(f"{url}/v1/completions", json=body).json()["choices"]
        assert choice["text"] == ""
        assert choice["token_ids"] == byte_tokenizer.encode("cdef")
        assert choice["prompt_token_ids"] == prompt
        assert choice["logprobs"]["tokens"][0] == f"token_id:{choice['token_ids'][0]}"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=8,
)
small = st.integers(-3, 30) | st.floats(-3, 3) | st.text(max_size=5) | st.lists(st.text(max_size=3), max_size=3)


def bodies(base: dict[str, Any], fields: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    changes = st.dictionaries(st.sampled_from(fields), small | json_values, max_size=4)
    return changes.map(lambda changed: {**base, **changed})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies(CHAT, sorted(ChatCompletionRequest.model_fields)))
def test_no_chat_body_makes_the_server_fail(http: httpx.Client, body: dict[str, Any]) -> None:
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code in (200, 400, 404), response.text


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies(COMPLETION, sorted(CompletionRequest.model_fields)))
def test_no_completion_body_makes_the_server_fail(http: httpx.Client, body: dict[str, Any]) -> None:
    response = http.post("/v1/completions", json=body)
    assert response.status_code in (200, 400, 404), response.text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(PATHS), raw=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode())
)
def test_no_bytes_make_the_server_fail(http: httpx.Client, path: str, raw: bytes) -> None:
    response = http.post(path, content=raw, headers={"content-type": "application/json"})
    error_of(response, 400)
