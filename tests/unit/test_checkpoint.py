import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.convert import convert
from farrier.targets.errors import CheckpointError
from tests.llama_folder import write_llama


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_llama(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "checkpoint", precision="int4")
    return tmp_path / "checkpoint"


def edit_config(checkpoint: Path, **changes: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(checkpoint: Path, change: Any) -> None:
    tensors = load_file(checkpoint / "rank0.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "rank0.safetensors")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a farrier checkpoint"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_config_of_something_else(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a farrier checkpoint's"):
        CheckpointReader(checkpoint)


def test_a_newer_format(checkpoint: Path) -> None:
    edit_config(checkpoint, format_version=2)
    with pytest.raises(CheckpointError, match=r"format 2.*convert the model again"):
        CheckpointReader(checkpoint)


@pytest.mark.parametrize(
    ("name", "quantization", "problem"),
    [
        ("layers.0.q.weight", {"kind": "int8", "group_size": None}, r"U8 \[64, 32\].* calls for I8 \[64, 64\]"),
        ("layers.0.q.weight", {"kind": "int4", "group_size": 32}, r"scale' .* \[64, 1\].* calls for F32 \[64, 2\]"),
        ("layers.0.q.weight", {"kind": "int4", "group_size": 0}, "quantization.layers.0.q.weight"),
        ("layers.0.q.weight", {"kind": "int3", "group_size": None}, "quantization.layers.0.q.weight"),
        ("embed.weight", {"kind": "int8", "group_size": None}, "quantizes 'embed.weight'"),
        ("layers.9.q.weight", {"kind": "int8", "group_size": None}, r"quantizes 'layers\.9\.q\.weight'"),
    ],
)
def test_a_quantization_that_is_not_what_is_stored(
    checkpoint: Path, name: str, quantization: dict[str, Any], problem: str
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    edit_config(checkpoint, quantization={**config["quantization"], name: quantization})
    with pytest.raises(CheckpointError, match=problem):
        CheckpointReader(checkpoint)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("layers.0.q.weight"), r"'layers\.0\.q\.weight' .* is no tensor"),
        (lambda t: t.pop("layers.0.q.scale"), r"'layers\.0\.q\.scale' .* is no tensor"),
        (lambda t: t.update({"more": np.zeros(1, np.float32)}), "'more' .* calls for no tensor"),
        (lambda t: t.update({"final_norm.weight": np.zeros(65, np.float32)}), r"\[65\], .* \[64\]"),
        (lambda t: t.update({"final_norm.weight": np.zeros(64, np.int8)}), "is I8"),
        (lambda t: t.update({"final_norm.weight": np.zeros(64, np.int64)}), "I64"),
    ],
)
def test_weights_that_are_not_what_the_config_calls_for(checkpoint: Path, change: Any, problem: str) -> None:
    edit_weights(checkpoint, change)
    with pytest.raises(CheckpointError, match=problem):
        CheckpointReader(checkpoint)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_ends_in_anything_but_a_checkpoint_error(checkpoint: Path, data: st.DataObject) -> None:
    file = checkpoint / data.draw(st.sampled_from(["config.json", "rank0.safetensors"]))
    content = bytearray(file.read_bytes())
    try:
        damaged = bytearray(content)
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, min(len(content), 8000) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(damaged[: data.draw(st.integers(0, len(content)))])
        try:
            reader = CheckpointReader(checkpoint)
        except CheckpointError:
            return
        for name in reader.names:
            assert reader.float32(name).shape == reader.shapes[name]
    finally:
        file.write_bytes(content)
