"""How long `/health` takes while 64 streams run: whether a step of the engine holds up the server's event loop."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, sleep

import httpx
import numpy as np
from engines import engine, serving
from lines import Line
from prometheus_client.parser import text_string_to_metric_families

STREAMS, PROMPT, OUTPUT = 64, 64, 192
BUDGET_MS = 50
INTERVAL = 0.01


def health() -> Iterator[Line]:
    directory = engine("int8", max_batch_size=STREAMS)
    blocks = STREAMS * ((PROMPT + OUTPUT) // 32 + 1)
    with serving(directory, kv_blocks=blocks) as (url, _), httpx.Client(base_url=url) as client, _load(url) as load:
        while _running(client) < STREAMS:
            if load.poll() is not None:
                raise RuntimeError(f"{STREAMS} streams never ran at once")
            sleep(INTERVAL)
        milliseconds = []
        while len(milliseconds) % 20 or _running(client) == STREAMS:
            start = perf_counter()
            client.get("/health").raise_for_status()
            milliseconds.append((perf_counter() - start) * 1e3)
            sleep(INTERVAL)
    what = f"/health while {STREAMS} streams run: p99 of {len(milliseconds)} requests"
    yield Line(what, "ms", float(np.percentile(milliseconds, 99)), None, BUDGET_MS)


def _load(url: str) -> "subprocess.Popen[bytes]":
    """STREAMS streams, from a process of their own: reading them must not slow what measures."""
    command = [str(Path(sys.executable).with_name("farrier")), "bench", "serve", "--base-url", url]
    command += ["--concurrency", str(STREAMS), "--num-requests", str(STREAMS)]
    command += ["--input-len", str(PROMPT), "--output-len", str(OUTPUT)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _running(client: httpx.Client) -> int:
    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    return next(int(f.samples[0].value) for f in families if f.name == "farrier:num_requests_running")
