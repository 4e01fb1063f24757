"""Models that are quantized already, converted: their numbers are kept, and what cannot be honoured is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.convert import convert
from farrier.targets.decoder import is_projection
from farrier.targets.errors import CheckpointError, FarrierError, UnsupportedModelError
from farrier.targets.hf_weights import source_tensors
from farrier.targets.quantize import Quantization, dequantize, quantize
from farrier.targets.safetensors_file import read_bytes
from farrier.targets.tensorfile import NUMPY_TYPES
from tests.hub_formats import (
    Float32,
    Packer,
    Tensors,
    awq,
    compressed_int8,
    compressed_integers,
    fp8,
    gptq,
    save,
    save_quantized,
)
from tests.small_llama import save_small_llama

SETTINGS = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "vocab_size": 96}

FORMATS: dict[str, tuple[tuple[dict[str, Any], Packer], Quantization | None]] = {
    "awq": (awq(), Quantization("int4", 128, True)),
    "awq, groups of 64": (awq(64), Quantization("int4", 64, True)),
    "gptq": (gptq(), Quantization("int4", 128)),
    "gptq with zero points": (gptq(symmetric=False), Quantization("int4", 128, True)),
    "gptq v2 with zero points": (gptq(symmetric=False, layout="gptq_v2"), Quantization("int4", 128, True)),
    "gptq of 8 bits": (gptq(8, 32), Quantization("int8", 32)),
    "gptq of 8 bits with zero points": (gptq(8, symmetric=False), Quantization("int8", 128, True)),
    "gptq of 8 bits per row": (gptq(8, -1), Quantization("int8")),
    "gptq of 8 bits per row with zero points": (gptq(8, -1, symmetric=False), None),
    "compressed integers": (compressed_integers(), Quantization("int4", 128)),
    "compressed integers with zero points": (compressed_integers(symmetric=False), Quantization("int4", 128, True)),
    "compressed integers of 8 bits per row": (compressed_integers(8, -1), Quantization("int8")),
    "compressed int8": (compressed_int8(), Quantization("int8")),
    "fp8 per tensor": (fp8("tensor"), Quantization("fp8")),
    "fp8 per channel": (fp8("channel", compressed=True), Quantization("fp8")),
    "compressed fp8 per tensor": (fp8("tensor", compressed=True), Quantization("fp8")),
    "fp8 in blocks": (fp8("block"), Quantization("fp8", 128)),
    "compressed fp8 in blocks": (fp8("block", compressed=True), Quantization("fp8", 128)),
}
"""Format → how its numbers are kept; None: int8 with zero points, in groups of all columns."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("formats") / "llama", **SETTINGS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "quantized"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def hub_name(canonical: str) -> str:
    part = canonical.split(".")[-2]
    if canonical == "lm_head.weight":
        return canonical
    block = "self_attn" if part in ("q", "k", "v", "o") else "mlp"
    return f"model.layers.0.{block}.{part}_proj.weight"


def matrices(checkpoint: CheckpointReader) -> list[str]:
    return [name for name in checkpoint.names if is_projection(name) and name != "lm_head.weight"]


# What is kept


@pytest.mark.parametrize("described", FORMATS)
def test_numbers_are_kept(source: Path, folder: Path, out: Path, described: str) -> None:
    (config, pack), quantization = FORMATS[described]
    meant = save_quantized(source, folder, config, pack)
    convert(folder, out)
    checkpoint = CheckpointReader(out)
    assert len(matrices(checkpoint)) == 7
    for name in matrices(checkpoint):
        columns = checkpoint.shapes[name][1]
        assert checkpoint.quantization(name) == (quantization or Quantization("int8", columns, True))
        np.testing.assert_array_equal(checkpoint.float32(name), meant[hub_name(name)])
    assert checkpoint.dtype("lm_head.weight") == "f16"
    np.testing.assert_array_equal(checkpoint.float32("lm_head.weight"), meant["lm_head.weight"])


def test_groups_of_all_columns(source: Path, folder: Path, out: Path) -> None:
    meant = save_quantized(source, folder, *gptq(4, -1, symmetric=False))
    convert(folder, out)
    checkpoint = CheckpointReader(out)
    assert checkpoint.quantization("layers.0.q.weight") == Quantization("int4", 256, True)
    assert checkpoint.quantization("layers.0.down.weight") == Quantization("int4", 384, True)
    for name in matrices(checkpoint):
        np.testing.assert_array_equal(checkpoint.float32(name), meant[hub_name(name)])


def test_a_quantized_output_layer_is_kept_too(source: Path, folder: Path, out: Path) -> None:
    meant = save_quantized(source, folder, *gptq(), also=("lm_head",))
    convert(folder, out)
    checkpoint = CheckpointReader(out)
    assert checkpoint.quantization("lm_head.weight") == Quantization("int4", 128)
    np.testing.assert_array_equal(checkpoint.float32("lm_head.weight"), meant["lm_head.weight"])


@pytest.mark.parametrize("described", ["awq", "gptq with zero points", "fp8 in blocks", "compressed integers"])
def test_rows_of_fused_matrices(tmp_path: Path, out: Path, described: str) -> None:
    """Phi-3 stores q, k and v as one matrix, gate and up as another; these are read in several blocks of rows."""
    (config, pack), quantization = FORMATS[described]
    folder = save_small_llama(tmp_path / "phi", hidden_size=1024, num_hidden_layers=1, intermediate_size=2560)
    stated = json.loads((folder / "config.json").read_text())
    stated |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps({**stated, "quantization_config": config}))
    fused, tensors = {}, read_all(folder)
    for name, members in (("self_attn.qkv_proj", ("q", "k", "v")), ("mlp.gate_up_proj", ("gate", "up"))):
        block = name.split(".")[0]
        parts = [tensors.pop(f"model.layers.0.{block}.{part}_proj.weight")[1] for part in members]
        packed, meant = pack(np.concatenate(parts))
        tensors |= {f"model.layers.0.{name}.{suffix}": part for suffix, part in packed.items()}
        fused |= dict(zip(members, np.split(meant, np.cumsum([len(part) for part in parts])[:-1]), strict=True))
    save_again(folder, tensors)
    convert(folder, out)
    checkpoint = CheckpointReader(out)
    for part, expected in fused.items():
        assert checkpoint.quantization(f"layers.0.{part}.weight") == quantization
        np.testing.assert_array_equal(checkpoint.float32(f"layers.0.{part}.weight"), expected)


def read_all(folder: Path) -> Tensors:
    return {
        name: (info.dtype, np.frombuffer(read_bytes(info), _numpy_type(info.dtype)).reshape(info.shape))
        for name, info in source_tensors(folder).items()
    }


def _numpy_type(dtype: str) -> Any:
    return {"I32": np.int32, "I64": np.int64}.get(dtype) or NUMPY_TYPES[dtype]


def test_biases_that_are_all_zero_are_left_out(source: Path, folder: Path, out: Path) -> None:
    save_quantized(source, folder, *gptq())
    tensors = read_all(folder)
    bias = np.zeros(256, np.float16)
    save_again(folder, {**tensors, "model.layers.0.self_attn.q_proj.bias": ("F16", bias)})
    convert(folder, out)
    bias[3] = 1
    save_again(folder, {**tensors, "model.layers.0.self_attn.q_proj.bias": ("F16", bias)})
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        convert(folder, out.with_name("other"))


def save_again(folder: Path, tensors: Tensors) -> None:
    (folder / "model.safetensors").unlink()
    save(folder / "model.safetensors", tensors)


# Other precisions


@pytest.mark.parametrize("described", FORMATS)
@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_another_precision_is_that_of_the_numbers(
    source: Path, folder: Path, out: Path, described: str, precision: str
) -> None:
    (config, pack), quantization = FORMATS[described]
    meant = save_quantized(source, folder, config, pack)
    convert(folder, out, precision=precision)
    checkpoint = CheckpointReader(out)
    for name in matrices(checkpoint):
        assert checkpoint.dtype(name) == precision
        expected: Float32 = meant[hub_name(name)]
        if precision == "int8" and quantization != Quantization("int8"):
            stored, scale = quantize(expected, Quantization("int8"))
            expected = dequantize(stored, scale, Quantization("int8"))
        np.testing.assert_array_equal(checkpoint.float32(name), expected)


def test_overrides_change_single_layers(source: Path, folder: Path, out: Path) -> None:
    meant = save_quantized(source, folder, *awq())
    convert(folder, out, overrides={"*.down": "fp8", "*.o": "bf16", "lm_head": "int8"})
    checkpoint = CheckpointReader(out)
    found = {part: checkpoint.dtype(f"layers.0.{part}.weight") for part in ("q", "o", "gate", "down")}
    assert found == {"q": "int4", "o": "bf16", "gate": "int4", "down": "fp8"}
    assert checkpoint.dtype("lm_head.weight") == "int8"
    stored, scale = quantize(meant["model.layers.0.mlp.down_proj.weight"], Quantization("fp8"))
    np.testing.assert_array_equal(checkpoint.tensor("layers.0.down.weight"), stored)
    np.testing.assert_array_equal(checkpoint.scale("layers.0.down.weight"), scale)


def test_the_precision_that_a_matrix_has_keeps_it(source: Path, folder: Path, out: Path) -> None:
    meant = save_quantized(source, folder, *awq())
    convert(folder, out, precision="int4", group_size=32)
    checkpoint = CheckpointReader(out)
    assert checkpoint.quantization("layers.0.q.weight") == Quantization("int4", 128, True)
    np.testing.assert_array_equal(
        checkpoint.float32("layers.0.q.weight"), meant["model.layers.0.self_attn.q_proj.weight"]
    )
    assert checkpoint.dtype("lm_head.weight") == "int8"


def test_fp8_means_a_scale_for_each_row(source: Path, folder: Path, out: Path) -> None:
    save_quantized(source, folder, *fp8("block"))
    convert(folder, out, precision="fp8")
    assert CheckpointReader(out).quantization("layers.0.q.weight") == Quantization("fp8")


# Columns in order of activation, and groups that do not fit


def test_columns_in_order_of_activation(source: Path, folder: Path, out: Path) -> None:
    meant = save_quantized(source, folder, *gptq(symmetric=False, shuffled=True))
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.q\.weight.*desc_act.*--precision"):
        convert(folder, out)
    convert(folder, out, precision="f32")
    checkpoint = CheckpointReader(out)
    for name in matrices(checkpoint):
        np.testing.assert_array_equal(checkpoint.float32(name), meant[hub_name(name)])


def test_desc_act_alone_is_no_obstacle(source: Path, folder: Path, out: Path) -> None:
    config, pack = gptq()
    save_quantized(source, folder, {**config, "desc_act": True}, pack)
    convert(folder, out)


def test_blocks_that_do_not_divide_the_columns(source: Path, folder: Path, out: Path) -> None:
    meant = save_quantized(source, folder, *fp8("block", block=96))
    with pytest.raises(UnsupportedModelError, match=r"groups of 96 do not divide its 256 columns"):
        convert(folder, out)
    convert(folder, out, precision="f32")
    checkpoint = CheckpointReader(out)
    for name in matrices(checkpoint):
        np.testing.assert_array_equal(checkpoint.float32(name), meant[hub_name(name)])


# What is refused


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes.*--precision"),
        ({**gptq()[0], "bits": 3}, "'bits' = 3"),
        ({**gptq()[0], "checkpoint_format": "marlin"}, "marlin"),
        ({**gptq()[0], "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic"),
        ({**gptq()[0], "rotation": "hadamard"}, "rotation"),
        ({**awq()[0], "version": "gemv"}, "gemv"),
        ({**awq()[0], "zero_point": False}, "zero_point"),
        ({**awq()[0], "bits": 8}, "'bits' = 8"),
        ({**fp8("block")[0], "fmt": "e5m2"}, "e5m2"),
        ({**compressed_int8()[0], "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({**compressed_int8()[0], "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        ({**compressed_int8()[0], "config_groups": {}}, "config_groups"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    source: Path, folder: Path, out: Path, config: dict[str, Any], named: str
) -> None:
    save_quantized(source, folder, config, gptq()[1])
    with pytest.raises(UnsupportedModelError, match=named):
        convert(folder, out)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": 4}, "quant_method"),
        ({"bits": 4}, "quant_method"),
        ({**gptq()[0], "group_size": 0}, "'group_size'.*not 0"),
        ({**gptq()[0], "group_size": "all"}, "'group_size'.*\"all\""),
        ({**gptq()[0], "group_size": 64}, r"qzeros' has shape \[2, 32\], config.json calls for \[4, 32\]"),
        ({**gptq()[0], "bits": 8}, r"qweight' has shape \[32, 256\], config.json calls for \[64, 256\]"),
        ({**fp8("block")[0], "weight_block_size": [128]}, "weight_block_size"),
    ],
)
def test_settings_that_make_no_sense(source: Path, folder: Path, out: Path, config: dict[str, Any], named: str) -> None:
    save_quantized(source, folder, config, gptq()[1])
    with pytest.raises(CheckpointError, match=named):
        convert(folder, out)
    assert not out.exists()


Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("described", "changes", "named"),
    [
        ("awq", {"qzeros": None}, r"lacks the tensor '.*q_proj\.qzeros' of shape \[2, 32\]"),
        ("gptq", {"scales": None}, r"lacks the tensor '.*q_proj\.scales'"),
        ("gptq", {"qweight": None}, r"lacks the tensor '.*q_proj\.weight'"),
        ("awq", {"qweight": ("I32", np.zeros((256, 30), np.int32))}, r"q_proj\.qweight' has shape \[256, 30\]"),
        ("awq", {"scales": ("I32", np.zeros((2, 256), np.int32))}, r"q_proj\.scales' is stored as I32"),
        ("awq", {"scales": ("F16", np.full((2, 256), np.nan, np.float16))}, r"layers\.0\.q\.weight' is not finite"),
        ("gptq", {"qzeros": ("I32", np.zeros((2, 32), np.int32))}, r"layers\.0\.q\.weight' has zero points.*'sym'"),
        ("gptq", {"g_idx": ("I32", np.full(256, 9, np.int32))}, "g_idx"),
        (
            "fp8 per channel",
            {"weight_scale": ("F32", np.ones((3, 1), np.float32))},
            r"weight_scale' has shape \[3, 1\]",
        ),
        ("fp8 per channel", {"weight": ("F8_E4M3", np.full((256, 256), 0x7F, np.uint8))}, "holds NaN"),
        ("fp8 in blocks", {"weight_scale_inv": None}, r"lacks the tensor '.*weight_scale_inv' of shape \[2, 2\]"),
        ("compressed integers with zero points", {"weight_zero_point": None}, "lacks the tensor '.*weight_zero_point'"),
    ],
)
def test_tensors_that_are_not_what_they_should_be(
    source: Path, folder: Path, out: Path, described: str, changes: dict[str, Any], named: str
) -> None:
    (config, pack), _ = FORMATS[described]
    save_quantized(source, folder, config, pack)
    tensors = read_all(folder)
    for suffix, part in changes.items():
        del tensors[Q + suffix]
        if part is not None:
            tensors[Q + suffix] = part
    save_again(folder, tensors)
    with pytest.raises(CheckpointError, match=named):
        convert(folder, out)
    assert not out.exists()


def test_fp8_weights_need_a_config_that_says_so(source: Path, folder: Path, out: Path) -> None:
    config, pack = fp8("channel", compressed=True)
    save_quantized(source, folder, config, pack)
    stated = json.loads((folder / "config.json").read_text())
    del stated["quantization_config"]
    (folder / "config.json").write_text(json.dumps(stated))
    with pytest.raises(FarrierError, match="weight_scale"):
        convert(folder, out)
