"""Real `farrier` processes: how to start one, reach it, and look into it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

MODULE = [sys.executable, "-m", "farrier.agent.cli"]
_SCRIPT = Path(sys.executable).with_name("farrier")
FARRIER = [str(_SCRIPT)] if _SCRIPT.exists() else MODULE
"""The installed command, or the module where the sources can only be imported."""


@contextmanager
def serving(
    engine: Path, *options: str, command: list[str] = FARRIER, log: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it is ready. Its standard error goes to `log`, if that is given."""
    arguments = [*command, "serve", str(engine), "--port", "0", "--kv-blocks", "2000", *options]
    errors = log.open("w") if log is not None else subprocess.PIPE
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found, log.read_text()[-2000:] if log else process.communicate()
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()
        if log is not None:
            errors.close()


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def imported(log: Path) -> set[str]:
    """Top-level packages that a process run with `-X importtime` imported."""
    names = re.findall(r"^import time:.*\|\s+(\w[\w.]*)$", log.read_text(), re.MULTILINE)
    return {name.partition(".")[0] for name in names}


def mapped(pid: int) -> set[str]:
    """File names of the libraries a process has mapped."""
    return {Path(line.split()[-1]).name for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if ".so" in line}
