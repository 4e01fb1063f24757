import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.convert import TOKENIZER_FILES, convert
from farrier.targets.decoder import is_projection
from farrier.targets.errors import BuildError, CheckpointError, UnsupportedModelError
from farrier.targets.hf_config import from_hf_config
from farrier.targets.quantize import Quantization, dequantize, quantize
from tests.llama_folder import CONFIG, shapes, write_file, write_llama, write_weights


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_llama(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def hub_name(canonical: str) -> str:
    """Llama's name of a weight on the hub."""
    outer = {"embed": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"}
    stem = canonical.removesuffix(".weight")
    if stem in outer:
        return outer[stem] + ".weight"
    _, layer, part = stem.split(".")
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    block = "self_attn" if part in ("q", "k", "v", "o") else "mlp"
    return f"model.layers.{layer}.{norms.get(part, f'{block}.{part}_proj')}.weight"


def source_of(model: Path) -> dict[str, np.ndarray]:
    """Canonical name → value in the source."""
    loaded: dict[str, np.ndarray] = {}
    for path in sorted(model.glob("*.safetensors")):
        loaded |= load_file(path)
    spec = from_hf_config(json.loads((model / "config.json").read_text()))
    return {name: loaded[hub_name(name)] for name in spec.tensors()}


# Values


@pytest.mark.parametrize("shards", [1, 3])
def test_auto_keeps_every_bit(tmp_path: Path, out: Path, shards: int) -> None:
    write_llama(tmp_path / "llama", shards=shards)
    conversion = convert(tmp_path / "llama", out)
    assert (conversion.path, conversion.reused) == (out, False)
    checkpoint = CheckpointReader(out)
    expected = source_of(tmp_path / "llama")
    assert set(checkpoint.names) == set(expected)
    for name, value in expected.items():
        assert checkpoint.dtype(name) == "f32"
        assert checkpoint.quantization(name) is None
        np.testing.assert_array_equal(checkpoint.tensor(name), value)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("precision", ["f32", "bf16", "f16"])
def test_floats_are_rounded_as_torch_does(tmp_path: Path, out: Path, dtype: str, precision: str) -> None:
    torch = pytest.importorskip("torch", reason="torch's conversion is the judge")
    safetensors = pytest.importorskip("safetensors.torch", reason="torch's conversion is the judge")
    write_llama(tmp_path / "llama", dtype=dtype)
    convert(tmp_path / "llama", out, precision=precision)
    checkpoint = CheckpointReader(out)
    source = safetensors.load_file(tmp_path / "llama" / "model.safetensors")
    wanted = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[precision]
    for name in checkpoint.names:
        assert checkpoint.dtype(name) == precision
        expected = source[hub_name(name)].to(wanted).float().numpy()
        np.testing.assert_array_equal(checkpoint.float32(name), expected)


def test_int8(model: Path, out: Path) -> None:
    convert(model, out, precision="int8")
    checkpoint = CheckpointReader(out)
    for name, value in source_of(model).items():
        if is_projection(name):
            stored, scale = quantize(value, Quantization("int8"))
            assert checkpoint.dtype(name) == "int8"
            np.testing.assert_array_equal(checkpoint.tensor(name), stored)
            np.testing.assert_array_equal(checkpoint.scale(name), scale)
            np.testing.assert_array_equal(checkpoint.float32(name), dequantize(stored, scale, Quantization("int8")))
        else:
            assert checkpoint.dtype(name) == "f32"
            np.testing.assert_array_equal(checkpoint.tensor(name), value)


def test_fp8_and_lm_head_in_int8(model: Path, out: Path) -> None:
    convert(model, out, precision="fp8")
    checkpoint = CheckpointReader(out)
    for name, value in source_of(model).items():
        if name == "lm_head.weight":
            assert checkpoint.dtype(name) == "int8"
        elif is_projection(name):
            stored, scale = quantize(value, Quantization("fp8"))
            assert checkpoint.dtype(name) == "fp8"
            assert checkpoint.tensors[name].dtype == "F8_E4M3"
            np.testing.assert_array_equal(checkpoint.tensor(name), stored)
            np.testing.assert_array_equal(checkpoint.scale(name), scale)
            np.testing.assert_array_equal(checkpoint.float32(name), dequantize(stored, scale, Quantization("fp8")))
        else:
            np.testing.assert_array_equal(checkpoint.tensor(name), value)


def test_int4_in_the_largest_groups_that_fit_and_lm_head_in_int8(model: Path, out: Path) -> None:
    convert(model, out, precision="int4")
    checkpoint = CheckpointReader(out)
    assert checkpoint.quantization("layers.0.q.weight") == Quantization("int4", 64)
    assert checkpoint.quantization("layers.1.down.weight") == Quantization("int4", 128)
    assert checkpoint.quantization("lm_head.weight") == Quantization("int8")
    assert checkpoint.quantization("embed.weight") is None
    assert checkpoint.tensor("layers.1.down.weight").shape == (64, 64)
    assert checkpoint.scale("layers.1.down.weight").shape == (64, 1)
    for name, value in source_of(model).items():
        quantization = checkpoint.quantization(name)
        if quantization is not None:
            stored, scale = quantize(value, quantization)
            np.testing.assert_array_equal(checkpoint.tensor(name), stored)
            np.testing.assert_array_equal(checkpoint.scale(name), scale)


def test_large_matrices_are_quantized_as_if_whole(tmp_path: Path, out: Path) -> None:
    """They are read in blocks of rows."""
    write_llama(tmp_path / "llama", vocab_size=40_000, num_hidden_layers=1)
    convert(tmp_path / "llama", out, precision="int4", overrides={"lm_head": "int4"})
    checkpoint = CheckpointReader(out)
    value = source_of(tmp_path / "llama")["lm_head.weight"]
    stored, scale = quantize(value, Quantization("int4", 64))
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), stored)
    np.testing.assert_array_equal(checkpoint.scale("lm_head.weight"), scale)


def test_group_size(model: Path, out: Path) -> None:
    convert(model, out, precision="int4", group_size=32)
    sizes = {quantization.group_size for quantization in CheckpointReader(out).config.quantization.values()}
    assert sizes == {32, None}


def test_arrays_are_read_only_views(model: Path, out: Path) -> None:
    convert(model, out)
    tensor = CheckpointReader(out).tensor("embed.weight")
    assert not tensor.flags.owndata
    assert not tensor.flags.writeable


# Overrides


def test_later_overrides_win(model: Path, out: Path) -> None:
    convert(model, out, precision="int8", overrides={"layers.*.down": "int4", "layers.1.*": "bf16", "*_norm": "f16"})
    checkpoint = CheckpointReader(out)
    found = {name: checkpoint.dtype(name) for name in checkpoint.names}
    assert found["layers.0.down.weight"] == "int4"
    assert found["layers.0.q.weight"] == found["lm_head.weight"] == "int8"
    assert found["layers.1.down.weight"] == found["layers.1.q.weight"] == "bf16"
    assert found["layers.0.mlp_norm.weight"] == found["layers.1.mlp_norm.weight"] == "f16"
    assert found["embed.weight"] == "f32"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"layers.7.*": "int8"}, r"layers\.7\.\*=int8"),
        ({"embed": "int8"}, "embed=int8"),
        ({"*_norm": "int4"}, r"\*_norm=int4"),
        ({"lm_head": "int3"}, "int3"),
        ({"lm_head.weight": "int8"}, "lm_head.weight=int8"),
    ],
)
def test_overrides_that_change_nothing_are_refused(
    model: Path, out: Path, overrides: dict[str, str], named: str
) -> None:
    with pytest.raises(BuildError, match=named):
        convert(model, out, overrides=overrides)
    assert not out.exists()


@pytest.mark.parametrize("options", [{"precision": "fp4"}, {"group_size": 48}, {"group_size": 16}])
def test_options_that_do_not_exist_are_refused(model: Path, out: Path, options: dict[str, Any]) -> None:
    with pytest.raises(BuildError, match=str(next(iter(options.values())))):
        convert(model, out, **options)


def test_int4_of_columns_that_no_group_divides_is_refused(tmp_path: Path, out: Path) -> None:
    write_llama(tmp_path / "llama", intermediate_size=80)
    with pytest.raises(BuildError, match=r"80 columns of 'layers\.0\.down\.weight'.*--override layers\.0\.down=int8"):
        convert(tmp_path / "llama", out, precision="int4")
    convert(tmp_path / "llama", out, precision="int4", overrides={"layers.*.down": "int8"})


# Tied embeddings


@pytest.mark.parametrize(
    ("precision", "overrides", "head"),
    [
        ("auto", {}, None),
        ("bf16", {}, None),
        ("int8", {}, "int8"),
        ("int4", {}, "int8"),
        ("fp8", {"lm_head": "fp8"}, "fp8"),
        ("int4", {"lm_head": "int4"}, "int4"),
        ("int8", {"lm_head": "auto"}, None),
        ("auto", {"lm_head": "bf16"}, "bf16"),
        ("bf16", {"embed": "f32"}, "bf16"),
    ],
)
def test_tied_embeddings_are_stored_twice_only_where_they_differ(
    tmp_path: Path, out: Path, precision: str, overrides: dict[str, str], head: str | None
) -> None:
    write_llama(tmp_path / "llama", tie_word_embeddings=True)
    convert(tmp_path / "llama", out, precision=precision, overrides=overrides)
    checkpoint = CheckpointReader(out)
    assert checkpoint.spec.tied_embeddings
    assert (checkpoint.dtype("lm_head.weight") if "lm_head.weight" in checkpoint.names else None) == head
    if head is not None:
        table, product = checkpoint.float32("embed.weight"), checkpoint.float32("lm_head.weight")
        np.testing.assert_allclose(product, table, atol=0.1)


def test_a_tied_head_that_is_stored_all_the_same(tmp_path: Path, out: Path) -> None:
    config = write_llama(tmp_path / "llama", tie_word_embeddings=True)
    path = tmp_path / "llama" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, path)
    convert(tmp_path / "llama", out)
    assert "lm_head.weight" not in CheckpointReader(out).names
    shutil.rmtree(out)

    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        convert(tmp_path / "llama", out)
    save_file({**tensors, "lm_head.weight": tensors["model.norm.weight"]}, path)
    with pytest.raises(CheckpointError, match=r"lm_head.weight' has shape \[64\], .* \[96, 64\]"):
        convert(tmp_path / "llama", out)
    assert config["vocab_size"] == 96


# What goes into the directory


def test_config_says_what_the_checkpoint_is(model: Path, out: Path) -> None:
    convert(model, out, precision="int8", overrides={"lm_head": "bf16"})
    config = json.loads((out / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["model"] == "llama"
    assert config["parallelism"] == {"tp": 1, "pp": 1, "ep": 1}
    assert config["precision"] == "int8"
    assert config["overrides"] == [["lm_head", "bf16"]]
    assert config["eos_token_ids"] == [2, 3]
    assert set(config["sources"]) == {"config.json", "model.safetensors"}
    assert config["quantization"]["layers.0.q.weight"] == {"kind": "int8", "group_size": None, "zero_points": False}
    read = CheckpointReader(out).config
    assert read.spec == from_hf_config(json.loads((model / "config.json").read_text()))
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "rank0.safetensors", "tokenizer"]


def test_the_weights_file_is_plain_safetensors(model: Path, out: Path) -> None:
    convert(model, out, precision="int8")
    loaded = load_file(out / "rank0.safetensors")
    assert loaded["layers.0.q.weight"].dtype == np.int8
    assert loaded["layers.0.q.scale"].shape == (64,)


def test_the_tokenizer_travels(model: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        (model / name).write_text(json.dumps({"name": name}))
    (model / "README.md").write_text("not this")
    assert convert(model, out).warnings == ()
    assert sorted(path.name for path in (out / "tokenizer").iterdir()) == sorted(TOKENIZER_FILES)
    assert json.loads((out / "tokenizer" / "tokenizer.json").read_text()) == {"name": "tokenizer.json"}


def test_a_model_without_tokenizer_json_converts_with_a_warning(model: Path, out: Path) -> None:
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    (warning,) = convert(model, out).warnings
    assert "tokenizer.model" in warning
    assert "token ids" in warning
    assert list((out / "tokenizer").iterdir()) == []


def test_the_generation_config_knows_best_where_a_sequence_ends(model: Path, out: Path) -> None:
    (model / "generation_config.json").write_text('{"eos_token_id": 7}')
    convert(model, out)
    assert CheckpointReader(out).config.eos_token_ids == (7,)


@pytest.mark.parametrize("ids", ["2", [1.5], [-1], {}])
def test_eos_token_ids_that_are_none_are_refused(model: Path, out: Path, ids: Any) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(CheckpointError, match="eos_token_id"):
        convert(model, out)


def test_a_model_in_the_hub_cache_has_the_name_of_its_repository(tmp_path: Path, out: Path) -> None:
    snapshot = tmp_path / "models--org--tiny-llama" / "snapshots" / "0123abcd"
    write_llama(snapshot)
    convert(snapshot, out)
    assert CheckpointReader(out).config.model == "org/tiny-llama"


def test_progress_counts_up_to_the_end(model: Path, out: Path) -> None:
    calls: list[tuple[int, int]] = []
    convert(model, out, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 0
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len({total for _, total in calls}) == 1


# An output that exists


def test_the_same_conversion_is_reused(model: Path, out: Path) -> None:
    convert(model, out, precision="int8")
    before = (out / "rank0.safetensors").stat()
    assert convert(model, out, precision="int8").reused
    assert (out / "rank0.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_another_conversion_is_refused_and_left_alone(model: Path, out: Path) -> None:
    convert(model, out, precision="int8")
    before = (out / "rank0.safetensors").read_bytes()
    with pytest.raises(BuildError, match="differ in 'precision'"):
        convert(model, out, precision="int4")
    write_weights(model, shapes({**CONFIG}), dtype="F16")
    with pytest.raises(BuildError, match="differ in 'sources'"):
        convert(model, out, precision="int8")
    assert (out / "rank0.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_is_not_reused(model: Path, out: Path) -> None:
    convert(model, out)
    os.truncate(out / "rank0.safetensors", 5000)
    with pytest.raises(BuildError, match="truncated"):
        convert(model, out)


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder", "dangling link"])
def test_anything_else_is_refused_and_left_alone(model: Path, out: Path, kind: str) -> None:
    if kind == "file":
        out.write_text("precious")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "notes").write_text("precious")
    with pytest.raises(BuildError, match="is no whole checkpoint"):
        convert(model, out)
    assert os.path.lexists(out)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


# Bad models


def test_no_model(tmp_path: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: No such file"):
        convert(tmp_path / "nowhere", out)
    assert not out.exists()


def test_a_config_that_is_no_json(model: Path, out: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        convert(model, out)


def test_an_unsupported_architecture(model: Path, out: Path) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        convert(model, out)


@pytest.mark.parametrize(("present", "named"), [("pytorch_model.bin", "PyTorch"), ("model.gguf", "neither")])
def test_weights_in_another_format(model: Path, out: Path, present: str, named: str) -> None:
    (model / "model.safetensors").rename(model / present)
    with pytest.raises(CheckpointError, match=named):
        convert(model, out)


def rewrite(model: Path, change: Any) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def test_a_missing_tensor(model: Path, out: Path) -> None:
    rewrite(model, lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.1\.self_attn\.o_proj\.weight'"):
        convert(model, out)


def test_a_tensor_too_many(model: Path, out: Path) -> None:
    rewrite(model, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": np.zeros((1, 1), np.float32)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight'.* does not call for"):
        convert(model, out)


def test_a_wrong_shape(model: Path, out: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(model, lambda tensors: tensors.update({name: np.zeros((64, 64), np.float32)}))
    with pytest.raises(CheckpointError, match=r"k_proj\.weight' has shape \[64, 64\], .* calls for \[32, 64\]"):
        convert(model, out)


def test_tables_that_old_checkpoints_store_are_ignored(model: Path, out: Path) -> None:
    rewrite(model, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}))
    convert(model, out)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_other_prefixes_of_the_names(model: Path, tmp_path: Path, out: Path, prefix: str, head: str) -> None:
    convert(model, tmp_path / "plain")

    def rename(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            new = head if name == "lm_head.weight" else prefix + name.removeprefix("model.")
            tensors[new] = tensors.pop(name)

    rewrite(model, rename)
    convert(model, out)
    assert (out / "rank0.safetensors").read_bytes() == (tmp_path / "plain" / "rank0.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["F64", "I8"])
def test_weights_of_another_type(tmp_path: Path, out: Path, dtype: str) -> None:
    write_llama(tmp_path / "llama", dtype=dtype)
    with pytest.raises(CheckpointError, match=f"'embed.weight' is stored as {dtype}"):
        convert(tmp_path / "llama", out)


def test_a_truncated_file(model: Path, out: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        convert(model, out)
    assert not out.exists()


def test_weights_too_large_for_the_precision(model: Path, out: Path) -> None:
    rewrite(model, lambda tensors: tensors["lm_head.weight"].fill(1e5))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' holds values too large for f16"):
        convert(model, out, precision="f16")
    assert not out.exists()
    convert(model, out, precision="bf16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_cannot_be_quantized(model: Path, out: Path, value: float) -> None:
    rewrite(model, lambda tensors: tensors["lm_head.weight"].fill(value))
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' holds NaN or infinity"):
        convert(model, out, precision="int8")
    convert(model, out, precision="bf16")


# Bad shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_llama(tmp_path / "llama", shards=2)
    return tmp_path / "llama"


FIRST, SECOND, INDEX = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
)


def test_a_missing_shard(sharded: Path, out: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"shard {SECOND}"):
        convert(sharded, out)


def test_an_index_that_lies(sharded: Path, out: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.layers.9.up.weight"] = FIRST
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.layers\.9\.up\.weight' is not in"):
        convert(sharded, out)


@pytest.mark.parametrize("file", ["../llama/" + FIRST, "/etc/passwd", "", 3])
def test_an_index_that_points_elsewhere(sharded: Path, out: Path, file: Any) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(CheckpointError, match="file names beside it"):
        convert(sharded, out)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": []}'])
def test_a_corrupt_index(sharded: Path, out: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        convert(sharded, out)


def test_a_tensor_in_two_shards(sharded: Path, out: Path) -> None:
    everything = shapes(CONFIG)
    write_file(sharded / FIRST, everything, "F32")
    with pytest.raises(CheckpointError, match="is in two files"):
        convert(sharded, out)
