"""Building real engines, and what must never be left behind when that goes wrong."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from farrier import LLM, SamplingParams
from farrier.targets.build import BuildOptions, Built, Estimate, build
from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.convert import convert
from farrier.targets.detect import detect, select_target
from farrier.targets.engine import load_engine
from farrier.targets.engine_dir import damaged_file, read_config
from farrier.targets.errors import (
    BuildError,
    CheckpointError,
    EngineError,
    FarrierError,
    FingerprintMismatchError,
    InsufficientResourcesError,
)
from farrier.targets.hf_weights import map_weights, source_tensors
from tests.serving import FARRIER
from tests.small_llama import save_small_llama

PROMPT = list(range(3, 60))
NATIVE_BF16 = select_target(detect(), "cpu").cpu.native_bf16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("small") / "llama")


def build_here(source: Path, out: Path, **options: object) -> Built:
    return build(source, out, select_target(detect(), "cpu"), BuildOptions(**options))


def greedy(engine: Path, count: int = 16) -> list[int]:
    with LLM(engine, kv_blocks=8) as llm:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return llm.generate([{"prompt_token_ids": PROMPT}], params)[0].outputs[0].token_ids


def first_logprobs(engine: Path) -> dict[int, float]:
    """The 20 likeliest tokens after PROMPT."""
    with LLM(engine, kv_blocks=8) as llm:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
        [logprobs] = llm.generate([{"prompt_token_ids": PROMPT}], params)[0].outputs[0].logprobs
    return dict(logprobs.top)


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_engine_is_self_contained(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    built = build_here(source, tmp_path / "engine")
    assert not built.reused
    assert built.config.precision == "f32"
    assert "token ids" in built.warnings[0]
    shutil.rmtree(source)
    assert entries(tmp_path) == {"engine"}
    moved = (tmp_path / "engine").rename(tmp_path / "elsewhere")
    assert len(greedy(moved)) == 16
    assert damaged_file(moved, read_config(moved)) is None


def test_checkpoint_and_model_directory_give_the_same_engine(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "checkpoint", precision="int8")
    build_here(tmp_path / "checkpoint", tmp_path / "one")
    build_here(model, tmp_path / "two", precision="int8")
    assert (tmp_path / "one" / "rank0.engine").read_bytes() == (tmp_path / "two" / "rank0.engine").read_bytes()
    assert read_config(tmp_path / "one").precision == "int8"


def test_identical_engine_is_reused_and_another_is_replaced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    build_here(model, out)
    inode = (out / "rank0.engine").stat().st_ino
    assert build_here(model, out).reused
    assert (out / "rank0.engine").stat().st_ino == inode
    assert not build_here(model, out, max_seq_len=128).reused
    assert read_config(out).ceilings.max_seq_len == 128
    (out / "rank0.engine").write_bytes(b"damaged")
    assert not build_here(model, out, max_seq_len=128).reused
    assert len(greedy(out)) == 16
    assert entries(tmp_path) == {"engine"}


def test_something_else_in_the_way_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(BuildError, match="not an engine"):
        build_here(model, tmp_path / "letters")
    assert (tmp_path / "letters" / "dear.txt").read_text() == "dear"


@pytest.mark.parametrize("precision", ["int8", "int4", "bf16", "f16"])
def test_engine_computes_what_the_checkpoint_says(model: Path, tmp_path: Path, precision: str) -> None:
    """Beside an f32 engine of the very weights that the quantized checkpoint stands for."""
    convert(model, tmp_path / "checkpoint", precision=precision, group_size=64)
    reader = CheckpointReader(tmp_path / "checkpoint")
    exact = shutil.copytree(model, tmp_path / "exact")
    names = map_weights(reader.spec, source_tensors(model))
    hub_names = {info.start: name for name, info in source_tensors(model).items()}
    save_file(
        {hub_names[source.tensor.start]: np.array(reader.float32(name)) for name, source in names.items()},
        exact / "model.safetensors",
    )
    build_here(tmp_path / "checkpoint", tmp_path / "quantized", kv_dtype="f32")
    build_here(exact, tmp_path / "reference")
    got, expected = first_logprobs(tmp_path / "quantized"), first_logprobs(tmp_path / "reference")
    common = got.keys() & expected.keys()
    assert len(common) >= 17
    # Integer weights meet activations that are quantized to 8 bits on the fly.
    tolerance = 0.1 if precision.startswith("int") else 0.01
    assert max(abs(got[token] - expected[token]) for token in common) < tolerance


@pytest.mark.parametrize(
    "kv_dtype",
    [
        "f32",
        "u8",
        pytest.param("bf16", marks=pytest.mark.skipif(not NATIVE_BF16, reason="this CPU has no bf16 instructions")),
    ],
)
def test_kv_types_agree(model: Path, tmp_path: Path, kv_dtype: str) -> None:
    precision = "bf16" if kv_dtype == "bf16" else "f32"
    built = build_here(model, tmp_path / "engine", kv_dtype=kv_dtype, precision=precision)
    build_here(model, tmp_path / "reference")
    got, expected = first_logprobs(tmp_path / "engine"), first_logprobs(tmp_path / "reference")
    common = got.keys() & expected.keys()
    assert len(common) >= 15
    assert max(abs(got[token] - expected[token]) for token in common) < 0.1
    engine = load_engine(tmp_path / "engine")
    try:
        assert engine.memory().bytes_per_block == built.config.kv_bytes_per_block
    finally:
        engine.close()


def test_bf16_kv_of_an_f32_engine_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="kv-dtype"):
        build_here(model, tmp_path / "engine", precision="f32", kv_dtype="bf16")
    assert entries(tmp_path) == set()


def test_ceilings_that_cannot_be_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(FarrierError, match="at most 512"):
        build_here(model, tmp_path / "engine", max_seq_len=513)
    with pytest.raises(BuildError, match="max-num-tokens"):
        build_here(model, tmp_path / "engine", max_num_tokens=4, max_batch_size=8)


def test_estimate_comes_first_and_is_close(model: Path, tmp_path: Path) -> None:
    said: list[Estimate] = []
    built = build(model, tmp_path / "engine", select_target(detect(), "cpu"), BuildOptions(), on_estimate=said.append)
    [estimate] = said
    assert estimate.weights == pytest.approx(built.config.weight_bytes, rel=0.02)
    assert estimate.kv_one == 16 * built.config.kv_bytes_per_block
    assert estimate.kv_all == 16 * estimate.kv_one


def test_too_little_memory_is_refused_beforehand(model: Path, tmp_path: Path) -> None:
    target = replace(select_target(detect(), "cpu"), memory_available=257 << 20, memory_total=1 << 30)
    with pytest.raises(InsufficientResourcesError, match="of memory"):
        build(model, tmp_path / "engine", target, BuildOptions())
    assert entries(tmp_path) == set()


def test_model_with_damaged_weights_leaves_nothing(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "model")
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        build_here(source, tmp_path / "engine")
    assert entries(tmp_path) == {"model"}


def test_model_with_nans_is_found_out(model: Path, tmp_path: Path) -> None:
    source = save_small_llama(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(BuildError, match="finite"):
        build_here(source, tmp_path / "engine")
    assert entries(tmp_path) == {"model"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_disk_that_is_too_small_is_refused_beforehand(model: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(4_000_000))
    with pytest.raises(InsufficientResourcesError, match="on disk"):
        build_here(model, small_disk / "engine")
    assert entries(small_disk) == {"ballast"}


def test_disk_that_fills_up_while_building(model: Path, small_disk: Path) -> None:
    def on_progress(stage: str) -> Callable[[int, int], None]:
        if stage == "Packing":  # somebody else takes the room that was there when we looked
            (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
        return lambda done, total: None

    with pytest.raises(InsufficientResourcesError, match="full"):
        build(model, small_disk / "engine", select_target(detect(), "cpu"), BuildOptions(), on_progress=on_progress)
    assert entries(small_disk) == {"ballast"}


def test_killed_build_leaves_no_engine_and_does_not_stand_in_the_way(tmp_path: Path) -> None:
    source = save_small_llama(tmp_path / "model", num_hidden_layers=24, hidden_size=512, intermediate_size=2048)
    out = tmp_path / "engine"
    process = subprocess.Popen([*FARRIER, "build", source, "-o", out], stderr=subprocess.DEVNULL)
    partial = tmp_path / ".engine.partial"
    while process.poll() is None and not (partial.exists() and any(partial.rglob("rank0.*"))):
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(EngineError):
        read_config(partial)
    build_here(source, out)
    assert len(greedy(out, 4)) == 4
    assert entries(tmp_path) == {"model", "engine"}


def test_what_does_not_read_back_as_it_was_written_is_found_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_a_bit(folder: Path) -> None:
        with (folder / "rank0.engine").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            [last] = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr("farrier.targets.engine_dir.forget_cached", lose_a_bit)
    with pytest.raises(BuildError, match=r"rank0\.engine does not read back"):
        build_here(model, tmp_path / "engine")
    assert entries(tmp_path) == set()


def test_two_builds_of_one_engine_at_once(model: Path, tmp_path: Path) -> None:
    command = [*FARRIER, "build", model, "-o", tmp_path / "engine"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("identical" in output for output in outputs) == [False, True]
    assert entries(tmp_path) == {"engine"}


class TestEnginesThatDoNotFit:
    @pytest.fixture
    def engine(self, model: Path, tmp_path: Path) -> Path:
        build_here(model, tmp_path / "engine")
        return tmp_path / "engine"

    def rewrite(self, engine: Path, **changes: object) -> None:
        document = json.loads((engine / "config.json").read_text())
        document["engine"]["fingerprint"].update(changes)
        (engine / "config.json").write_text(json.dumps(document))

    def test_another_abi(self, engine: Path) -> None:
        document = json.loads((engine / "config.json").read_text())
        document["abi"] = 999
        (engine / "config.json").write_text(json.dumps(document))
        with pytest.raises(FingerprintMismatchError, match="ABI 999") as caught:
            load_engine(engine)
        assert caught.value.field == "abi"

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"architecture": "sparc"}, "architecture"),
            ({"features": ["amx_bf16_of_tomorrow"]}, "features"),
            ({"versions": [["openvino", "1999.1"]]}, "versions.openvino"),
            ({"backend": "abacus"}, "backend"),
        ],
    )
    def test_fields_are_named(self, engine: Path, change: dict[str, object], field: str) -> None:
        self.rewrite(engine, **change)
        with pytest.raises(FingerprintMismatchError) as caught:
            load_engine(engine)
        assert caught.value.field == field

    def test_inspect_names_the_field(self, engine: Path) -> None:
        assert subprocess.run([*FARRIER, "inspect", engine], capture_output=True).returncode == 0
        self.rewrite(engine, architecture="sparc")
        done = subprocess.run([*FARRIER, "inspect", engine], capture_output=True, text=True)
        assert done.returncode == 1
        assert "architecture" in done.stdout
        assert "sparc" in done.stdout

    @pytest.mark.parametrize("damage", ["truncate", "remove", "config"])
    def test_damaged_engines_say_so(self, engine: Path, damage: str) -> None:
        if damage == "truncate":
            os.truncate(engine / "rank0.engine", 5000)
        elif damage == "remove":
            (engine / "rank0.engine").unlink()
        else:
            (engine / "config.json").write_text('{"kind": "farrier-engine", "abi": 1, "engine": {}}')
        with pytest.raises(FarrierError, match="build"):
            load_engine(engine)

    def test_command_prints_one_sentence(self, engine: Path) -> None:
        done = subprocess.run([*FARRIER, "serve", engine.parent / "nothing"], capture_output=True, text=True)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
