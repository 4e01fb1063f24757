"""What recorded exchanges say."""

import json
from itertools import pairwise
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farrier.runtime.bench.load import encode_request, parse_endpoint
from farrier.runtime.bench.recorder import Endpoint, Recording
from farrier.runtime.bench.replay import Answer, Failure, replay
from farrier.runtime.bench.workload import BenchRequest
from farrier.targets.errors import RequestError

USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}


def chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}], "usage": None, **more}


EVENTS: list[Any] = [chunk("a"), chunk("b"), chunk("c"), chunk(""), {"choices": [], "usage": USAGE}]


def response(events: list[Any], *, done: bool = True, newline: str = "\n") -> bytes:
    """A whole streamed HTTP answer, a chunk an event."""
    payloads = [json.dumps(event) for event in events] + ["[DONE]"] * done
    body = b""
    for payload in payloads:
        data = f": comment{newline}data: {payload}{newline * 2}".encode()
        body += b"%x\r\n%s\r\n" % (len(data), data)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + body + b"0\r\n\r\n"


def at_once(data: bytes) -> Recording:
    return Recording(start=1.0, arrivals=[(2.0, data)])


def test_an_answer_is_read_from_its_events() -> None:
    assert replay(at_once(response(EVENTS))) == Answer(1.0, [2.0, 2.0, 2.0], 2.0, 9, 3, 4)
    assert replay(at_once(response(EVENTS, newline="\r\n"))) == Answer(1.0, [2.0, 2.0, 2.0], 2.0, 9, 3, 4)


@given(st.lists(st.integers(1, len(response(EVENTS)) - 1), unique=True))
def test_an_event_counts_when_its_last_byte_is_there_however_the_stream_is_cut(cuts: list[int]) -> None:
    data = response(EVENTS)
    edges = [0, *sorted(cuts), len(data)]
    recording = Recording(0.0, [(float(end), data[start:end]) for start, end in pairwise(edges)])
    answer = replay(recording)
    assert isinstance(answer, Answer)
    ends = [data.index(f'"text": "{letter}"'.encode()) for letter in "abc"]
    ends = [data.index(b"\n", end) + 1 for end in ends]
    assert answer.output_times == [min(edge for edge in edges if edge >= end) for end in ends]
    assert answer.end >= data.index(b"[DONE]") + 6


def test_times_are_taken_between_outputs() -> None:
    answer = Answer(10.0, [11.0, 11.5, 13.5], 14.0, 9, 6, None)
    assert answer.first_token == 1.0
    assert answer.gaps == [0.5, 2.0]
    assert answer.per_output_token == 0.5
    assert answer.duration == 4.0
    assert Answer(10.0, [11.0], 11.0, 9, 1, None).per_output_token is None


def test_an_empty_answer_is_an_answer() -> None:
    answer = replay(at_once(response([chunk(""), {"choices": [], "usage": USAGE}])))
    assert answer == Answer(1.0, [], 2.0, 9, 3, 4)
    assert (answer.first_token, answer.per_output_token, answer.gaps) == (None, None, [])


@pytest.mark.parametrize(
    ("choice", "carries"),
    [
        ({"text": "x"}, True),
        ({"text": "", "token_ids": [5]}, True),
        ({"text": ""}, False),
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"content": "x"}}, True),
        ({"delta": {"reasoning_content": "x"}}, True),
        ({"delta": {"tool_calls": [{"index": 0}]}}, True),
        ({"delta": {}, "finish_reason": "stop"}, False),
    ],
)
def test_only_output_counts_as_output(choice: dict[str, Any], carries: bool) -> None:
    events = [chunk("x"), {"choices": [choice]}, {"choices": [], "usage": USAGE}]
    answer = replay(at_once(response(events)))
    assert isinstance(answer, Answer)
    assert len(answer.output_times) == (2 if carries else 1)


def test_cached_tokens_are_unknown_where_the_server_does_not_tell() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": None}
    answer = replay(at_once(response([chunk("x", usage=usage)])))
    assert isinstance(answer, Answer)
    assert answer.cached_tokens is None


def refusal(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (refusal("429 Too Many", '{"error": {"message": "Come back."}}'), "HTTP 429", "Come back."),
        (refusal("404 Not Found", '{"error": "no such model"}'), "HTTP 404", "no such model"),
        (refusal("502 Bad", "<html>"), "HTTP 502", "no reason given"),
        (refusal("302 Found", ""), "HTTP 302", "no reason given"),
        (response([chunk("a"), {"error": {"message": "died"}}]), "error event", "died"),
        (response(EVENTS, done=False), "the stream ended without [DONE]", ""),
        (response(EVENTS)[:-200], "no whole HTTP response", "peer closed connection"),
        (b"SSH-2.0-OpenSSH\r\n", "no whole HTTP response", "closed"),
        (b"", "no whole HTTP response", ""),
    ],
)
def test_what_is_no_answer_says_why(data: bytes, reason: str, detail: str) -> None:
    failure = replay(at_once(data))
    assert isinstance(failure, Failure)
    assert failure.reason == reason
    assert detail in failure.detail


def test_an_endpoint_that_ignores_include_usage_is_told_so() -> None:
    failure = replay(at_once(response([chunk("a")])))
    assert isinstance(failure, Failure)
    assert "include_usage" in failure.reason


def test_what_broke_the_exchange_off_is_the_reason() -> None:
    timed_out = "no end within 5 s"
    assert replay(Recording(None, [], "ConnectionRefusedError: nobody")) == Failure("ConnectionRefusedError: nobody")
    assert replay(Recording(1.0, [], timed_out)) == Failure(timed_out)
    assert replay(Recording(1.0, [(2.0, response(EVENTS)[:-60])], timed_out)) == Failure(timed_out)


def received(sent: bytes) -> tuple[h11.Request, dict[str, Any]]:
    server = h11.Connection(h11.SERVER)
    server.receive_data(sent)
    head, body = server.next_event(), server.next_event()
    assert isinstance(head, h11.Request)
    assert isinstance(body, h11.Data)
    assert isinstance(server.next_event(), h11.EndOfMessage)
    return head, json.loads(bytes(body.data))


@pytest.mark.parametrize(
    ("prompt", "path", "field"),
    [
        ("text", b"/v1/completions", "prompt"),
        ({"prompt_token_ids": [1, 2]}, b"/v1/completions", "prompt"),
        ([{"role": "user", "content": "é"}], b"/v1/chat/completions", "messages"),
    ],
)
def test_requests_are_streamed_greedy_and_want_usage(prompt: Any, path: bytes, field: str) -> None:
    endpoint = parse_endpoint("http://127.0.0.1:8000", None)
    head, body = received(encode_request(endpoint, BenchRequest(prompt, 5), "m", ignore_eos=False))
    assert (head.method, head.target) == (b"POST", path)
    assert dict(head.headers)[b"connection"] == b"close"
    assert body.pop(field) == (prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt)
    assert body == {
        "model": "m",
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_key_and_ignore_eos_are_sent_when_asked_for() -> None:
    endpoint = parse_endpoint("http://[::1]:80/deep/v1/", "secret")
    head, body = received(encode_request(endpoint, BenchRequest("x", 5), "m", ignore_eos=True))
    assert head.target == b"/deep/v1/completions"
    assert dict(head.headers)[b"authorization"] == b"Bearer secret"
    assert dict(head.headers)[b"host"] == b"[::1]:80"
    assert body["ignore_eos"] is True


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://localhost:8000", Endpoint("localhost", 8000, False, "", None)),
        ("http://localhost:8000/v1/", Endpoint("localhost", 8000, False, "", None)),
        ("http://example.org", Endpoint("example.org", 80, False, "", None)),
        ("https://example.org/api/v1", Endpoint("example.org", 443, True, "/api", None)),
    ],
)
def test_base_urls_are_taken_with_and_without_v1(url: str, endpoint: Endpoint) -> None:
    assert parse_endpoint(url, None) == endpoint


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://x:99999", "http://[::1"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(RequestError, match="--base-url"):
        parse_endpoint(url, None)
