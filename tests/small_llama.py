"""A small random Llama as a Hugging Face folder, made with numpy alone, whose logits are as spread as a real one's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests import llama_folder

CONFIG: dict[str, Any] = {
    **llama_folder.CONFIG,
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


def save_small_llama(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Saves it in `folder`, in f32; `settings` override entries of CONFIG."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **settings}
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in llama_folder.shapes(config).items():
        values = rng.standard_normal(shape, np.float32)
        tensors[name] = 1 + values / 4 if "norm" in name else values / np.float32(np.sqrt(shape[-1]))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
