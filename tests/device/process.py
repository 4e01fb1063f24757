"""A real `farrier serve` process: seconds from its start to the first streamed token, and its memory.

python tests/device/process.py ENGINE [--json FILE]

cold: the engine's files are dropped from the page cache before; warm: right after that. Resident memory leaves out the
map of the engine file, if there is one, and says the driver's own mappings apart.
"""

import argparse
import ctypes
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from farrier.targets.engine_dir import read_config
from tests.serving import MODULE

ENGINE_FILE = "rank0.engine"
_TIMEOUT = 120.0


def measure(engine: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for state in ("cold", "warm"):
        if state == "cold":
            results["cached_share_when_cold"] = _drop(engine / ENGINE_FILE)
        with tempfile.TemporaryFile("w+") as log:
            begun = time.perf_counter()
            process = subprocess.Popen(
                [*MODULE, "serve", str(engine), "--port", "0"], stdout=subprocess.PIPE, stderr=log, text=True
            )
            try:
                results[f"start_{state}_s"] = _first_token(process, read_config(engine).model) - begun
                results |= resident(process.pid, engine / ENGINE_FILE)
            except RuntimeError as error:
                log.seek(0)
                raise RuntimeError(f"{error}: {log.read()[-2000:]}") from error
            finally:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                process.communicate()
    return results


def _first_token(process: "subprocess.Popen[str]", model: str) -> float:
    """When the first token of a streamed answer came, in seconds of `time.perf_counter`."""
    assert process.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
    if found is None:
        raise RuntimeError("farrier serve did not start")
    body = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 4, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{found[0]}/v1/completions", json=body, timeout=_TIMEOUT) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                at = time.perf_counter()
                if "choices" not in json.loads(line.removeprefix("data: ")):
                    raise RuntimeError(line)
                return at
    raise RuntimeError("no token came")


def resident(pid: int, weights: Path) -> dict[str, int]:
    """Bytes of memory the process holds; see the module's docstring."""
    rss = anonymous = driver = 0
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            fields = line.split(maxsplit=5)
            name = fields[5] if len(fields) > 5 else ""
        elif line.startswith("Rss:") and not name.endswith(weights.name):
            size = 1024 * int(line.split()[1])
            rss += size
            driver += size if name.startswith("/dev/nvidia") else 0
        elif line.startswith("Anonymous:") and not name.endswith(weights.name):
            anonymous += 1024 * int(line.split()[1])
    return {"rss_bytes": rss, "rss_anonymous_bytes": anonymous, "rss_driver_bytes": driver}


def _drop(path: Path) -> float:
    """Drops `path` from the page cache; returns the share of it that is still there."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE) as map_:
            pages = -(-len(map_) // mmap.PAGESIZE)
            present = (ctypes.c_ubyte * pages)()
            view = ctypes.c_char.from_buffer(map_)
            libc = ctypes.CDLL(None, use_errno=True)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(map_)), present)
            del view
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
            return sum(1 for page in bytes(present) if page & 1) / pages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = measure(given.engine)
    for name, value in results.items():
        print(f"{name}: {value:,.2f}" if isinstance(value, float) else f"{name}: {value:,}")
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
