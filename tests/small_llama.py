"""A small random Llama as a Hugging Face folder, made with numpy alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32, under the hub's names."""
    rng = np.random.default_rng(seed)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(columns))

    def norm() -> np.ndarray:
        return 1 + rng.standard_normal(hidden, np.float32) / 4

    tensors = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": norm()}
    tensors["lm_head.weight"] = matrix(vocab, hidden)
    for index in range(config["num_hidden_layers"]):
        p = f"model.layers.{index}."
        tensors[p + "input_layernorm.weight"], tensors[p + "post_attention_layernorm.weight"] = norm(), norm()
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            tensors[f"{p}self_attn.{name}_proj.weight"] = matrix(rows, hidden)
        tensors[p + "self_attn.o_proj.weight"] = matrix(hidden, q)
        tensors[p + "mlp.gate_proj.weight"], tensors[p + "mlp.up_proj.weight"] = (
            matrix(inner, hidden),
            matrix(inner, hidden),
        )
        tensors[p + "mlp.down_proj.weight"] = matrix(hidden, inner)
    return tensors


def save_small_llama(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Saves it in `folder`; `settings` override entries of CONFIG."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **settings}
    save_file(weights(config, seed), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
