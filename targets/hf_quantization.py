"""The `quantization_config` of a Hugging Face model → how its matrices are stored.

Which matrices are quantized is not asked here: their tensors show it. Scales for activations are no part of it, as
engines do not quantize activations, or find the scales at run time.
"""

from typing import Any

from farrier.targets.errors import UnsupportedModelError
from farrier.targets.hf_formats import Awq, Format, Gptq, PackedRows, Scaled
from farrier.targets.hf_settings import Settings

_WHERE = "'quantization_config' of config.json"


def source_format(config: dict[str, Any]) -> Format | None:
    """How the quantized matrices of the model with this `config.json` are stored; None when none are quantized.

    Raises UnsupportedModelError naming what is not supported, CheckpointError naming what makes no sense.
    """
    stated, text = config.get("quantization_config"), config.get("text_config")
    if stated is None and isinstance(text, dict):
        stated = text.get("quantization_config")
    if stated is None:
        return None
    settings = Settings(stated, _WHERE)
    method = settings.text("quant_method").lower()
    reader = {"awq": _awq, "gptq": _gptq, "fp8": _fp8, "compressed-tensors": _compressed}.get(method)
    if reader is None:
        raise UnsupportedModelError(
            f"the weights are quantized with '{method}' ({_WHERE}), which is not supported; take the model in AWQ,"
            " GPTQ, fp8 or compressed-tensors, or unquantized, to be quantized with --precision"
        )
    found = reader(settings)
    settings.refuse_unasked(_IRRELEVANT)
    return found


def _awq(settings: Settings) -> Format:
    _one_of(settings, "bits", (4,), "AWQ packs 4 bits")
    _one_of(settings, "backend", (None, "auto", "autoawq"), "only AutoAWQ's layout is known")
    for key in ("version", "format", "checkpoint_format"):
        if str(settings.raw(key) or "gemm").lower() != "gemm":
            raise settings.unsupported(key, "the layout known is gemm; take the model in that one")
    _one_of(settings, "zero_point", (None, True), "AWQ without zero points is not known; take the model with them")
    _one_of(settings, "desc_act", (None, False), "columns must stand in their order")
    return Awq(_group(settings))


def _gptq(settings: Settings) -> Format:
    bits = _one_of(settings, "bits", (4, 8), "farrier reads 4 and 8 bits; take the model in one of them")
    key = "checkpoint_format" if settings.raw("checkpoint_format") is not None else "format"
    layout = _one_of(
        settings,
        key,
        (None, "gptq", "gptq_v2"),
        "the layouts known are gptq and gptq_v2; take the model in one of them",
    )
    _one_of(settings, "format", (None, layout), "it contradicts checkpoint_format")
    _one_of(settings, "is_marlin_format", (None, False), "take the model in the layout gptq")
    dynamic = settings.mapping("dynamic")
    if not all(pattern.startswith("-:") for pattern in dynamic):
        raise settings.unsupported("dynamic", "all quantized matrices must be quantized alike")
    return Gptq(bits, _group(settings), settings.flag("sym"), 0 if layout == "gptq_v2" else 1)


def _fp8(settings: Settings) -> Format:
    _one_of(settings, "fmt", (None, "e4m3", "float8_e4m3fn"), "the type must be e4m3")
    block = settings.raw("weight_block_size")
    if block is None:
        return Scaled("fp8", ("weight_scale", "weight_scale_inv"), None)
    return Scaled("fp8", ("weight_scale_inv", "weight_scale"), _block(settings, block))


def _compressed(settings: Settings) -> Format:
    _one_of(settings, "quantization_status", (None, "compressed"), "the weights must be stored compressed")
    for key in ("sparsity_config", "transform_config"):
        if settings.mapping(key).get("format") != "dense" and settings.mapping(key):
            raise settings.unsupported(key, "sparse or transformed weights are not known; take the model without")
    groups = settings.mapping("config_groups")
    if len(groups) != 1:
        raise settings.unsupported("config_groups", "all quantized matrices must be quantized alike, in one group")
    group = Settings(next(iter(groups.values())), f"the config group in {_WHERE}")
    weights = Settings(group.mapping("weights"), f"the 'weights' in {_WHERE}")
    layout = settings.text("format")
    _one_of(group, "format", (None, layout), "it contradicts the format of the whole")
    _one_of(weights, "dynamic", (None, False), "weights must be quantized")
    kind = weights.text("type", "int")
    strategy = weights.text("strategy")
    found: Format
    if layout in ("float-quantized", "int-quantized", "naive-quantized"):
        _one_of(weights, "num_bits", (8,), "farrier reads 8 bits in this format")
        _one_of(weights, "type", (None, "float", "int"), "the types known are float and int")
        _one_of(weights, "symmetric", (None, True), "zero points are not known in this format")
        _one_of(weights, "strategy", ("tensor", "channel", "block"), "farrier reads tensor, channel and block")
        block = _block(weights, weights.raw("block_structure")) if strategy == "block" else None
        found = Scaled("fp8" if kind == "float" else "int8", ("weight_scale",), block)
    elif layout == "pack-quantized":
        bits = _one_of(weights, "num_bits", (4, 8), "farrier reads 4 and 8 bits")
        _one_of(weights, "type", (None, "int"), "farrier reads integers in this format")
        _one_of(weights, "strategy", ("group", "channel"), "farrier reads group and channel")
        _one_of(weights, "actorder", (None, False, "weight", "static"), "columns must stand in their order")
        found = PackedRows(
            bits,
            _group(weights) if strategy == "group" else None,
            weights.raw("symmetric") is None or weights.flag("symmetric"),
        )
    else:
        known = "float-quantized, int-quantized, naive-quantized and pack-quantized"
        raise settings.unsupported("format", f"the formats known are {known}")
    weights.refuse_unasked(_IRRELEVANT)
    group.refuse_unasked(_IRRELEVANT)
    return found


def _group(settings: Settings) -> int | None:
    """Columns in a group; None for -1, which means all."""
    size = settings.integer("group_size", minimum=-1)
    if size == 0:
        raise settings.bad("group_size", "-1, for one group, or a positive integer")
    return None if size == -1 else size


def _block(settings: Settings, stated: Any) -> tuple[int, int]:
    valid = isinstance(stated, list) and len(stated) == 2 and all(type(size) is int and size > 0 for size in stated)
    if not valid:
        key = "weight_block_size" if settings.raw("block_structure") is None else "block_structure"
        raise settings.bad(key, "a list of rows and columns, both positive integers")
    return stated[0], stated[1]


def _one_of(settings: Settings, key: str, known: tuple[Any, ...], why: str) -> Any:
    value = settings.raw(key)
    if value not in known or (isinstance(value, bool) and not any(value is one for one in known)):
        raise settings.unsupported(key, why)
    return value


_IRRELEVANT = frozenset(
    """
    quant_method modules_to_not_convert ignored_layers ignore targets lm_head meta version quantizer
    modules_to_fuse do_fuse fuse_max_seq_len exllama_config use_exllama disable_exllama use_cuda_fp16 max_input_length
    desc_act static_groups true_sequential act_group_aware damp_percent damp_auto_increment mse dataset tokenizer
    batch_size block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize model_seqlen
    cache_block_outputs pad_token_id model_name_or_path model_file_base_name pack_dtype backend method
    activation_scheme scale_fmt kv_cache_scheme kv_cache_quant_method
    global_compression_ratio quantization_status input_activations output_activations observer observer_kwargs
    scale_dtype zp_dtype group_size block_structure
    """.split()  # noqa: SIM905
)
"""Keys that do not change what the weights are: what was left out, how the quantization went, what runs it elsewhere,
and how activations and the KV cache are quantized, which the build decides."""
