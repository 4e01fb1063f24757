"""Engines for GPUs, built on a machine without one, and tuned with made-up timings."""

import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from farrier.agent.commands.choices import demo_model
from farrier.targets.build import BuildOptions, Built, build
from farrier.targets.cuda.backend import ENGINE_FILE, CudaBackend
from farrier.targets.cuda.emitter import Settings
from farrier.targets.cuda.engine_file import open_engine_file, plan_of, weights_of
from farrier.targets.cuda.lower import lower
from farrier.targets.cuda.plan import KERNEL_PREFIX, Multiply, Plan
from farrier.targets.cuda.products import Tactics
from farrier.targets.cuda.timings import Timings, read_timings, spelled
from farrier.targets.cuda.tune import rewrite
from farrier.targets.detect import detect
from farrier.targets.engine import EngineConfig, load_engine
from farrier.targets.engine_dir import TIMINGS_FILE, damaged_file, read_config, seal
from farrier.targets.errors import BuildError, EngineError, FingerprintMismatchError
from farrier.targets.known import build_target
from farrier.targets.tensorfile import Tensor
from farrier.targets.tune import tune
from tests.small_llama import save_small_llama

FARRIER = Path(sys.executable).with_name("farrier")
SMALL = {"max_batch_size": 2, "max_num_tokens": 64, "max_seq_len": 64}
CUBIN = b"\x7fELF"
EM_CUDA = 190


def build_for(target: str, source: Path, out: Path, **options: object) -> Built:
    chosen, runs_here = build_target(detect(), target)
    return build(source, out, chosen, BuildOptions(**SMALL | options), runs_here=runs_here)


def silent(title: str) -> object:
    return lambda done, total: None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("small") / "llama")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's for an H100, with int4 weights, which lie in an engine otherwise than in a checkpoint."""
    out = tmp_path_factory.mktemp("h100") / "engine"
    build_for("h100", demo_model(), out, precision="int4", overrides={"lm_head": "bf16"})
    return out


def farrier(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(FARRIER), *arguments], capture_output=True, text=True)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    message = done.stderr.strip()
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("target", "capability"), [("h100", 90), ("a100", 80), ("orin", 87)])
def test_the_demo_model_for_a_gpu_that_is_not_here(target: str, capability: int, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in SMALL.items()]
    built = farrier("build", "demo", "-o", str(out), "--target", target, "--precision", "bf16", *sizes)
    assert built.returncode == 0, built.stderr
    assert f"farrier tune {out}" in built.stderr
    config = read_config(out)
    assert damaged_file(out, config) is None
    assert config.fingerprint.architecture == f"sm_{capability}"
    with closing(open_engine_file(out / ENGINE_FILE)) as file:
        plan = plan_of(file.tensors)
        assert (plan.capability, plan.swept) == (capability, False)
        kernels = {name: file.tensors[KERNEL_PREFIX + name].array.tobytes() for name in plan.kernels}
    for cubin in kernels.values():
        assert cubin.startswith(CUBIN)
        assert int.from_bytes(cubin[18:20], "little") == EM_CUDA
        assert _flags(cubin) == capability
    inspected = farrier("inspect", str(out))
    text = " ".join(inspected.stdout.split())
    assert inspected.returncode == 1
    assert "Traceback" not in inspected.stderr
    assert f"{len(kernels)} for compute capability {capability // 10}.{capability % 10}, unswept" in text
    assert f"architecture is sm_{capability} in the engine" in text


def _flags(cubin: bytes) -> int:
    """The compute capability a cubin is for: in the low byte of the ELF header's flags."""
    return int.from_bytes(cubin[48:52], "little") & 0xFF


@pytest.mark.parametrize("target", ["a100", "orin"])
def test_fp8_where_there_is_none(target: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no fp8 arithmetic; build with --precision int8 or int4"):
        build_for(target, model, tmp_path / "engine", precision="fp8")
    with pytest.raises(BuildError, match="no fp8; build with --kv-dtype bf16"):
        build_for(target, model, tmp_path / "engine", precision="bf16", kv_dtype="fp8")
    assert list(tmp_path.iterdir()) == []


def test_what_needs_a_gpu_says_so_in_one_line(engine: Path) -> None:
    for command in ("serve", "tune"):
        assert "architecture is sm_90 in the engine" in one_line(farrier(command, str(engine)))
    with pytest.raises(FingerprintMismatchError) as caught:
        load_engine(engine)
    assert caught.value.field == "architecture"
    assert "unswept: run `farrier tune`" in " ".join(farrier("inspect", str(engine)).stdout.split())


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["cuda"], "Engines for a GPU need farrier[cuda]"),
        (["nvmath"], "Engines for a GPU need farrier[cuda]"),
        ([], ""),
    ],
)
def test_loading_without_libraries_or_a_gpu(missing: list[str], said: str, engine: Path) -> None:
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "from pathlib import Path\n"
        "from farrier.targets.cuda.backend import CudaBackend\n"
        "from farrier.targets.engine_dir import read_config\n"
        "from farrier.targets.errors import FarrierError\n"
        "place = Path(sys.argv[1])\n"
        "try:\n"
        "    CudaBackend().load(place, read_config(place))\n"
        "except FarrierError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(engine)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_an_engine_file_without_a_plan_is_named(engine: Path, tmp_path: Path) -> None:
    config = read_config(engine)
    weights = {"embed.weight": np.zeros((2, 2), np.float32)}
    save_file(weights, tmp_path / ENGINE_FILE)
    sealed = seal(tmp_path, config)
    for act in (lambda: CudaBackend().details(tmp_path), lambda: rewrite(tmp_path, tmp_path, sealed, "", {}, silent)):
        with pytest.raises(EngineError, match="no launch plan that this farrier can follow; build it again"):
            act()


def test_what_is_not_tuned(model: Path, tmp_path: Path) -> None:
    build_for("cpu", model, tmp_path / "cpu")
    with pytest.raises(BuildError, match="Only engines for NVIDIA GPUs"):
        tune(tmp_path / "cpu", silent)
    built = build_for("h100", model, tmp_path / "same", precision="bf16", deterministic=True)
    assert built.config.deterministic
    with pytest.raises(BuildError, match="deterministic"):
        tune(tmp_path / "same", silent)
    assert "deterministic" in " ".join(farrier("inspect", str(tmp_path / "same")).stdout.split())
    assert {path.name for path in tmp_path.iterdir()} == {"cpu", "same"}


def made_up_timings(config: EngineConfig, plan: Plan, weights: Mapping[str, Tensor]) -> Timings:
    """cuBLASLt is fastest wherever it can do a product, elsewhere what no rule would choose."""
    settings = Settings(
        plan.capability, plan.activation, plan.kv_type, config.block_size, config.ceilings, deterministic=False
    )
    tactics = Tactics(plan.capability, plan.activation, deterministic=False)
    timings = {}
    for key, (product, rows, decode) in lower(config.spec, weights, settings, tactics).products.items():
        names = [spelled(choice) for choice in tactics.candidates(product, rows, decode=decode)]
        best = "library" if "library" in names else names[-1]
        timings[key] = {name: 1e-6 if name == best else 2e-6 for name in names}
    return timings


def decode_rows_in_library(plan: Plan) -> set[tuple[str, int]]:
    """Weights that cuBLASLt multiplies in decode programs, with the programs' rows."""
    decode = [program for program in plan.programs if program.kind == "decode"]
    return {(step.weight, p.rows) for p in decode for step in p.steps if isinstance(step, Multiply)}


def test_rewriting_with_other_kernels(engine: Path, tmp_path: Path) -> None:
    config = read_config(engine)
    with closing(open_engine_file(engine / ENGINE_FILE)) as file:
        before = plan_of(file.tensors)
        timings = made_up_timings(config, before, weights_of(file.tensors))
        (tmp_path / "tuned").mkdir()
        rewrite(engine, tmp_path / "tuned", config, "NVIDIA H100", timings, silent)
        sealed = seal(tmp_path / "tuned", config)
        with closing(open_engine_file(tmp_path / "tuned" / ENGINE_FILE)) as rewritten:
            after = plan_of(rewritten.tensors)
            old, new = weights_of(file.tensors), weights_of(rewritten.tensors)
            assert old.keys() == new.keys()
            for name, tensor in old.items():
                assert (tensor.dtype, tensor.shape) == (new[name].dtype, new[name].shape)
                np.testing.assert_array_equal(tensor.array, new[name].array)
            for name in after.kernels:
                assert rewritten.tensors[KERNEL_PREFIX + name].array[:4].tobytes() == CUBIN
            assert {n for n in rewritten.tensors if n.startswith(KERNEL_PREFIX)} == {
                KERNEL_PREFIX + name for name in after.kernels
            }
    assert (before.swept, after.swept) == (False, True)
    assert (after.capability, after.activation, after.kv_type) == (before.capability, before.activation, before.kv_type)
    assert [(p.kind, p.rows, p.context) for p in after.programs] == [
        (p.kind, p.rows, p.context) for p in before.programs
    ]
    assert set(after.kernels) != set(before.kernels)
    decode = {program.rows for program in after.programs if program.kind == "decode"}
    assert decode_rows_in_library(before) == set()
    assert decode_rows_in_library(after) == {("embed.weight", rows) for rows in decode}  # no int4 there
    assert read_timings(tmp_path / "tuned" / TIMINGS_FILE, "NVIDIA H100") == timings
    assert set(sealed.files) == {ENGINE_FILE, TIMINGS_FILE}
    assert CudaBackend().details(tmp_path / "tuned")["swept"] is True
