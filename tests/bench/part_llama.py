"""Beside llama.cpp, on the same shapes."""

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from engines import CACHE, engine
from lines import Line, in_turns
from part_decode import KV_BLOCKS, STEPS, llm_decode

from farrier.runtime.bench.offline import OfflineBench
from farrier.targets.detect import detect, select_target

PEERS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
GOALS = {1: 0.8, 4: None, 8: 1.3, 16: 1.3}
PREFILL, PREFILL_GOAL = 512, 1.3
VENV = Path(".venv-llama")


def llama() -> Iterator[Line]:
    python = llama_python()
    for precision, kind in PEERS.items():
        with OfflineBench(engine(precision), kv_blocks=KV_BLOCKS) as bench, _peer(python, kind) as ask:
            for batch_size, goal in GOALS.items():
                ours, theirs = in_turns(llm_decode(bench, batch_size), _asking(ask, decode=batch_size, steps=STEPS))
                what = f"decode {precision}, batch {batch_size}: LLM / llama.cpp {kind}"
                yield Line(what, "tok/s", batch_size / ours, batch_size / theirs, goal)
            ours, theirs = in_turns(_prefill(bench), _asking(ask, prefill=PREFILL, runs=1))
            what = f"prefill {precision}, {PREFILL} tokens: LLM / llama.cpp {kind}"
            yield Line(what, "tok/s", PREFILL / ours, PREFILL / theirs, PREFILL_GOAL)


def _prefill(bench: OfflineBench) -> Callable[[], list[float]]:
    rng = np.random.default_rng(0)

    def measure() -> list[float]:
        return [bench.run(bench.random_prompts(rng, 1, PREFILL), 1).seconds]

    measure()
    return measure


Ask = Callable[..., Any]


def _asking(ask: Ask, **command: int) -> Callable[[], list[float]]:
    ask(**command)
    return lambda: ask(**command)


@contextmanager
def _peer(python: Path, kind: str) -> Iterator[Ask]:
    """A llama.cpp process that answers commands; see llama_peer.py."""
    threads = select_target(detect(), "cpu").cpu.cores
    script = Path(__file__).with_name("llama_peer.py")
    command = [str(python), str(script), str(CACHE / f"{kind}.gguf"), kind, str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def read() -> Any:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"{' '.join(command)} ended")
            return json.loads(line)

        def ask(**given: int) -> Any:
            process.stdin.write(json.dumps(given) + "\n")
            process.stdin.flush()
            return read()

        read()
        try:
            yield ask
        finally:
            process.stdin.close()


def llama_python() -> Path:
    """A Python that has llama-cpp-python, built for this very machine: FARRIER_LLAMA_PYTHON, or one made here."""
    if given := os.environ.get("FARRIER_LLAMA_PYTHON"):
        return Path(given)
    python = VENV / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import llama_cpp, gguf"], check=False).returncode != 0:
        print("Compiling llama.cpp for this machine; it takes some minutes, once.", file=sys.stderr)
        venv.create(VENV, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--no-binary", "llama-cpp-python"]
        # gcc 12 takes what llama.cpp writes into its AMX tile configuration for dead stores: q8_0 and q4_0 crash.
        environment = os.environ | {"CMAKE_ARGS": '-DCMAKE_CXX_FLAGS="-fno-tree-dse -fno-dse"'}
        subprocess.run([*install, "llama-cpp-python==0.3.36", "gguf==0.19.0"], check=True, env=environment)
    return python
