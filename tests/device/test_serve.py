"""The demo model on the GPU, built and served as a user would, judged by OpenAI's client; and what the process holds.

The tests are those of the CPU's server. One asks for equal answers whatever runs beside a request, which an engine
promises on a GPU only when it is built with --deterministic.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from farrier.targets.engine_dir import read_config
from tests.device.process import ENGINE_FILE, resident
from tests.integration import test_server_demo as demo
from tests.integration.test_server_demo import (  # noqa: F401 (collected here, with the fixtures below)
    client,
    test_a_call_can_be_demanded,
    test_a_schema_is_followed,
    test_a_stream_says_what_the_whole_says,
    test_a_tool_is_called_and_its_result_told,
    test_health_is_answered_while_64_streams_run,
    test_it_says_who_it_is,
)
from tests.serving import FARRIER, MODULE, client_of, imported, mapped, serving

FOREIGN = {"torch", "triton", "openvino"}
LARGEST_RSS = 1_000_000_000


def _built(folder: Path, *options: str) -> Path:
    subprocess.run([*FARRIER, "build", "demo", "-o", str(folder), *options], check=True, capture_output=True)
    assert read_config(folder).fingerprint.backend == "cuda"
    return folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(tmp_path_factory.mktemp("demo") / "engine")


@pytest.fixture(scope="module")
def url(engine: Path) -> Iterator[str]:
    with serving(engine) as (_, address):
        yield address


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(tmp_path: Path) -> None:
    with serving(_built(tmp_path / "engine", "--deterministic")) as (_, address), client_of(address) as opened:
        demo.test_a_seed_gives_the_same_answer_whatever_runs_beside_it(opened, address)


def test_logprobs_are_told(client: openai.OpenAI) -> None:  # noqa: F811
    answer = demo.ask(client, demo.HELLO, logprobs=True, top_logprobs=5, max_tokens=4).choices[0]
    for told in answer.logprobs.content:
        assert len(told.top_logprobs) == 5
        assert told.token == told.top_logprobs[0].token  # greedy
        assert told.logprob == pytest.approx(told.top_logprobs[0].logprob)
        assert told.logprob <= 0


def test_what_cannot_be_honoured_is_refused(client: openai.OpenAI) -> None:  # noqa: F811
    refused: list[tuple[dict[str, Any], str]] = [
        ({"max_tokens": 100_000}, "context_length_exceeded"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"temperature": -1}, "temperature"),
    ]
    for fields, named in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**{"model": "demo", "messages": [demo.HELLO], **fields})
        assert named in (caught.value.code, caught.value.param) or named in str(caught.value)
    assert "farrier" in demo.ask(client, demo.HELLO).choices[0].message.content


def test_a_gpu_engine_is_served_without_torch_and_triton(engine: Path, tmp_path: Path) -> None:
    log = tmp_path / "imports"
    traced = [MODULE[0], "-X", "importtime", *MODULE[1:]]
    with serving(engine, command=traced, log=log) as (process, address), client_of(address) as opened:
        # Everything that may import late: sampling, logprobs, a grammar.
        demo.ask(opened, demo.HELLO, logprobs=True, max_tokens=8)
        opened.chat.completions.create(model="demo", messages=[demo.HELLO], seed=1, max_tokens=8)
        demo.ask(opened, demo.HELLO, response_format={"type": "json_object"}, max_tokens=40)
        libraries = mapped(process.pid)
        memory = resident(process.pid, engine / ENGINE_FILE)
    packages = imported(log)
    assert {"farrier", "cuda", "nvmath"} <= packages
    assert not packages & FOREIGN
    assert not {name for name in libraries if name.startswith(("libtorch", "libtriton", "libopenvino"))}
    assert memory["rss_bytes"] <= LARGEST_RSS
