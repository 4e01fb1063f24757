"""Conversions in processes of their own: how much memory they take, on a full disk, killed, two at once."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.convert import convert
from farrier.targets.errors import InsufficientResourcesError
from farrier.targets.safetensors_file import DTYPE_SIZES, SafetensorsWriter
from tests.llama_folder import CONFIG, shapes, write_llama

CONVERT = """
import json, sys
from pathlib import Path
from farrier.targets.convert import convert
source, out, precision = sys.argv[1:]
result = convert(Path(source), Path(out), precision=precision, overrides={})
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"reused": result.reused, "peak": int(peak.split()[1]) * 1024}))
"""


def start(source: Path, out: Path, precision: str = "auto") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", CONVERT, str(source), str(out), precision], stdout=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    result: dict[str, Any] = json.loads(output)
    return result


@pytest.fixture(scope="module")
def large() -> Iterator[Path]:
    """560 MB of bfloat16 in three shards, 131 MB of them in the largest tensor."""
    with TemporaryDirectory() as place:
        yield write_large(Path(place, "llama"))


@pytest.fixture
def place() -> Iterator[Path]:
    """Like tmp_path, but removed at once."""
    with TemporaryDirectory() as place:
        yield Path(place)


def write_large(folder: Path) -> Path:
    write_llama(
        folder,
        dtype="BF16",
        shards=3,
        vocab_size=64_000,
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=5,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    return folder


@pytest.mark.parametrize("precision", ["auto", "f32", "int8", "int4", "fp8"])
def test_memory_stays_within_two_of_the_largest_tensor_and_300_mb(large: Path, place: Path, precision: str) -> None:
    tensors = shapes(json.loads((large / "config.json").read_text()))
    largest = 2 * max(math.prod(shape) for shape in tensors.values())
    assert 2 * sum(map(math.prod, tensors.values())) > 2 * largest + 250e6  # or the test would show nothing
    result = finish(start(large, place / "checkpoint", precision))
    assert result["peak"] <= 2 * largest + 300e6
    assert CheckpointReader(place / "checkpoint").dtype("layers.0.q.weight") == {"auto": "bf16"}.get(
        precision, precision
    )


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_memory_stays_so_where_packed_matrices_are_transposed(place: Path, method: str) -> None:
    total = write_packed(place / "llama", method)
    budget = 2 * 4096 * 14336 // 2 + 300_000_000
    assert total > budget  # or the test would show nothing
    result = finish(start(place / "llama", place / "checkpoint"))
    assert result["peak"] <= budget
    assert CheckpointReader(place / "checkpoint").dtype("layers.0.q.weight") == "int4"


def write_packed(folder: Path, method: str) -> int:
    """A Llama of four layers as AWQ or GPTQ models lie on the hub, of random numbers; returns its bytes, of which the
    largest matrix has 29 MB."""
    changes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32}
    config = {**CONFIG, **changes, "num_key_value_heads": 8}
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes(config).items():
        if "_proj" not in name:
            tensors[name] = ("F16", shape)
            continue
        rows, columns = shape
        packed = (columns, rows // 8) if method == "awq" else (columns // 8, rows)
        base = name.removesuffix("weight")
        tensors[base + "qweight"] = ("I32", packed)
        tensors[base + "qzeros"] = ("I32", (columns // 128, rows // 8))
        tensors[base + "scales"] = ("F16", (columns // 128, rows))
    random = np.random.default_rng(0)
    with SafetensorsWriter(folder / "model.safetensors", tensors) as writer:
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape) * DTYPE_SIZES[dtype]
            # Random bytes are no finite scales; ones will do.
            values = np.ones(shape, np.float16) if dtype == "F16" else random.integers(0, 256, size, np.uint8)
            writer.write(name, 0, values)
    return (folder / "model.safetensors").stat().st_size


def test_two_at_once_take_turns(large: Path, place: Path) -> None:
    processes = [start(large, place / "checkpoint") for _ in range(2)]
    assert sorted(finish(process)["reused"] for process in processes) == [False, True]
    assert os.listdir(place) == ["checkpoint"]


def test_a_killed_conversion_leaves_nothing_that_looks_whole(large: Path, place: Path) -> None:
    out = place / "checkpoint"
    process = start(large, out)
    deadline = time.monotonic() + 120
    while not (place / ".checkpoint.partial" / "rank0.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    assert not convert(large, out).reused
    assert os.listdir(place) == ["checkpoint"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("too_large", ["weights", "tokenizer"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, small_disk: Path, too_large: str) -> None:
    write_llama(tmp_path / "llama", vocab_size=4_000 if too_large == "weights" else 96)
    if too_large == "tokenizer":
        (tmp_path / "llama" / "tokenizer.json").write_bytes(b" " * 2_000_000)
    with pytest.raises(InsufficientResourcesError, match="full"):
        convert(tmp_path / "llama", small_disk / "checkpoint")
    assert os.listdir(small_disk) == []
