"""Each backend works where the other's libraries are not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from farrier.targets.engine_dir import read_config
from tests.small_llama import save_small_llama


def farrier_without(missing: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process in which importing `missing` fails."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); sys.argv[0] = 'farrier'; "
        "from farrier.agent.cli import main; main()"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("apart") / "small")


def test_a_cpu_engine_needs_nothing_of_the_gpu(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    done = farrier_without(["cuda", "nvmath", "triton", "torch"], "build", model, "-o", out, "--target", "cpu")
    assert done.returncode == 0, done.stderr
    assert read_config(out).fingerprint.backend == "openvino"


def test_a_gpu_engine_is_built_without_openvino(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "engine"
    ceilings = ("--max-batch-size", 1, "--max-num-tokens", 64, "--max-seq-len", 128, "--precision", "bf16")
    missing = ["openvino", "torch", "cuda", "nvmath"]
    done = farrier_without(missing, "build", model, "-o", out, "--target", "h100", *ceilings)
    assert done.returncode == 0, done.stderr
    assert read_config(out).fingerprint.architecture == "sm_90"
    refused = farrier_without(missing, "serve", out)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr


def test_a_missing_backend_is_named(model: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.metadata as metadata, sys\n"
        "found = metadata.version\n"
        "def version(name):\n"
        "    if name == 'openvino': raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.version = version\n"
        "sys.argv[0] = 'farrier'\n"
        "from farrier.agent.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "build", str(model), "-o", str(tmp_path / "engine"), "--target", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "farrier[cpu]" in done.stderr
    assert "Traceback" not in done.stderr
