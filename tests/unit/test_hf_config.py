import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farrier.targets.decoder import DecoderSpec, LayerSpec
from farrier.targets.errors import CheckpointError, FarrierError, UnsupportedModelError
from farrier.targets.hf_config import from_hf_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA2: dict[str, Any] = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN2_YARN: dict[str, Any] = {
    **QWEN2,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE: dict[str, Any] = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
MIXTRAL: dict[str, Any] = {
    **MISTRAL,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
}
GEMMA2: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256000,
}
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "float32",
    "vocab_size": 262144,
}
GEMMA3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "float32",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32064,
}
PHI3_128K: dict[str, Any] = {
    **PHI3,
    "attention_bias": False,
    "max_position_embeddings": 131072,
    "sliding_window": 262144,
    "rope_scaling": {
        "long_factor": [1.0 + 1.3 * i for i in range(48)],
        "short_factor": [1.0 + 0.02 * i for i in range(48)],
        "type": "longrope",
    },
}
PHI4_MINI: dict[str, Any] = {
    **PHI3_128K,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}
HUB = {
    "llama-3.1": LLAMA,
    "llama-2": LLAMA2,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen2-yarn": QWEN2_YARN,
    "qwen3": QWEN3,
    "qwen3-moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3-4b": GEMMA3_4B,
    "phi3": PHI3,
    "phi3-128k": PHI3_128K,
    "phi4-mini": PHI4_MINI,
}


def transformers_config(config: dict[str, Any]) -> Any:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    values = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}
    return transformers.AutoConfig.for_model(config["model_type"], **values)


@pytest.mark.parametrize("name", HUB)
def test_old_spelling_and_what_transformers_makes_of_it_give_the_same_spec(name: str) -> None:
    old = HUB[name]
    new = transformers_config(old).to_dict()
    assert "rope_scaling" not in new
    assert from_hf_config(new) == from_hf_config(old)


def test_llama() -> None:
    spec = from_hf_config(LLAMA)
    assert spec == DecoderSpec(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        layers=(LayerSpec(None, 0, False),) * 32,
        ropes=spec.ropes,
        max_positions=131072,
        norm_eps=1e-5,
        attention_scale=128**-0.5,
    )
    assert spec.num_parameters() == 8030261248


def test_parameter_counts_are_those_the_makers_state() -> None:
    counts = {name: round(from_hf_config(config).num_parameters() / 1e6) for name, config in HUB.items()}
    assert counts == {
        "llama-3.1": 8030,
        "llama-2": 6738,
        "mistral": 7242,
        "qwen2": 7616,
        "qwen2-yarn": 7616,
        "qwen3": 596,
        "qwen3-moe": 30532,
        "mixtral": 46703,
        "gemma2": 2614,
        "gemma3": 1000,
        "gemma3-4b": 3880,
        "phi3": 3821,
        "phi3-128k": 3821,
        "phi4-mini": 3836,
    }


def test_biases() -> None:
    assert [from_hf_config(QWEN2).qkv_bias, from_hf_config(QWEN2).o_bias] == [True, False]
    for config in (LLAMA, QWEN3, GEMMA2):
        spec = from_hf_config({**config, "attention_bias": True})
        assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, True, False)
    assert from_hf_config({**LLAMA, "mlp_bias": True}).mlp_bias
    with pytest.raises(UnsupportedModelError, match="attention_bias"):
        from_hf_config({**MISTRAL, "attention_bias": True})


def test_windows() -> None:
    def windows(config: dict[str, Any]) -> list[int | None]:
        return [layer.window for layer in from_hf_config(config).layers]

    assert windows(MISTRAL) == [4096] * 32
    assert windows({**MISTRAL, "sliding_window": None}) == [None] * 32
    assert windows(PHI3) == [2047] * 32
    assert windows(QWEN2) == [None] * 28
    sliding = {**QWEN2, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20}
    assert windows(sliding) == [None] * 20 + [4096] * 8
    assert windows({**sliding, "max_window_layers": 0}) == [4096] * 28
    types = ["sliding_attention"] * 3 + ["full_attention"] * 25
    assert windows({**sliding, "layer_types": types}) == [4096] * 3 + [None] * 25
    assert windows({**QWEN3_MOE, "use_sliding_window": True, "sliding_window": 100}) == [100] * 48
    assert windows(GEMMA2) == [4096, None] * 13
    assert windows(GEMMA3) == ([512] * 5 + [None]) * 4 + [512] * 2
    assert windows({**GEMMA3, "sliding_window_pattern": 2}) == [512, None] * 13


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    assert all(layer.window is None for layer in from_hf_config({**PHI3, "sliding_window": 4096}).layers)
    # but the layers of Gemma 3 keep their rope
    assert [layer.rope for layer in from_hf_config({**GEMMA3, "sliding_window": 32768}).layers][:6] == [1] * 5 + [0]


def test_experts() -> None:
    mixtral, qwen = from_hf_config(MIXTRAL), from_hf_config({**QWEN3_MOE, "mlp_only_layers": [3]})
    assert mixtral.experts is not None
    assert (mixtral.experts.num_experts, mixtral.experts.top_k, mixtral.experts.intermediate_size) == (8, 2, 14336)
    assert mixtral.experts.normalize_top_k
    assert qwen.experts is not None
    assert (qwen.experts.num_experts, qwen.experts.top_k, qwen.experts.intermediate_size) == (128, 8, 768)
    assert [index for index, layer in enumerate(qwen.layers) if not layer.moe] == [3]
    sparse = from_hf_config({**QWEN3_MOE, "decoder_sparse_step": 2})
    assert [layer.moe for layer in sparse.layers] == [False, True] * 24
    unnormalized = from_hf_config({**QWEN3_MOE, "norm_topk_prob": False}).experts
    assert unnormalized is not None
    assert not unnormalized.normalize_top_k


def test_gemma() -> None:
    spec = from_hf_config(GEMMA2)
    assert (spec.attention_softcap, spec.final_softcap, spec.attention_scale) == (50.0, 30.0, 1 / 16)
    assert spec.embedding_multiplier == 48
    assert spec.tied_embeddings
    assert spec.norm_unit_offset
    assert spec.sandwich_norms
    assert not spec.qk_norm
    assert from_hf_config({**GEMMA2, "attn_logit_softcapping": None}).attention_softcap is None
    assert from_hf_config(GEMMA3).qk_norm


def test_the_embedding_multiplier_is_rounded_to_the_type_of_the_embeddings() -> None:
    exact = np.float32(math.sqrt(1152))
    assert from_hf_config(GEMMA3).embedding_multiplier == exact
    assert from_hf_config({**GEMMA3, "torch_dtype": "bfloat16"}).embedding_multiplier == 34.0
    assert from_hf_config({**GEMMA3, "torch_dtype": "float16"}).embedding_multiplier == np.float16(exact)


def test_gemma3_has_a_rope_for_each_kind_of_layer() -> None:
    spec = from_hf_config({**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    full, local = spec.ropes
    assert full.inv_freq[0] == 0.125
    assert local.inv_freq[0] == 1.0
    assert math.isclose(full.inv_freq[64], 1 / (1000 * 8), rel_tol=1e-6)
    assert math.isclose(local.inv_freq[64], 0.01, rel_tol=1e-6)


# Rope


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA["rope_scaling"],
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 32768,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.3,
        "original_max_position_embeddings": 4096,
    },
    "yarn-betas": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "longrope": {
        "rope_type": "longrope",
        "long_factor": [1.0 + 1.3 * i for i in range(64)],
        "short_factor": [1.0 + 0.02 * i for i in range(64)],
        "original_max_position_embeddings": 4096,
    },
    "longrope-factor": {
        "rope_type": "longrope",
        "factor": 16.0,
        "long_factor": [1.0 + 1.3 * i for i in range(64)],
        "short_factor": [1.0 + 0.02 * i for i in range(64)],
        "original_max_position_embeddings": 4096,
    },
    "longrope-attention-factor": {
        "rope_type": "longrope",
        "attention_factor": 1.19,
        "long_factor": [1.0 + 1.3 * i for i in range(64)],
        "short_factor": [1.0 + 0.02 * i for i in range(64)],
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("short", [True, False])
def test_ropes_are_those_of_transformers(name: str, short: bool) -> None:
    pytest.importorskip("torch", reason="compares with transformers, which needs torch")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils", reason="compares with transformers")
    max_seq_len = 4096 if short else 131072
    config = {**LLAMA, "rope_scaling": ROPES[name]}
    reference = rope_utils.ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]]
    expected, attention_factor = reference(transformers_config(config), "cpu", seq_len=max_seq_len)
    (rope,) = from_hf_config(config, max_seq_len=max_seq_len).ropes
    # yarn subtracts nearly equal numbers, which transformers does in float32
    np.testing.assert_allclose(rope.inv_freq, expected.numpy(), rtol=2e-6)
    assert math.isclose(rope.attention_factor, attention_factor, rel_tol=1e-12)
    assert rope.rotary_dim == 128


def test_default_rope_is_that_of_transformers() -> None:
    pytest.importorskip("torch", reason="compares with transformers, which needs torch")
    modeling = pytest.importorskip("transformers.models.phi3.modeling_phi3", reason="compares with transformers")
    for fraction, rotary_dim in ((1.0, 96), (0.75, 72)):
        config = {**PHI3, "partial_rotary_factor": fraction}
        expected = modeling.Phi3RotaryEmbedding(transformers_config(config)).inv_freq.numpy()
        (rope,) = from_hf_config(config).ropes
        np.testing.assert_allclose(rope.inv_freq, expected, rtol=5e-7)
        assert (rope.rotary_dim, rope.attention_factor) == (rotary_dim, 1.0)


def test_longrope_serves_the_original_context_with_short_factors_or_more_with_long_ones() -> None:
    short, long = from_hf_config(PHI3_128K, max_seq_len=4096), from_hf_config(PHI3_128K, max_seq_len=4097)
    assert (short.max_positions, long.max_positions) == (4096, 131072)
    assert short.ropes[0].inv_freq[1:] > long.ropes[0].inv_freq[1:]
    assert short.ropes[0].attention_factor == long.ropes[0].attention_factor > 1
    assert from_hf_config(PHI3_128K) == long


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_early_names_of_longrope_in_phi3(kind: str) -> None:
    renamed = {**PHI3_128K, "rope_scaling": {**PHI3_128K["rope_scaling"], "type": kind}}
    assert from_hf_config(renamed) == from_hf_config(PHI3_128K)


def test_yarn_extends_the_positions() -> None:
    assert from_hf_config(QWEN2_YARN).max_positions == 131072
    assert from_hf_config(QWEN2).max_positions == 32768


def test_more_tokens_than_the_model_serves_are_refused() -> None:
    assert from_hf_config(QWEN2_YARN, max_seq_len=131072).max_positions == 131072
    with pytest.raises(UnsupportedModelError, match="at most 32768"):
        from_hf_config(QWEN2, max_seq_len=32769)


# What is refused


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"architectures": ["OPTForCausalLM"]}, "OPTForCausalLM"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (LLAMA, {"hidden_act": "relu2"}, "relu2"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1, 2]}}, "mrope_section"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"alibi": True}, "alibi"),
        (LLAMA, {"sliding_window": 1024}, "sliding_window"),
        (LLAMA, {"residual_multiplier": 0.22}, "residual_multiplier"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (QWEN3, {"layer_types": ["linear_attention"] * 28}, "layer_types"),
        (GEMMA3, {"layer_types": ["chunked_attention"] * 26}, "layer_types"),
        (MISTRAL, {"layer_types": ["full_attention"] * 32}, "layer_types"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(base: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        from_hf_config({**base, **changes})


@pytest.mark.parametrize(
    ("base", "key", "harmless", "harmful"),
    [
        (LLAMA, "is_llama_config", True, "no"),
        (LLAMA, "activation", "swiglu", "geglu"),
        (PHI4_MINI, "full_attn_mod", 1, 2),
        (PHI4_MINI, "interpolate_factor", 1, 2),
        (QWEN3_MOE, "shared_expert_intermediate_size", 0, 512),
        (QWEN3_MOE, "use_qk_norm", True, "always"),
    ],
)
def test_settings_that_state_the_obvious(base: dict[str, Any], key: str, harmless: Any, harmful: Any) -> None:
    assert from_hf_config({**base, key: harmless}) == from_hf_config(base)
    with pytest.raises(UnsupportedModelError, match=key):
        from_hf_config({**base, key: harmful})
    with pytest.raises(UnsupportedModelError, match="use_qk_norm"):
        from_hf_config({**LLAMA, "use_qk_norm": True})


@pytest.mark.parametrize("key", ["alibi", "some_new_feature"])
def test_unknown_settings_that_are_off_are_harmless(key: str) -> None:
    for value in (None, False):
        assert from_hf_config({**LLAMA, key: value}) == from_hf_config(LLAMA)


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"architectures": None}, "architectures"),
        (LLAMA, {"architectures": []}, "architectures"),
        (LLAMA, {"hidden_size": None}, "hidden_size"),
        (LLAMA, {"hidden_size": -4096}, "hidden_size"),
        (LLAMA, {"hidden_size": "4096"}, "hidden_size"),
        (LLAMA, {"hidden_size": True}, "hidden_size"),
        (LLAMA, {"hidden_size": 4096.0}, "hidden_size"),
        (LLAMA, {"hidden_size": 4097}, "hidden_size"),
        (LLAMA, {"hidden_size": 10**30}, "hidden_size"),
        (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads"),
        (LLAMA, {"num_attention_heads": 0}, "num_attention_heads"),
        (LLAMA, {"head_dim": 127}, "head_dim"),
        (LLAMA, {"vocab_size": None}, "vocab_size"),
        (LLAMA, {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        (LLAMA, {"rms_norm_eps": 1e-300}, "rms_norm_eps"),
        (LLAMA, {"rope_theta": 0}, "rope_theta"),
        (LLAMA, {"rope_theta": 1e300}, "rope_theta"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 1e-300}}, "factor"),
        (LLAMA, {"rope_theta": 1}, "rope_theta"),
        (LLAMA, {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        (LLAMA, {"rope_scaling": "yarn"}, "rope_scaling"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor"),
        (LLAMA, {"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "type"),
        (LLAMA, {"rope_scaling": {**LLAMA["rope_scaling"], "high_freq_factor": 1.0}}, "high_freq_factor"),
        (LLAMA, {"max_position_embeddings": None}, "max_position_embeddings"),
        (PHI3_128K, {"rope_scaling": {**PHI3_128K["rope_scaling"], "long_factor": [1.0]}}, "long_factor"),
        (PHI3_128K, {"rope_scaling": {**PHI3_128K["rope_scaling"], "short_factor": [0.0] * 48}}, "short_factor"),
        (PHI3, {"partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        (PHI3, {"partial_rotary_factor": 2}, "partial_rotary_factor"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        (MIXTRAL, {"num_local_experts": None}, "num_local_experts"),
        (QWEN3_MOE, {"mlp_only_layers": "all"}, "mlp_only_layers"),
        (QWEN3, {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window"),
        (GEMMA2, {"sliding_window": None}, "sliding_window"),
        (GEMMA3_4B, {"text_config": [1]}, "text_config"),
        (GEMMA3_4B, {"text_config": {"hidden_size": 0}}, "hidden_size"),
    ],
)
def test_a_config_that_lies_is_refused_naming_the_key(
    base: dict[str, Any], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=f"'{named}'"):
        from_hf_config({**base, **changes})


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_a_config_that_is_no_object_is_refused(config: Any) -> None:
    with pytest.raises(CheckpointError, match="JSON object"):
        from_hf_config(config)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.floats(0, 1e-6) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_no_config_ends_in_anything_but_a_spec_or_an_error_of_ours(data: st.DataObject) -> None:
    config = copy.deepcopy(HUB[data.draw(st.sampled_from(sorted(HUB)))])
    target = config
    nested = [key for key, value in config.items() if isinstance(value, dict)]
    if nested and data.draw(st.booleans()):
        target = config[data.draw(st.sampled_from(nested))]
    for key in data.draw(st.lists(st.sampled_from(sorted(target)), max_size=3)):
        target[key] = data.draw(JSON)
    try:
        spec = from_hf_config(config)
    except FarrierError:
        return
    assert spec.num_parameters() > 0
    assert all(np.isfinite(rope.inv_freq).all() for rope in spec.ropes)
