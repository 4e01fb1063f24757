"""Hugging Face `config.json` → `DecoderSpec`. What is not known is refused by name, never guessed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from farrier.targets.bfloat16 import from_bfloat16, to_bfloat16
from farrier.targets.decoder import Activation, DecoderSpec, ExpertSpec, LayerSpec, RopeKind
from farrier.targets.errors import UnsupportedModelError
from farrier.targets.hf_rope import RopeParameters
from farrier.targets.hf_settings import Settings

MULTIMODAL_GEMMA3 = "Gemma3ForConditionalGeneration"
"""Its language model is that of Gemma3ForCausalLM; the vision tower is left out."""

_PerLayer = Callable[[Settings, int], list[bool]]


def from_hf_config(config: dict[str, Any], *, max_seq_len: int | None = None) -> DecoderSpec:
    """The decoder that a `config.json` describes, in transformers' old or new (`rope_parameters`) spelling.

    `max_seq_len` is how long sequences will be (None: as long as the model allows). It matters to longrope only,
    whose factors are decided once: the short ones, and `max_positions` cut to the original context, when
    `max_seq_len` fits into that; else the long ones.

    Raises UnsupportedModelError naming what is not supported, CheckpointError naming the key that is missing,
    of a wrong type, or in contradiction to another.
    """
    settings = Settings(config)
    architecture = _architecture(settings)
    if architecture == MULTIMODAL_GEMMA3:
        family = _FAMILIES["Gemma3ForCausalLM"]
        settings = _gemma3_text(settings)
    elif architecture in _FAMILIES:
        family = _FAMILIES[architecture]
        settings = settings.with_defaults(family.defaults)
    else:
        known = ", ".join([*_FAMILIES, MULTIMODAL_GEMMA3])
        raise UnsupportedModelError(f"the architecture {architecture} is not supported; supported are {known}")
    return _decoder(settings, architecture, family, max_seq_len)


@dataclass(frozen=True)
class _Family:
    """What an architecture's class decides, as far as its config does not."""

    sliding: _PerLayer
    """Which layers attend to a window only."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Of transformers' config class, for keys that configs on the hub may lack."""
    qkv_bias: bool = False
    attention_bias: bool = False
    """Whether the key `attention_bias` switches biases of q, k, v and o on; `mlp_bias` likewise."""
    mlp_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    local_rope: bool = False
    """Sliding layers have a rope of their own."""
    partial_rotary: bool = False
    experts: Callable[[Settings], ExpertSpec] | None = None
    moe: _PerLayer = lambda settings, num_layers: [False] * num_layers
    """Which layers are mixtures of experts."""


def _decoder(settings: Settings, architecture: str, family: _Family, max_seq_len: int | None) -> DecoderSpec:
    hidden_size = settings.integer("hidden_size")
    num_heads = settings.integer("num_attention_heads", maximum=4096)
    num_kv_heads = settings.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise settings.bad("num_key_value_heads", f"a divisor of num_attention_heads, which is {num_heads}")
    head_dim = _head_dim(settings, hidden_size, num_heads)
    ropes = _ropes(settings, family, head_dim)
    max_positions = ropes[0].longest_sequence(max_seq_len)
    if max_seq_len is not None and max_seq_len > max_positions:
        raise UnsupportedModelError(
            f"sequences of {max_seq_len} tokens were asked for, but the model serves at most {max_positions}"
        )
    attention_bias = family.attention_bias and settings.flag("attention_bias")
    if settings.raw("use_bidirectional_attention"):
        raise settings.unsupported("use_bidirectional_attention", "attention must be causal")
    gemma = family.gemma
    spec = DecoderSpec(
        architecture=architecture,
        vocab_size=settings.integer("vocab_size"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=settings.integer("intermediate_size"),
        layers=_layers(settings, family, max_positions),
        ropes=tuple(rope.spec(max_seq_len or max_positions) for rope in ropes),
        max_positions=max_positions,
        norm_eps=settings.number("rms_norm_eps", 1e-6),
        attention_scale=float(settings.number("query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
        activation=_activation(settings, family),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.mlp_bias and settings.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        sandwich_norms=gemma,
        norm_unit_offset=gemma,
        embedding_multiplier=_embedding_multiplier(settings, hidden_size) if gemma else 1.0,
        attention_softcap=settings.optional_number("attn_logit_softcapping") if gemma else None,
        final_softcap=settings.optional_number("final_logit_softcapping") if gemma else None,
        experts=family.experts(settings) if family.experts else None,
        tied_embeddings=settings.flag("tie_word_embeddings"),
    )
    settings.refuse_unasked(_IRRELEVANT, {**_IMPLIED, "use_qk_norm": family.qk_norm})
    return spec


def _architecture(settings: Settings) -> str:
    names = settings.raw("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise settings.bad("architectures", "a list with the name of one architecture")
    return names[0]


def _gemma3_text(settings: Settings) -> Settings:
    """The language model's part of the multimodal config, which inherits a few keys and states only what differs
    from its class's defaults."""
    inherited = {key: settings.raw(key) for key in ("dtype", "torch_dtype", "tie_word_embeddings")}
    defaults = {
        **_FAMILIES["Gemma3ForCausalLM"].defaults,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        **{key: value for key, value in inherited.items() if value is not None},
    }
    return Settings(settings.mapping("text_config"), "'text_config' of config.json", defaults)


def _head_dim(settings: Settings, hidden_size: int, num_heads: int) -> int:
    if settings.raw("head_dim") is None and hidden_size % num_heads:
        raise settings.bad("hidden_size", f"a multiple of num_attention_heads, which is {num_heads}")
    head_dim = settings.integer("head_dim", hidden_size // num_heads, maximum=4096)
    if head_dim % 2:
        raise settings.bad("head_dim", f"even, as rotary embeddings rotate pairs, but it is {head_dim}")
    return head_dim


def _activation(settings: Settings, family: _Family) -> Activation:
    key = "hidden_activation" if family.gemma else "hidden_act"
    activation = _ACTIVATIONS.get(settings.text(key))
    if activation is None:
        raise settings.unsupported(key, f"the activations known are {', '.join(_ACTIVATIONS)}")
    return activation


def _embedding_multiplier(settings: Settings, hidden_size: int) -> float:
    """√hidden_size as it was in training: rounded to the type of the embeddings."""
    root = np.float32(math.sqrt(hidden_size))
    dtype = settings.raw("dtype") or settings.raw("torch_dtype")
    if dtype == "bfloat16":
        return float(from_bfloat16(to_bfloat16(np.array([root])))[0])
    return float(np.float16(root) if dtype == "float16" else root)


# Layers


def _layers(settings: Settings, family: _Family, max_positions: int) -> tuple[LayerSpec, ...]:
    num_layers = settings.integer("num_hidden_layers", maximum=1024)
    sliding, moe = family.sliding(settings, num_layers), family.moe(settings, num_layers)
    window = settings.integer("sliding_window") if any(sliding) else None
    if window is not None and window >= max_positions:
        window = None
    return tuple(
        LayerSpec(window if slides else None, int(slides and family.local_rope), experts)
        for slides, experts in zip(sliding, moe, strict=True)
    )


def _no_sliding(settings: Settings, num_layers: int) -> list[bool]:
    return [False] * num_layers


def _all_slide(settings: Settings, num_layers: int) -> list[bool]:
    return [settings.raw("sliding_window") is not None] * num_layers


def _all_slide_if_used(settings: Settings, num_layers: int) -> list[bool]:
    slide = settings.flag("use_sliding_window")
    return [settings.raw("sliding_window") is not None and slide] * num_layers


def _upper_slide_if_used(settings: Settings, num_layers: int) -> list[bool]:
    first = settings.integer("max_window_layers", minimum=0)
    layers = _layer_types(settings, num_layers) or [index >= first for index in range(num_layers)]
    if _all_slide_if_used(settings, 1)[0]:
        return layers
    if settings.raw("layer_types") is not None and any(layers):
        raise settings.bad("use_sliding_window", "true, as 'layer_types' has sliding layers,")
    return [False] * num_layers


def _alternating(settings: Settings, num_layers: int) -> list[bool]:
    pattern = settings.integer("sliding_window_pattern")
    return _layer_types(settings, num_layers) or [(index + 1) % pattern != 0 for index in range(num_layers)]


def _layer_types(settings: Settings, num_layers: int) -> list[bool] | None:
    """Whether each layer slides, if the config lists that."""
    types = settings.raw("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers:
        raise settings.bad("layer_types", f"a list with an entry for each of {num_layers} layers")
    if any(kind not in ("full_attention", "sliding_attention") for kind in types):
        raise settings.unsupported("layer_types", "the types known are full_attention and sliding_attention")
    return [kind == "sliding_attention" for kind in types]


# Experts


def _mixtral_experts(settings: Settings) -> ExpertSpec:
    return _experts(settings, "num_local_experts", "intermediate_size", normalize=True)


def _qwen3_experts(settings: Settings) -> ExpertSpec:
    # transformers 5 writes the old key's value under the new one.
    key = "num_experts" if settings.raw("num_experts") is not None else "num_local_experts"
    return _experts(settings, key, "moe_intermediate_size", normalize=settings.flag("norm_topk_prob"))


def _experts(settings: Settings, count_key: str, size_key: str, *, normalize: bool) -> ExpertSpec:
    num_experts = settings.integer(count_key, maximum=4096)
    top_k = settings.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise settings.bad("num_experts_per_tok", f"at most {count_key}, which is {num_experts}")
    return ExpertSpec(num_experts, top_k, settings.integer(size_key), normalize)


def _qwen3_moe_layers(settings: Settings, num_layers: int) -> list[bool]:
    step = settings.integer("decoder_sparse_step")
    dense = settings.raw("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
        raise settings.bad("mlp_only_layers", "a list of layer numbers")
    return [index not in dense and (index + 1) % step == 0 for index in range(num_layers)]


# Ropes


def _ropes(settings: Settings, family: _Family, head_dim: int) -> list[RopeParameters]:
    """The rope of the full layers and, where the family has one, that of the sliding layers."""
    flat, nested = settings.mapping("rope_scaling"), settings.mapping("rope_parameters")
    theta = settings.raw("rope_theta")
    if not family.local_rope:
        return [_rope(settings, family, {"rope_theta": theta, **(flat or nested)}, head_dim)]
    if not nested.keys() & {"full_attention", "sliding_attention"}:
        flat, nested = flat or nested, {}
    full = {"rope_theta": theta, **(nested.get("full_attention") or {}), **flat}
    local = {"rope_theta": settings.raw("rope_local_base_freq"), **(nested.get("sliding_attention") or {})}
    return [_rope(settings, family, parameters, head_dim) for parameters in (full, local)]


def _rope(settings: Settings, family: _Family, stated: dict[str, Any], head_dim: int) -> RopeParameters:
    parameters = Settings(stated, "the rope parameters of config.json")
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if family.partial_rotary and kind in ("su", "yarn"):
        kind = "longrope"  # early names of it, in Phi-3 only
    if kind not in _ROPE_KINDS:
        raise UnsupportedModelError(f"the rope type '{kind}' is not supported; supported are {', '.join(_ROPE_KINDS)}")
    original = settings.raw("original_max_position_embeddings")
    if original is not None:
        stated = {**stated, "original_max_position_embeddings": original}
    return RopeParameters(
        Settings(stated, "the rope parameters of config.json"),
        _ROPE_KINDS[kind],
        _rotary_dim(settings, family, parameters, head_dim),
        settings.integer("max_position_embeddings"),
    )


def _rotary_dim(settings: Settings, family: _Family, parameters: Settings, head_dim: int) -> int:
    outer = settings.number("partial_rotary_factor", 1.0)
    source = settings if parameters.raw("partial_rotary_factor") is None else parameters
    fraction = source.number("partial_rotary_factor", outer)
    if fraction != 1 and not family.partial_rotary:
        raise source.unsupported("partial_rotary_factor", "this architecture rotates whole heads")
    rotary_dim = int(head_dim * fraction)
    if fraction > 1 or rotary_dim == 0 or rotary_dim % 2:
        raise source.bad("partial_rotary_factor", f"a part of head_dim = {head_dim} that is even")
    return rotary_dim


_ROPE_KINDS: dict[str, RopeKind] = {
    "default": "default",
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

_BASE = {"hidden_act": "silu", "rope_theta": 10000.0}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
_QWEN = {**_BASE, "sliding_window": 4096, "max_window_layers": 28}

_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(_no_sliding, _BASE, attention_bias=True, mlp_bias=True),
    "MistralForCausalLM": _Family(_all_slide, {**_BASE, "sliding_window": 4096}),
    "Qwen2ForCausalLM": _Family(_upper_slide_if_used, _QWEN, qkv_bias=True),
    "Qwen3ForCausalLM": _Family(_upper_slide_if_used, {**_QWEN, "head_dim": 128}, attention_bias=True, qk_norm=True),
    "MixtralForCausalLM": _Family(
        _all_slide,
        {**_BASE, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5},
        experts=_mixtral_experts,
        moe=lambda settings, num_layers: [True] * num_layers,
    ),
    "Qwen3MoeForCausalLM": _Family(
        _all_slide_if_used,
        {**_BASE, "sliding_window": 4096, "decoder_sparse_step": 1},
        attention_bias=True,
        qk_norm=True,
        experts=_qwen3_experts,
        moe=_qwen3_moe_layers,
    ),
    "Gemma2ForCausalLM": _Family(
        _alternating,
        {**_GEMMA, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        attention_bias=True,
        gemma=True,
    ),
    "Gemma3ForCausalLM": _Family(
        _alternating,
        {**_GEMMA, "sliding_window_pattern": 6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
        attention_bias=True,
        qk_norm=True,
        gemma=True,
        local_rope=True,
    ),
    "Phi3ForCausalLM": _Family(_all_slide, {**_BASE, "rms_norm_eps": 1e-5}, partial_rotary=True),
}

_IRRELEVANT = frozenset(
    """
    architectures model_type dtype torch_dtype transformers_version transformers.js_config auto_map name_or_path
    unsloth_version unsloth_fixed id2label label2id num_labels task_specific_params problem_type finetuning_task
    torchscript chunk_size_feed_forward pruned_heads attn_implementation language quantization_config

    initializer_range attention_dropout resid_pdrop embd_pdrop hidden_dropout router_aux_loss_coef router_jitter_noise
    neftune_noise_alpha output_router_logits pretraining_tp gradient_checkpointing

    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class prefix
    max_length min_length do_sample temperature top_k top_p typical_p num_beams num_beam_groups diversity_penalty
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids early_stopping
    num_return_sequences forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
    exponential_decay_length_penalty remove_invalid_values return_dict return_dict_in_generate output_scores
    output_attentions output_hidden_states use_cache cache_implementation max_sequence_length model_max_length

    original_max_position_embeddings max_window_layers hidden_act sliding_window_size
    """.split()  # noqa: SIM905
)
"""Keys that do not change what a model computes: about the file, about training, about generation; and keys that
some classes have but do not use."""

_IMPLIED = {
    "is_llama_config": True,
    "activation": "swiglu",
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "shared_expert_intermediate_size": 0,
}
"""Keys that no class reads, with the value at which they describe what the class does anyway. Seen in SmolLM2,
Falcon 3, Phi-4-mini and Qwen3-Coder."""
