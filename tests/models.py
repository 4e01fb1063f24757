"""Small random models of every family, saved as Hugging Face folders.

Norm weights and biases are random too, and windows and rope scaling take effect within 64 tokens, so that
whatever is left out or applied twice shows in the logits.
"""

from pathlib import Path
from typing import Any

import pytest

VOCAB_SIZE = 199
MAX_POSITIONS = 256

_DIMENSIONS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}


def _longrope(pairs: int, **more: Any) -> dict[str, Any]:
    return {
        **_LONGROPE,
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.5 * i for i in range(pairs)],
        **more,
    }


# family → (transformers' config class, its model class, settings on top of _DIMENSIONS)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama3": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "attention_bias": True, "mlp_bias": True},
    ),
    "llama31": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 20, "head_dim": 32}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2_yarn": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 32,
            "sliding_window": 20,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"sliding_window": 30, "original_max_position_embeddings": MAX_POSITIONS},
    ),
    "phi3_longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"original_max_position_embeddings": 16, "rope_parameters": _longrope(8, partial_rotary_factor=1.0)},
    ),
    "phi4_mini": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 16,
            "tie_word_embeddings": True,
            "rope_parameters": _longrope(6, partial_rotary_factor=0.75),
        },
    ),
}
FAMILIES = tuple(_FAMILIES)


def save_tiny(family: str, path: Path, *, seed: int = 0, **settings: Any) -> None:
    """Saves a random float32 model of `family` (one of FAMILIES) as config.json and model.safetensors in `path`.

    `settings` override entries of the family's config.
    """
    torch = pytest.importorskip("torch", reason="random models are made with torch")
    transformers = pytest.importorskip("transformers", reason="random models are made with transformers")
    config_class, model_class, own = _FAMILIES[family]
    config = getattr(transformers, config_class)(**{**_DIMENSIONS, **own, **settings})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=1.0 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(path)
