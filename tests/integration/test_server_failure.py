"""What is left of a server whose engine has failed: clear answers for a moment, one line, an exit status."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from tests.integration.conftest import metric, wait_until

ROOT = Path(__file__).parents[2]
LONG = {"model": "parrot", "prompt": "abc", "max_tokens": 500, "temperature": 0, "extra_body": {"ignore_eos": True}}
DEADLY = {"model": "parrot", "prompt": "!", "max_tokens": 1}


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, str(ROOT / "tests/integration/parrot_server.py"), str(folder), "--port", "0", *options]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found, process.communicate()
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def folder(byte_tokenizer_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(byte_tokenizer_folder, tmp_path / "engine" / "tokenizer")
    return tmp_path / "engine"


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def running(url: str) -> float:
    return metric(url, "num_requests_running")


def last_line(process: subprocess.Popen[str]) -> str:
    """What the process said after "Serving ... Try:", which is one line."""
    _, last = process.communicate()[1].splitlines()
    return last


def test_requests_are_told_and_the_process_ends(folder: Path) -> None:
    with serving(folder) as (process, url), client_of(url) as client, ThreadPoolExecutor() as pool:
        stream = client.completions.create(**LONG, stream=True)
        next(iter(stream))
        whole = pool.submit(client.completions.create, **LONG)
        wait_until(lambda: running(url) == 2)
        with pytest.raises(openai.InternalServerError) as deadly:
            client.completions.create(**DEADLY)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**LONG)
        with pytest.raises(openai.APIError) as streamed:
            list(stream)
        with pytest.raises(openai.InternalServerError) as waited:
            whole.result()
        for caught in (deadly, waited):
            assert (caught.value.status_code, caught.value.code) == (500, "device_failed")
            assert "The parrot was shot; start it again." in str(caught.value)
        assert streamed.value.code == "device_failed"
        assert (refused.value.status_code, refused.value.code) == (503, "engine_failed")
        assert "The parrot was shot" in str(refused.value)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert process.wait(60) == 1
        assert last_line(process) == "farrier: The parrot was shot; start it again."


@pytest.mark.parametrize("options", [[], ["--hang-in-close"]])
def test_nobody_needs_to_ask_again_and_nothing_holds_it_up(folder: Path, options: list[str]) -> None:
    with serving(folder, *options) as (process, url):
        assert httpx.post(f"{url}/v1/completions", json=DEADLY).status_code == 500
        assert process.wait(60) == 1
        assert last_line(process) == "farrier: The parrot was shot; start it again."


def test_a_failure_while_stopping_shows_in_the_exit_status(folder: Path) -> None:
    with serving(folder) as (process, url), ThreadPoolExecutor() as pool:
        deadly = pool.submit(httpx.post, f"{url}/v1/completions", json=DEADLY)
        wait_until(lambda: running(url) == 1)
        process.terminate()
        assert deadly.result().status_code == 500
        assert process.wait(60) == 1
        assert last_line(process) == "farrier: The parrot was shot; start it again."
