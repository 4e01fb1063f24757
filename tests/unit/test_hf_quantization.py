"""`quantization_config` as the tools write it whose models lie on the hub."""

from typing import Any

import pytest

from farrier.targets.errors import FarrierError
from farrier.targets.hf_formats import Awq, Format, Gptq, PackedRows, Scaled
from farrier.targets.hf_quantization import source_format

AUTOAWQ = {
    "bits": 4,
    "group_size": 128,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
AUTOGPTQ = {
    "batch_size": 1,
    "bits": 4,
    "block_name_to_quantize": None,
    "cache_block_outputs": True,
    "damp_percent": 0.01,
    "dataset": None,
    "desc_act": False,
    "exllama_config": {"version": 1},
    "group_size": 128,
    "max_input_length": None,
    "model_seqlen": None,
    "module_name_preceding_first_block": None,
    "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]],
    "pad_token_id": None,
    "quant_method": "gptq",
    "sym": True,
    "tokenizer": None,
    "true_sequential": True,
    "use_cuda_fp16": False,
    "use_exllama": True,
}
GPTQMODEL = {
    "act_group_aware": True,
    "backend": "auto",
    "bits": 8,
    "checkpoint_format": "gptq_v2",
    "damp_percent": 0.1,
    "desc_act": False,
    "dynamic": {"-:.*mlp\\.gate.*": {}},
    "format": "gptq_v2",
    "group_size": -1,
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:6.0.3"]},
    "pack_dtype": "int32",
    "quant_method": "gptq",
    "sym": False,
}
FINE_GRAINED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head"],
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
PER_TENSOR = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"}


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    defaults = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "channel",
        "symmetric": True,
        "type": "float",
    }
    activations = {**defaults, "dynamic": True, "strategy": "token", "observer": None}
    group = {"weights": {**defaults, **weights}, "targets": ["Linear"], "input_activations": activations}
    return {
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "format": layout,
        "global_compression_ratio": 1.24,
        "ignore": ["lm_head", "re:.*gate$"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AUTOAWQ, Awq(128)),
        (AUTOGPTQ, Gptq(4, 128, symmetric=True, zero_offset=1)),
        (GPTQMODEL, Gptq(8, None, symmetric=False, zero_offset=0)),
        (FINE_GRAINED, Scaled("fp8", ("weight_scale_inv", "weight_scale"), (128, 128))),
        (PER_TENSOR, Scaled("fp8", ("weight_scale", "weight_scale_inv"), None)),
        (compressed("float-quantized"), Scaled("fp8", ("weight_scale",), None)),
        (
            compressed("float-quantized", strategy="block", block_structure=[128, 64]),
            Scaled("fp8", ("weight_scale",), (128, 64)),
        ),
        (compressed("int-quantized", type="int"), Scaled("int8", ("weight_scale",), None)),
        (
            compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=32, actorder="static"),
            PackedRows(4, 32, symmetric=True),
        ),
        (compressed("pack-quantized", type="int", symmetric=False), PackedRows(8, None, symmetric=False)),
    ],
)
def test_what_lies_on_the_hub(config: dict[str, Any], expected: Format) -> None:
    assert source_format({"quantization_config": config}) == expected
    assert source_format({"text_config": {"quantization_config": config}}) == expected


def test_models_that_are_not_quantized() -> None:
    assert source_format({}) is None
    assert source_format({"text_config": {}, "quantization_config": None}) is None


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ([], "quantization_config"),
        ({**AUTOAWQ, "backend": "llm-awq"}, "llm-awq"),
        ({**AUTOGPTQ, "bits": True}, "'bits' = true"),
        ({**GPTQMODEL, "checkpoint_format": "gptq"}, "'format' = \"gptq_v2\".*contradicts"),
        ({**GPTQMODEL, "dynamic": {".*down.*": {"bits": 8}}}, "dynamic"),
        ({**FINE_GRAINED, "weight_block_size": [128, 0]}, "weight_block_size"),
        (compressed("pack-quantized", type="int", strategy="group", group_size=128, actorder="group"), "actorder"),
        (compressed("float-quantized", strategy="block", block_structure=[128]), "block_structure"),
        (compressed("float-quantized", num_bits=4), "num_bits"),
        (compressed("float-quantized", rotated=True), "rotated"),
        ({**compressed("float-quantized"), "quantization_status": "frozen"}, "frozen"),
    ],
)
def test_what_is_refused_by_name(config: Any, named: str) -> None:
    with pytest.raises(FarrierError, match=named):
        source_format({"quantization_config": config})
