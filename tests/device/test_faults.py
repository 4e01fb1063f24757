"""What goes wrong on a real GPU: it is said in one sentence, nothing hangs, and nothing is left half-built."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import openai
import pytest

from farrier.agent.commands.choices import demo_model
from farrier.targets.build import BuildOptions, build
from farrier.targets.detect import detect, select_target
from farrier.targets.engine import load_engine
from farrier.targets.engine_dir import CONFIG_FILE, TIMINGS_FILE, damaged_file, read_config
from farrier.targets.errors import FingerprintMismatchError, InsufficientResourcesError
from farrier.targets.known import build_target
from farrier.targets.trial import one_token
from farrier.targets.tune import tune

ROOT = Path(__file__).parents[2]
OPTIONS = BuildOptions(precision="bf16", max_batch_size=8, max_num_tokens=256, max_seq_len=2048)
LONG = {"model": "demo", "prompt": "Hello", "max_tokens": 2000, "temperature": 0, "extra_body": {"ignore_eos": True}}
FARRIER = [sys.executable, "-c", "from farrier.agent.cli import main; main()"]
SECONDS_TO_END = 10
REQUESTS = 24


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's, as if it had been built elsewhere: without a sweep."""
    out = tmp_path_factory.mktemp("faults") / "engine"
    build(demo_model(), out, select_target(detect(), "auto"), replace(OPTIONS, name="demo"), runs_here=False)
    return out


@contextmanager
def serving(engine: Path, *, fault_at_step: int = -1) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server that SIGUSR1 or a number of steps arms, and its URL."""
    command = [sys.executable, str(ROOT / "tests/device/faulty_server.py"), str(engine), "--port", "0"]
    environment = os.environ | {"FAULT_AT_STEP": str(fault_at_step)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found, process.communicate()
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def check_end(process: subprocess.Popen[str]) -> None:
    assert process.wait(SECONDS_TO_END) == 1
    errors = process.communicate()[1]
    assert "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if line.startswith("farrier: ")]
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in line
    assert "start the engine again" in line


def test_an_illegal_access_under_load(engine: Path) -> None:
    """Long before any of them can be done, some running, some waiting."""
    with (
        serving(engine, fault_at_step=300) as (process, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(REQUESTS) as pool,
    ):

        def streamed() -> None:
            list(client.completions.create(**LONG, stream=True))

        requests = [pool.submit(client.completions.create, **LONG) for _ in range(REQUESTS // 2)]
        requests += [pool.submit(streamed) for _ in range(REQUESTS // 2)]
        errors = [request.exception(3 * SECONDS_TO_END) for request in requests]
        assert all(isinstance(error, openai.APIError) for error in errors)
        assert {error.code for error in errors} <= {"device_failed", "engine_failed"}
        assert any("CUDA_ERROR_ILLEGAL_ADDRESS" in str(error) for error in errors)
        check_end(process)


def test_an_illegal_access_that_one_request_meets(engine: Path) -> None:
    with (
        serving(engine) as (process, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert client.completions.create(**LONG | {"max_tokens": 5}).usage.completion_tokens == 5
        process.send_signal(signal.SIGUSR1)
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(**LONG)
        assert (failed.value.status_code, failed.value.code) == (500, "device_failed")
        check_end(process)


def test_a_pool_larger_than_memory_leaves_the_engine_usable(engine: Path) -> None:
    with closing(load_engine(engine)) as loaded:
        most = loaded.memory()
        wanted = 2 * most.max_blocks
        with pytest.raises(InsufficientResourcesError) as caught:
            loaded.allocate(wanted)
        assert f"{wanted * most.bytes_per_block} bytes" in str(caught.value)
        loaded.allocate(8)
        token = int(loaded.step(one_token()).wait().token_ids[0])
        assert 0 <= token < loaded.config.spec.vocab_size
    done = subprocess.run(
        [*FARRIER, "serve", str(engine), "--port", "0", "--kv-blocks", str(wanted)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.fullmatch(r"farrier: \d+ KV blocks of \d+ bytes were asked for, but memory holds \d+; .*\n", done.stderr)


def test_closing_frees_what_was_taken_from_any_thread(engine: Path) -> None:
    from farrier.targets.cuda.device import free_memory, open_device

    open_device()
    load_engine(engine).close()
    before = free_memory()
    loaded = load_engine(engine)
    loaded.allocate(2000)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loaded.close).result()
    assert before - free_memory() < 64 << 20  # what graphs leave in the driver; the pool is four times as large
    loaded.close()


def test_an_engine_larger_than_free_memory_is_refused_before_it_is_loaded(engine: Path) -> None:
    from farrier.targets.cuda.device import DeviceMemory, free_memory, open_device

    open_device()
    taken = DeviceMemory()
    try:
        taken.allocate(free_memory() - (192 << 20))
        free = free_memory()
        with pytest.raises(InsufficientResourcesError, match=r"The engine needs \d+ bytes of GPU memory \(weights \d+"):
            load_engine(engine)
        assert free_memory() == free
        with pytest.raises(InsufficientResourcesError, match=r"\d+ bytes of GPU memory were asked for at once, \d+ of"):
            taken.allocate(1 << 30)
    finally:
        taken.close()
    load_engine(engine).close()


def test_an_engine_of_another_capability(engine: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(engine, tmp_path / "engine")
    document = json.loads((copy / CONFIG_FILE).read_text())
    document["engine"]["fingerprint"]["architecture"] = "sm_80"
    (copy / CONFIG_FILE).write_text(json.dumps(document))
    for command in (["serve", str(copy), "--port", "0"], ["tune", str(copy)]):
        done = subprocess.run([*FARRIER, *command], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.strip().startswith("farrier: The engine does not fit this machine: architecture is sm_80")


def test_machine_code_of_another_capability_under_this_ones_name(tmp_path: Path) -> None:
    here = select_target(detect(), "auto")
    name = "a100" if here.compute_capability != (8, 0) else "orin"
    target, _ = build_target(detect(), name)
    build(demo_model(), tmp_path / "engine", target, OPTIONS, runs_here=False)
    document = json.loads((tmp_path / "engine" / CONFIG_FILE).read_text())
    document["engine"]["fingerprint"]["architecture"] = here.capability
    (tmp_path / "engine" / CONFIG_FILE).write_text(json.dumps(document))
    with pytest.raises(FingerprintMismatchError, match=f"first GPU that CUDA offers is {here.capability}") as caught:
        load_engine(tmp_path / "engine")
    assert caught.value.field == "architecture"


def test_tuning_here_what_was_built_elsewhere(engine: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(engine, tmp_path / "engine")
    done = subprocess.run([*FARRIER, "tune", str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = read_config(copy)
    assert damaged_file(copy, config) is None
    assert TIMINGS_FILE in config.files
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    shown = subprocess.run([*FARRIER, "inspect", str(copy)], capture_output=True, text=True)
    assert (shown.returncode, "unswept" in shown.stdout) == (0, False)
    tune(copy, lambda title: lambda done, total: None)  # once more, in place of itself
    with closing(load_engine(copy)) as loaded:
        loaded.allocate(4)
        assert loaded.step(one_token()).wait().token_ids[0] >= 0
