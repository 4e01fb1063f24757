"""Hugging Face folders of random Llamas, written without torch, tensor by tensor, in shards if asked."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": [2, 3],
}
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I8": 1}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names on the hub and shapes of a Llama's weights."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        attention = {"q": hidden, "k": kv, "v": kv}
        result |= {p + f"self_attn.{name}_proj.weight": (rows, hidden) for name, rows in attention.items()}
        result |= {p + "self_attn.o_proj.weight": (hidden, hidden), p + "mlp.down_proj.weight": (hidden, inner)}
        result |= {p + f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        result |= {p + f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    result["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (config["vocab_size"], hidden)
    return result


def write_llama(folder: Path, *, dtype: str = "F32", shards: int = 1, **changes: Any) -> dict[str, Any]:
    """Writes config.json and the weights, and returns the config."""
    folder.mkdir(parents=True)
    config = {**CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, shapes(config), dtype=dtype, shards=shards)
    return config


def write_weights(folder: Path, tensors: dict[str, tuple[int, ...]], *, dtype: str = "F32", shards: int = 1) -> None:
    names = list(tensors)
    if shards == 1:
        write_file(folder / "model.safetensors", tensors, dtype)
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        write_file(folder / file, part, dtype)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_file(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str) -> None:
    header, offset = {}, 0
    for name, shape in tensors.items():
        stop = offset + math.prod(shape) * _SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(tensors.values()):
            for piece in _pieces(shape, dtype, number):
                file.write(piece)


def _pieces(shape: Sequence[int], dtype: str, seed: int) -> Iterator[bytes]:
    """Random values around ±0.1, a million at a time; bfloat16 by cutting float32 off."""
    random, left = np.random.default_rng(seed), math.prod(shape)
    while left:
        values = random.standard_normal(min(left, 1 << 20), np.float32) * np.float32(0.1)
        left -= len(values)
        if dtype == "BF16":
            yield (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        else:
            yield values.astype({"F32": "f4", "F16": "f2", "F64": "f8", "I8": "i1"}[dtype]).tobytes()
