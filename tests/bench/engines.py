"""The engines that are measured, built once and kept in `.farrier/bench`."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model import write_model

CACHE = Path(".farrier/bench")
MAX_SEQ_LEN = 1024
OVERRIDES = {"int4": {"lm_head": "int4"}}
"""Its peer's output layer has four bits, too; by default ours has eight."""


def engine(precision: str, *, max_batch_size: int = 16) -> Path:
    from farrier.targets.build import BuildOptions, build
    from farrier.targets.detect import detect, select_target

    write_model(CACHE / "model")
    options = BuildOptions(
        name=precision,
        precision=precision,
        overrides=OVERRIDES.get(precision, {}),
        max_batch_size=max_batch_size,
        max_num_tokens=512,
        max_seq_len=MAX_SEQ_LEN,
    )
    out = CACHE / (precision if max_batch_size == 16 else f"{precision}-{max_batch_size}")
    build(CACHE / "model", out, select_target(detect(), "cpu"), options)
    return out


@contextmanager
def serving(directory: Path, *, kv_blocks: int) -> Iterator[tuple[str, int]]:
    """A `farrier serve` process: its URL and its process id."""
    command = [str(Path(sys.executable).with_name("farrier")), "serve", str(directory)]
    command += ["--port", "0", "--kv-blocks", str(kv_blocks)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            announcement = process.stdout.readline().split()
            if len(announcement) < 2:
                raise RuntimeError(f"{' '.join(command)} did not start")
            yield announcement[1].rsplit("/v1", 1)[0], process.pid
        finally:
            process.terminate()
