"""Clients that leave, queues that are full, time that is up, engines that load slowly or die."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import openai
import pytest

from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.errors import EngineError
from tests.integration.conftest import RunServer, metric, wait_until
from tests.integration.parrot import Parrot

PROMPT = {"model": "parrot", "prompt": "a", "max_tokens": 20}
CHAT = {"model": "parrot", "messages": [{"role": "user", "content": "x" * 100}]}


@pytest.fixture
def parrot(byte_tokenizer: Tokenizer) -> Parrot:
    return Parrot(byte_tokenizer, max_batch_size=1)


@pytest.fixture
def url(parrot: Parrot, run_server: RunServer) -> Iterator[str]:
    with run_server(parrot, max_queue=2) as address:
        yield address


@contextmanager
def request_under_way(url: str, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A connection on which a request has been sent that the server has begun to work on; leaving closes it."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + b"\r\n" + content)
        yield connection


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as opened:
        yield opened


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def aborted(url: str) -> float:
    return metric(url, "request_success_total", finished_reason="abort")


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_running_request(
    url: str, parrot: Parrot, path: str, body: dict[str, Any], stream: bool
) -> None:
    with parrot.held(after=3):
        with request_under_way(url, path, body | {"stream": stream}) as connection:
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            wait_until(lambda: metric(url, "num_requests_running") == 1)
            assert aborted(url) == 0
        wait_until(lambda: aborted(url) == 1)
    wait_until(lambda: metric(url, "num_requests_running") == 0)
    assert metric(url, "generation_tokens_total") <= 4
    assert metric(url, "kv_cache_usage_perc") == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_queued_request(url: str, parrot: Parrot, stream: bool) -> None:
    with ExitStack() as running:
        with parrot.held():
            running.enter_context(request_under_way(url, "/v1/completions", PROMPT))
            wait_until(lambda: metric(url, "num_requests_running") == 1)
            with request_under_way(url, "/v1/completions", PROMPT | {"stream": stream, "prompt": ["b", "c"]}):
                pass
            wait_until(lambda: aborted(url) == 2)
        wait_until(lambda: metric(url, "request_success_total", finished_reason="length") == 1)
    assert metric(url, "num_requests_running") + metric(url, "num_requests_waiting") == 0
    assert metric(url, "prompt_tokens_total") == 1


def test_a_client_that_leaves_one_of_many_choices_aborts_all(url: str, parrot: Parrot) -> None:
    with parrot.held(after=1):
        with request_under_way(url, "/v1/completions", PROMPT | {"n": 2, "prompt": "b", "stream": True}) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_until(lambda: aborted(url) == 2)
    wait_until(lambda: metric(url, "num_requests_running") + metric(url, "num_requests_waiting") == 0)


def refusal(client: openai.OpenAI, **fields: Any) -> openai.RateLimitError:
    """Asks until the queue is full."""
    refused: list[openai.RateLimitError] = []

    def is_refused() -> bool:
        try:
            client.completions.create(**PROMPT, **fields, timeout=0.2)
        except openai.APITimeoutError:
            return False
        except openai.RateLimitError as error:
            refused.append(error)
        return True

    wait_until(is_refused)
    return refused[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_when_to_come_back(
    url: str, parrot: Parrot, client: openai.OpenAI, pool: ThreadPoolExecutor, stream: bool
) -> None:
    with parrot.held():
        running = pool.submit(client.completions.create, **PROMPT)
        wait_until(lambda: metric(url, "num_requests_running") == 1)
        refused = refusal(client, stream=stream)
        assert refused.code == "overloaded"
        assert refused.type == "rate_limit_error"
        assert int(refused.response.headers["retry-after"]) >= 1
        assert httpx.get(f"{url}/health").status_code == 200
    assert running.result().choices[0].text == "bcdefghijklmnopqrstu"
    wait_until(lambda: metric(url, "num_requests_running") + metric(url, "num_requests_waiting") == 0)
    assert client.completions.create(**PROMPT).choices[0].text == "bcdefghijklmnopqrstu"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_that_takes_too_long_is_given_up(parrot: Parrot, run_server: RunServer, path: str) -> None:
    body = PROMPT if path == "/v1/completions" else CHAT
    with run_server(parrot, request_timeout_s=0.3) as url, parrot.held():
        response = httpx.post(url + path, json=body)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "request_timeout"
        assert response.headers["x-should-retry"] == "false"
        wait_until(lambda: aborted(url) == 1)


def test_a_stream_that_takes_too_long_ends_with_an_error(parrot: Parrot, run_server: RunServer) -> None:
    with run_server(parrot, request_timeout_s=0.5) as url, client_of(url) as client, parrot.held(after=4):
        texts = []
        stream = client.completions.create(**PROMPT, stream=True)
        with pytest.raises(openai.APIError) as caught:
            texts += [chunk.choices[0].text for chunk in stream]
        assert caught.value.code == "request_timeout"
        wait_until(lambda: aborted(url) == 1)


def test_a_body_that_does_not_arrive_is_given_up(parrot: Parrot, run_server: RunServer) -> None:
    with run_server(parrot, request_timeout_s=0.3) as url:
        host, port = url.removeprefix("http://").split(":")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_dying_engine_ends_every_request(
    url: str, parrot: Parrot, client: openai.OpenAI, pool: ThreadPoolExecutor
) -> None:
    with parrot.held(after=2):
        stream = client.completions.create(**PROMPT, stream=True)
        assert next(iter(stream)).choices[0].text == "b"
        whole = pool.submit(client.completions.create, **PROMPT)
        parrot.broken = True
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_failed"
    with pytest.raises(openai.InternalServerError):
        whole.result()
    wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(**PROMPT)
    assert (refused.value.status_code, refused.value.code) == (503, "engine_failed")
    assert metric(url, "request_success_total", finished_reason="error") >= 1


class SlowParrot(Parrot):
    """Loads only when told to."""

    def __init__(self, tokenizer: Tokenizer, *, error: EngineError | None = None) -> None:
        super().__init__(tokenizer)
        self.may_load = threading.Event()
        self._error = error

    def allocate(self, num_blocks: int) -> None:
        self.may_load.wait()
        if self._error is not None:
            raise self._error
        super().allocate(num_blocks)


def test_until_the_engine_is_loaded_everyone_is_told_to_wait(byte_tokenizer: Tokenizer, run_server: RunServer) -> None:
    slow = SlowParrot(byte_tokenizer)
    with run_server(slow, is_loaded=False) as url:
        wait_until(lambda: answers(url))
        for response in (httpx.get(f"{url}/health"), httpx.post(f"{url}/v1/completions", json=PROMPT)):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "loading"
            assert int(response.headers["retry-after"]) >= 1
        assert httpx.get(f"{url}/version").status_code == 200
        slow.may_load.set()
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        assert httpx.post(f"{url}/v1/completions", json=PROMPT).status_code == 200


def test_an_engine_that_cannot_be_loaded_is_never_healthy(byte_tokenizer: Tokenizer, run_server: RunServer) -> None:
    slow = SlowParrot(byte_tokenizer, error=EngineError("There is no parrot."))
    slow.may_load.set()
    with run_server(slow, is_loaded=False) as url:
        wait_until(lambda: answers(url) and httpx.get(f"{url}/health").json()["error"]["code"] == "engine_failed")
        response = httpx.get(f"{url}/health")
        assert response.status_code == 503
        assert "There is no parrot." in response.json()["error"]["message"]


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/version").status_code == 200
    except httpx.ConnectError:
        return False


def test_a_client_that_stops_reading_is_cut_off(byte_tokenizer: Tokenizer, run_server: RunServer) -> None:
    body = {**PROMPT, "n": 16, "max_tokens": 400, "logprobs": 20, "ignore_eos": True, "stream": True}
    with run_server(Parrot(byte_tokenizer), request_timeout_s=2) as url, client_of(url) as client:
        with request_under_way(url, "/v1/completions", body) as connection:
            wait_until(lambda: metric(url, "request_success_total", finished_reason="abort") > 0)
            assert client.completions.create(**PROMPT).choices[0].text == "bcdefghijklmnopqrstu"
            received = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert received.startswith(b"HTTP/1.1 200")
        assert b"[DONE]" not in received
