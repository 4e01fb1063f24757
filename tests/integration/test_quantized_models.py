"""Engines of models that are quantized already, beside the numbers that their weights stand for in a numpy decoder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from farrier.targets.build import BuildOptions, build
from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.convert import convert
from farrier.targets.detect import detect, select_target
from farrier.targets.engine import Batch, Float32, SamplingArrays, load_engine
from farrier.targets.engine_dir import read_config
from farrier.targets.errors import BuildError
from tests import reference
from tests.hub_formats import Packer, awq, compressed_int8, compressed_integers, fp8, gptq, save_quantized
from tests.small_llama import CONFIG, save_small_llama

PROMPT = np.random.default_rng(1).integers(3, CONFIG["vocab_size"], 40).tolist()
EXACT = 1e-5
"""Of the largest logprob: float32's rounding."""
DYNAMIC = 0.03
"""Integer weights meet activations that are quantized to 8 bits on the fly, but not int8 with zero points, or int4 with
zero points in small groups."""

CASES: dict[str, tuple[tuple[dict[str, Any], Packer], dict[str, Any], str, float]] = {
    "awq": (awq(), {}, "int4", DYNAMIC),
    "gptq": (gptq(), {}, "int4", DYNAMIC),
    "gptq with zero points": (gptq(symmetric=False), {}, "int4", DYNAMIC),
    "gptq v2 with zero points, groups of 32": (gptq(group=32, symmetric=False, layout="gptq_v2"), {}, "int4", EXACT),
    "gptq of one group": (gptq(group=-1), {}, "int4", DYNAMIC),
    "gptq of 8 bits": (gptq(8), {}, "int8", DYNAMIC),
    "gptq of 8 bits with zero points": (gptq(8, symmetric=False), {}, "int8", EXACT),
    "gptq of 8 bits per row with zero points": (gptq(8, -1, symmetric=False), {}, "int8", EXACT),
    "gptq in order of activation": (gptq(symmetric=False, shuffled=True), {"precision": "f32"}, "f32", EXACT),
    "compressed integers": (compressed_integers(symmetric=False), {}, "int4", DYNAMIC),
    "compressed int8": (compressed_int8(), {}, "int8", DYNAMIC),
    "fp8 per tensor": (fp8("tensor"), {"precision": "f32"}, "f32", EXACT),
    "fp8 per channel": (fp8("channel", compressed=True), {"precision": "f32"}, "f32", EXACT),
    "fp8 in blocks": (fp8("block"), {"precision": "f32"}, "f32", EXACT),
    "fp8 as int8": (fp8("channel", compressed=True), {"precision": "int8"}, "int8", 0.05),
    "awq with overrides": (awq(), {"overrides": {"*.o": "f32", "*.up": "f32"}}, "int4", DYNAMIC),
    "awq with an output layer in int8": (awq(), {"overrides": {"lm_head": "int8"}}, "int4", DYNAMIC),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llama(tmp_path_factory.mktemp("quantized") / "llama")


def logprobs(path: Path) -> Float32:
    """Of every token after every token of PROMPT: `[T, V]`."""
    count, vocab_size = len(PROMPT), CONFIG["vocab_size"]
    arrays = SamplingArrays.greedy(count)
    arrays.num_logprobs = np.full(count, vocab_size, np.int32)
    batch = Batch(
        token_ids=np.array(PROMPT, np.int32),
        positions=np.arange(count, dtype=np.int32),
        query_starts=np.array([0, count], np.int32),
        context_lens=np.array([0], np.int32),
        block_ids=np.array([2, 0], np.int32),
        block_starts=np.array([0, 2], np.int32),
        sample_rows=np.arange(count, dtype=np.int32),
        sampling=arrays,
    )
    engine = load_engine(path)
    engine.allocate(4)
    try:
        result = engine.step(batch).wait()
    finally:
        engine.close()
    rows = np.empty((count, vocab_size), np.float32)
    for row, logs in result.logprobs.items():
        rows[row, logs.top_ids] = logs.top_values
    return rows


def meant_logprobs(folder: Path, source: Path, meant: dict[str, Float32]) -> Float32:
    """What `logprobs` should be, of weights in f32."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    save_file(meant, folder / "model.safetensors")
    logits = reference.logits(CheckpointReader(convert(folder, folder / "checkpoint").path), PROMPT)
    return np.log(reference.softmax(logits))


@pytest.mark.parametrize("described", CASES)
def test_logits_are_those_of_the_numbers(source: Path, tmp_path: Path, described: str) -> None:
    (config, pack), options, precision, tolerance = CASES[described]
    meant = save_quantized(source, tmp_path / "model", config, pack)
    build(tmp_path / "model", tmp_path / "engine", select_target(detect(), "cpu"), BuildOptions(**options))
    assert read_config(tmp_path / "engine").precision == precision
    expected = meant_logprobs(tmp_path / "meant", source, meant)
    assert np.abs(logprobs(tmp_path / "engine") - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("described", ["awq", "gptq", "gptq of 8 bits per row with zero points"])
def test_experts(source: Path, tmp_path: Path, described: str) -> None:
    (config, pack), options, _, tolerance = CASES[described]
    mixtral = save_small_mixtral(source, tmp_path / "mixtral")
    meant = save_quantized(mixtral, tmp_path / "model", config, pack)
    build(tmp_path / "model", tmp_path / "engine", select_target(detect(), "cpu"), BuildOptions(**options))
    expected = meant_logprobs(tmp_path / "meant", mixtral, meant)
    assert np.abs(logprobs(tmp_path / "engine") - expected).max() <= tolerance * np.abs(expected).max()


def save_small_mixtral(llama: Path, folder: Path) -> Path:
    """The Llama with three experts in place of each MLP, all of them chosen: no rounding can choose others."""
    folder.mkdir()
    config = json.loads((llama / "config.json").read_text())
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    config |= {"num_local_experts": 3, "num_experts_per_tok": 3}
    (folder / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(0), {}
    for name, values in load_file(llama / "model.safetensors").items():
        if ".mlp." not in name:
            tensors[name] = values
            continue
        layer, part = name.split(".mlp.")
        part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[part.removesuffix(".weight")]
        for expert in range(3):
            mixed = rng.permutation(values) if part == "w2" else rng.permutation(values, axis=1)
            tensors[f"{layer}.block_sparse_moe.experts.{expert}.{part}.weight"] = mixed
        router = rng.standard_normal((3, config["hidden_size"]), np.float32) / np.float32(30)
        tensors[f"{layer}.block_sparse_moe.gate.weight"] = router
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("by", ["the model", "the precision", "an override", "a checkpoint"])
def test_fp8_is_refused_on_the_cpu(source: Path, tmp_path: Path, by: str) -> None:
    model, options = source, {}
    if by == "the model":
        model = tmp_path / "model"
        save_quantized(source, model, *fp8("block"))
    elif by == "a checkpoint":
        model = convert(source, tmp_path / "checkpoint", overrides={"*.down": "fp8"}).path
    else:
        options = {"precision": "fp8"} if by == "the precision" else {"overrides": {"layers.1.*": "fp8"}}
    with pytest.raises(BuildError, match=r"fp8.*int8"):
        build(model, tmp_path / "engine", select_target(detect(), "cpu"), BuildOptions(**options))
    assert not (tmp_path / "engine").exists()
