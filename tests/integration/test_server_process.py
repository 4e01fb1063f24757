"""`farrier serve` as a process: a real engine, real signals."""

import json
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from farrier.targets.build import BuildOptions, build
from farrier.targets.detect import detect, select_target
from tests.integration.conftest import wait_until
from tests.serving import FARRIER, client_of, serving
from tests.small_llama import save_small_llama

LONG = {"model": "small", "prompt": "abc", "max_tokens": 4000, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_folder: Path) -> Path:
    """Of a random model: what it says means nothing, but it says a lot of it."""
    folder = tmp_path_factory.mktemp("process")
    save_small_llama(folder / "small", max_position_embeddings=4096, eos_token_id=0)
    shutil.copytree(byte_tokenizer_folder, folder / "small", dirs_exist_ok=True)
    options = BuildOptions(max_seq_len=4096)
    build(folder / "small", folder / "engine", select_target(detect(), "cpu"), options)
    return folder / "engine"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_told_to_stop(engine: Path, stop: signal.Signals) -> None:
    with serving(engine) as (process, url), client_of(url) as client:
        assert httpx.get(f"{url}/health").status_code == 200
        answer = client.completions.create(**{**LONG, "max_tokens": 20})
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 20
        process.send_signal(stop)
        assert process.wait(60) == 0
        assert process.communicate()[1].count("\n") <= 1  # nothing but what it said at the start


def test_the_printed_command_works(engine: Path) -> None:
    process = subprocess.Popen(
        [*FARRIER, "serve", str(engine), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        command = process.stdout.readline().strip()
        answer = json.loads(subprocess.run(command, shell=True, capture_output=True, check=True).stdout)  # noqa: S602
        assert answer["choices"][0]["message"]["role"] == "assistant"
    finally:
        process.kill()
        process.communicate()


def test_a_stopping_server_finishes_what_it_began_and_takes_no_more(engine: Path) -> None:
    with serving(engine) as (process, url), client_of(url) as client:
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**LONG)
        assert (refused.value.status_code, refused.value.code) == (503, "draining")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert "farrier:num_requests_running" in httpx.get(f"{url}/metrics").text
        assert process.poll() is None
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
        assert process.wait(60) == 0


def test_what_does_not_finish_in_time_is_told(engine: Path) -> None:
    with serving(engine, "--drain-seconds", "0") as (process, url), client_of(url) as client:
        stream = client.completions.create(**LONG, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert caught.value.code == "aborted"
        assert process.wait(60) == 0


def test_a_second_signal_ends_it_at_once(engine: Path) -> None:
    with serving(engine) as (process, url), client_of(url) as client:
        next(iter(client.completions.create(**LONG, stream=True)))
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT


def failure(*arguments: str) -> str:
    process = subprocess.run([*FARRIER, "serve", *arguments], capture_output=True, text=True)
    assert process.returncode != 0
    assert "Traceback" not in process.stderr
    return process.stderr


def test_a_port_in_use_is_said(engine: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in failure(str(engine), "--port", str(port))


def test_what_is_no_engine_is_said(tmp_path: Path) -> None:
    assert str(tmp_path) in failure(str(tmp_path), "--port", "0").replace("\n", "")


def test_a_client_that_leaves_frees_the_engine(engine: Path) -> None:
    body: dict[str, Any] = {"model": "small", "prompt": "abc", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with serving(engine) as (_, url), httpx.Client(base_url=url) as http:
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        wait_until(lambda: 'farrier:num_requests_running{model_name="small"} 0.0' in http.get("/metrics").text)
        assert 'finished_reason="abort",model_name="small"} 1.0' in http.get("/metrics").text
