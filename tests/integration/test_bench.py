"""The benchmarks as a user runs them: a real engine, real servers, the real command."""

import asyncio
import json
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from farrier.runtime.bench.load import ClosedLoop, OpenLoop, ServeResult, encode_request, parse_endpoint, run_load
from farrier.runtime.bench.workload import BenchRequest
from farrier.targets.build import BuildOptions, build
from farrier.targets.detect import detect, select_target
from farrier.targets.engine import load_engine
from tests.integration.conftest import RunServer, metric
from tests.integration.parrot import VOCAB_SIZE, Parrot
from tests.serving import FARRIER
from tests.small_llama import save_small_llama


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*FARRIER, "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def measured(folder: Path, *arguments: object) -> dict[str, Any]:
    """What a benchmark that succeeds writes as JSON, after a look at its chart."""
    files = folder / "result.json", folder / "chart.svg"
    done = bench(*arguments, "--json", files[0], "--plot", files[1])
    assert done.returncode == 0, done.stderr
    assert "power mode" in done.stdout
    assert ElementTree.parse(files[1]).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    document: dict[str, Any] = json.loads(files[0].read_text())
    assert document["conditions"]["target"]
    return document


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save_small_llama(folder / "small", vocab_size=VOCAB_SIZE)
    options = BuildOptions(max_batch_size=4, max_num_tokens=64)
    build(folder / "small", folder / "engine", select_target(detect(), "cpu"), options)
    return folder / "engine"


def test_latency_of_each_batch_size(engine: Path, tmp_path: Path) -> None:
    document = measured(tmp_path, "latency", engine, "--input-len", 40, "--output-len", 12, "--repeats", 2)
    batches = document["results"]["batches"]
    assert [batch["batch_size"] for batch in batches] == [1, 2, 4]
    for batch in batches:
        assert batch["first_token"]["count"] == 2
        # A batch of 4 × 40 tokens is prefilled in 3 steps, in the last of which the first sequences decode already.
        assert 2 * 8 <= batch["between_tokens"]["count"] <= 2 * 11
        mean_rate = batch["batch_size"] / batch["between_tokens"]["mean"]
        assert batch["tokens_per_second"] == pytest.approx(mean_rate)
        assert batch["bytes_per_second"] > 0
    assert document["results"]["cache"] == {"enabled": True, "prompt_tokens": 2 * 7 * 40, "cached_tokens": 0}
    assert "cold" in document["conditions"]["cache"]


def test_throughput_of_random_requests(engine: Path, tmp_path: Path) -> None:
    arguments = ["--num-requests", 10, "--input-len", "5:30", "--output-len", "normal:8:2", "--no-prefix-caching"]
    results = measured(tmp_path, "throughput", engine, *arguments)["results"]
    assert results["requests"] == 10
    assert 50 <= results["prompt_tokens"] <= 300
    assert results["tokens_per_second"]["output"] == pytest.approx(results["output_tokens"] / results["seconds"])
    assert results["cache"]["enabled"] is False
    assert 1 <= results["mean_sequences"] <= 4


def test_throughput_of_a_data_set_finds_what_its_prompts_share(engine: Path, tmp_path: Path) -> None:
    record = json.dumps({"prompt_token_ids": list(range(3, 103)), "max_tokens": 3})
    dataset = tmp_path / "set.jsonl"
    dataset.write_text(f"{record}\n" * 6)
    document = measured(tmp_path, "throughput", engine, "--dataset", dataset)
    assert document["results"]["output_tokens"] == 18
    assert document["results"]["cache"]["cached_tokens"] > 0
    assert "partly warm" in document["conditions"]["cache"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["latency", "ENGINE", "--batch-sizes", "1,8"], "--max-batch-size"),
        (["latency", "ENGINE", "--batch-sizes", "1,x"], "--batch-sizes are counts"),
        (["latency", "ENGINE", "--input-len", "600"], "max_seq_len"),
        (["latency", "ENGINE", "--input-len", "40", "--kv-blocks", "8", "--batch-sizes", "4"], "never ran as a whole"),
        (["latency", "ENGINE", "--plot", "chart.png"], "ends in .svg"),
        (["latency", "nowhere"], "There is no engine"),
        (["throughput", "ENGINE", "--input-len", "many"], "--input-len is a count"),
        (["throughput", "ENGINE", "--input-len", "600"], "at most"),
        (["throughput", "ENGINE", "--dataset", "nowhere.jsonl"], "cannot be read"),
        (["throughput", "ENGINE", "--dataset", "x", "--num-requests", "5"], "--num-requests is for random requests"),
        (["serve", "--request-rate", "1", "--concurrency", "1"], "give one of them"),
        (["serve", "--request-rate", "0"], "above 0"),
        (["serve", "--request-rate", "nan"], "above 0"),
        (["serve", "--base-url", "127.0.0.1:1"], "--base-url is like"),
        (["serve", "--base-url", "http://127.0.0.1:1"], "names no model"),
        (["serve", "--base-url", "http://127.0.0.1:1", "--model", "m"], "ConnectionRefusedError"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(engine: Path, arguments: list[str], sentence: str) -> None:
    done = bench(*(str(engine) if argument == "ENGINE" else argument for argument in arguments))
    assert done.returncode == 1
    assert done.stdout == ""
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_text_needs_a_tokenizer(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"prompt": "hello"}\n')
    assert "tokenizer" in bench("throughput", engine, "--dataset", tmp_path / "set.jsonl").stderr


@pytest.fixture(scope="module")
def real_url(engine: Path, run_server: RunServer) -> Iterator[str]:
    """A server of the random model, which takes any token ids."""
    with run_server(load_engine(engine)) as address:
        yield address


@pytest.mark.parametrize("prompts", ["tokens", "text", "chat"])
@pytest.mark.parametrize("load", [["--concurrency", "3"], ["--request-rate", "200"], ["--request-rate", "inf"]])
def test_a_served_engine_under_load(real_url: str, tmp_path: Path, prompts: str, load: list[str]) -> None:
    before = metric(real_url, "generation_tokens_total")
    arguments = ["--num-requests", 12, "--input-len", "4:9", "--output-len", 6, "--vocab-size", VOCAB_SIZE]
    document = measured(tmp_path, "serve", "--base-url", real_url, "--prompts", prompts, *load, *arguments)
    results = document["results"]
    warm_up = metric(real_url, "generation_tokens_total") - before - results["output_tokens"]
    assert (results["requests"], results["failures"], results["output_tokens"]) == (12, {}, 72)
    assert warm_up == 8
    assert results["end_to_end"]["count"] == 12
    assert 1 <= results["first_token"]["count"] <= 12  # an answer of control tokens has no text
    assert results["output_tokens_per_second"] == pytest.approx(72 / results["seconds"])
    assert results["cached_tokens"] is not None
    assert document["conditions"]["precision"] == "f32; KV cache f32"
    if prompts == "tokens":
        assert 12 * 4 <= results["prompt_tokens"] <= 12 * 9


def test_a_data_set_under_load_goes_to_the_endpoints_it_is_for(url: str, tmp_path: Path) -> None:
    records = [
        {"prompt": "abc", "max_tokens": 4},
        {"prompt_token_ids": [70, 71], "max_tokens": 5},
        {"messages": [{"role": "user", "content": "Hello you"}], "max_tokens": 6},
    ]
    dataset = tmp_path / "set.jsonl"
    dataset.write_text("\n".join(map(json.dumps, records)))
    results = measured(tmp_path, "serve", "--base-url", f"{url}/v1", "--dataset", dataset)["results"]
    assert results["output_tokens"] == 15


def test_the_end_of_sequence_ends_an_answer_unless_it_is_ignored(url: str, tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"prompt": "xy", "max_tokens": 9}\n')
    arguments = ["serve", "--base-url", url, "--dataset", tmp_path / "set.jsonl"]
    # The warm-up may end early too.
    assert measured(tmp_path, *arguments, "--no-ignore-eos")["results"]["output_tokens"] == 2


def test_refusals_are_counted_and_the_rest_is_measured(run_server: RunServer, byte_tokenizer: Any) -> None:
    parrot = Parrot(byte_tokenizer, max_batch_size=2)
    with run_server(parrot, max_queue=2) as url, ExitStack() as held:
        held.enter_context(parrot.held())  # until the first request is over, which can only be one that was refused
        result = asyncio.run(load_on(url, OpenLoop(float("inf")), 30, model="parrot", on_done=held.close))
    assert set(result.failures_by_reason) == {"HTTP 429"}
    assert len(result.answers) + len(result.failures) == 30
    assert result.answers
    assert result.output_tokens == 5 * len(result.answers)


def test_an_endpoint_that_refuses_everything_is_an_error(url: str) -> None:
    done = bench("serve", "--base-url", url, "--model", "other", "--num-requests", 2, "--prompts", "text")
    assert done.returncode == 1
    assert "HTTP 404: The model 'other'" in " ".join(done.stderr.split())


def test_the_key_is_sent(run_server: RunServer, byte_tokenizer: Any, tmp_path: Path) -> None:
    with run_server(Parrot(byte_tokenizer), api_keys=("secret",)) as url:
        arguments = ["serve", "--base-url", url, "--num-requests", 2, "--prompts", "text"]
        assert "401" in bench(*arguments).stderr
        assert measured(tmp_path, *arguments, "--api-key", "secret")["results"]["requests"] == 2


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]

ANSWER = (
    b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    b'data: {"choices": [{"text": "x"}], "usage": {"prompt_tokens": 4, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
)


@asynccontextmanager
async def listening(handle: Handler) -> AsyncIterator[str]:
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def load_on(
    server: str | Handler,
    load: ClosedLoop | OpenLoop,
    count: int,
    *,
    model: str = "m",
    timeout_s: float = 60,
    on_done: Callable[[], None] = lambda: None,
) -> ServeResult:
    """server: its URL, or what it does with a connection."""
    if not isinstance(server, str):
        async with listening(server) as url:
            return await load_on(url, load, count, model=model, timeout_s=timeout_s)
    endpoint = parse_endpoint(server, None)
    request = encode_request(endpoint, BenchRequest("abc", 5), model, ignore_eos=True)
    rng = np.random.default_rng(0)
    return await run_load(endpoint, [request] * count, load, rng=rng, timeout_s=timeout_s, on_done=on_done)


class Crowd:
    """Answers nobody before `size` clients wait at once, or none is left to come; notes the largest crowd."""

    def __init__(self, size: int, total: int) -> None:
        self.size, self.left, self.waiting, self.largest = size, total, 0, 0
        self.changed = asyncio.Condition()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        async with self.changed:
            self.waiting += 1
            self.left -= 1
            self.largest = max(self.largest, self.waiting)
            self.changed.notify_all()
            await self.changed.wait_for(lambda: self.largest >= self.size or not self.left)
            self.waiting -= 1
        writer.write(ANSWER)
        writer.close()


def test_a_closed_loop_keeps_so_many_requests_under_way_and_no_more() -> None:
    async def run() -> tuple[ServeResult, Crowd]:
        crowd = Crowd(4, 20)
        return await load_on(crowd, ClosedLoop(4), 20), crowd

    result, crowd = asyncio.run(run())
    assert len(result.answers) == 20
    assert crowd.largest == 4


def test_an_infinite_rate_waits_for_nobody() -> None:
    async def run() -> tuple[ServeResult, Crowd]:
        crowd = Crowd(20, 20)
        return await load_on(crowd, OpenLoop(float("inf")), 20), crowd

    result, crowd = asyncio.run(run())
    assert len(result.answers) == 20
    assert crowd.largest == 20


def test_a_finite_rate_waits_for_nobody_either() -> None:
    async def run() -> tuple[ServeResult, Crowd]:
        crowd = Crowd(10, 10)
        return await load_on(crowd, OpenLoop(500.0), 10), crowd

    result, crowd = asyncio.run(run())
    assert len(result.answers) == 10
    assert crowd.largest == 10


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()


async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(ANSWER[:-20])
    writer.close()


@pytest.mark.parametrize(
    ("handle", "reason"),
    [
        (say_nothing, "no end within 0.2 s"),
        (hang_up, "ConnectionResetError: Connection reset by peer"),
        (break_off, "the stream ended without [DONE]"),
    ],
)
def test_what_servers_do_ends_a_request_and_nothing_else(handle: Handler, reason: str) -> None:
    result = asyncio.run(load_on(handle, ClosedLoop(2), 4, timeout_s=0.2 if handle is say_nothing else 60))
    assert result.failures_by_reason == {reason: 4}
    assert (result.answers, result.seconds, result.first_token) == ([], 0.0, None)
