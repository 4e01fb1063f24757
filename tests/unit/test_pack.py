"""What stands in an engine file, and in which order."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from farrier.targets.bfloat16 import to_bfloat16
from farrier.targets.decoder import DecoderSpec, ExpertSpec, LayerSpec, RopeSpec
from farrier.targets.errors import BuildError
from farrier.targets.openvino.pack import EXPERT_PARTS, write_engine_file
from farrier.targets.packing import Packed, packed_bytes, plan
from farrier.targets.quantize import pack_int4
from farrier.targets.tensorfile import Tensor, TensorFile


def spec(**changes: object) -> DecoderSpec:
    settings: dict[str, object] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 11,
        "hidden_size": 8,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "intermediate_size": 6,
        "layers": (LayerSpec(None, 0, False),),
        "ropes": (RopeSpec(4, (1.0, 0.1)),),
        "max_positions": 32,
        "norm_eps": 1e-5,
        "attention_scale": 0.5,
    }
    return DecoderSpec(**{**settings, **changes})


def random_tensors(decoder: DecoderSpec) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    return {name: Tensor("F32", rng.standard_normal(shape, np.float32)) for name, shape in decoder.tensors().items()}


def by_name(items: list[Packed]) -> dict[str, Packed]:
    return {item.name: item for item in items}


def value(item: Packed, tensors: Mapping[str, Tensor]) -> np.ndarray:
    return np.concatenate([chunk.reshape(-1) for chunk in item.chunks(tensors)]).reshape(item.shape)


def test_products_of_one_input_are_one_matrix() -> None:
    decoder = spec(qkv_bias=True)
    tensors = random_tensors(decoder)
    items = by_name(plan(decoder, tensors, EXPERT_PARTS))
    assert items["layers.0.qkv.weight"].shape == (16, 8)
    parts = [tensors[f"layers.0.{name}.weight"].array for name in ("q", "k", "v")]
    np.testing.assert_array_equal(value(items["layers.0.qkv.weight"], tensors), np.concatenate(parts))
    assert items["layers.0.qkv.bias"].shape == (16,)
    assert items["layers.0.gate_up.weight"].shape == (12, 8)
    assert not {"layers.0.q.weight", "layers.0.up.weight"} & items.keys()
    assert sum(np.prod(item.shape) for item in items.values()) == decoder.num_parameters()


def test_parts_of_different_precision_stay_apart() -> None:
    decoder = spec()
    tensors = random_tensors(decoder)
    k = tensors["layers.0.k.weight"]
    tensors["layers.0.k.weight"] = Tensor("BF16", to_bfloat16(k.array))
    items = by_name(plan(decoder, tensors, EXPERT_PARTS))
    assert {f"layers.0.{name}.weight" for name in ("q", "k", "v")} <= items.keys()
    assert items["layers.0.k.weight"].dtype == "BF16"
    assert "layers.0.gate_up.weight" in items


def test_scales_go_with_their_rows() -> None:
    decoder = spec()
    tensors = random_tensors(decoder)
    for name in ("gate", "up"):
        tensors[f"layers.0.{name}.weight"] = Tensor("I8", np.full((6, 8), 3, np.int8))
        tensors[f"layers.0.{name}.scale"] = Tensor("F32", np.full(6, {"gate": 1.0, "up": 2.0}[name], np.float32))
    items = by_name(plan(decoder, tensors, EXPERT_PARTS))
    assert items["layers.0.gate_up.weight"].dtype == "I8"
    assert value(items["layers.0.gate_up.scale"], tensors).tolist() == [1.0] * 6 + [2.0] * 6


def test_zero_points_go_with_their_rows_and_stay_apart_from_parts_without() -> None:
    decoder = spec()
    tensors = random_tensors(decoder)
    for name in ("q", "k", "v", "gate", "up"):
        rows = tensors[f"layers.0.{name}.weight"].shape[0]
        tensors[f"layers.0.{name}.weight"] = Tensor("U8", np.zeros((rows, 4), np.uint8))
        tensors[f"layers.0.{name}.scale"] = Tensor("F32", np.ones((rows, 2), np.float32))
        if name != "k":
            tensors[f"layers.0.{name}.zero"] = Tensor("I8", np.full((rows, 2), rows, np.int8))
    items = by_name(plan(decoder, tensors, EXPERT_PARTS))
    assert items["layers.0.gate_up.zero"].dtype == "I8"
    assert value(items["layers.0.gate_up.zero"], tensors).tolist() == [[6, 6]] * 12
    assert {"layers.0.q.zero", "layers.0.v.zero", "layers.0.k.weight"} <= items.keys()
    assert not {"layers.0.k.zero", "layers.0.qkv.weight"} & items.keys()


def test_norms_get_their_offset_and_become_f32() -> None:
    decoder = spec(norm_unit_offset=True, sandwich_norms=True, qk_norm=True)
    tensors = random_tensors(decoder)
    original = tensors["final_norm.weight"].array.copy()
    tensors["layers.0.q_norm.weight"] = Tensor("BF16", to_bfloat16(np.full(4, 0.5, np.float32)))
    items = by_name(plan(decoder, tensors, EXPERT_PARTS))
    np.testing.assert_array_equal(value(items["final_norm.weight"], tensors), original + 1)
    assert items["layers.0.q_norm.weight"].dtype == "F32"
    assert value(items["layers.0.q_norm.weight"], tensors).tolist() == [1.5] * 4
    assert items["layers.0.mlp_post_norm.weight"].offset == 1.0


def test_experts_are_stacked() -> None:
    decoder = spec(layers=(LayerSpec(None, 0, True),), experts=ExpertSpec(3, 2, 6, True))
    tensors = random_tensors(decoder)
    items = by_name(plan(decoder, tensors, EXPERT_PARTS))
    assert items["layers.0.experts.down.weight"].shape == (3, 8, 6)
    expected = np.stack([tensors[f"layers.0.experts.{e}.down.weight"].array for e in range(3)])
    np.testing.assert_array_equal(value(items["layers.0.experts.down.weight"], tensors), expected)
    tensors["layers.0.experts.1.up.weight"] = Tensor("BF16", np.zeros((6, 8), np.uint16))
    with pytest.raises(BuildError, match="experts of layer 0"):
        plan(decoder, tensors, EXPERT_PARTS)


def test_file_holds_what_was_planned(tmp_path) -> None:
    decoder = spec(norm_unit_offset=True)
    tensors = random_tensors(decoder)
    items = plan(decoder, tensors, EXPERT_PARTS)
    reported: list[tuple[int, int]] = []
    write_engine_file(tmp_path / "engine", items, tensors, lambda done, total: reported.append((done, total)))
    assert reported[-1] == (packed_bytes(items), packed_bytes(items))
    file = TensorFile.open(tmp_path / "engine")
    for item in items:
        np.testing.assert_array_equal(file.tensors[item.name].array, value(item, tensors))
    file.close()


def test_int4_is_stored_as_each_backend_reads_it(tmp_path: Path) -> None:
    levels = np.arange(-8, 8, dtype=np.int8).reshape(1, 16)
    stored = pack_int4(levels.view(np.uint8))
    item, tensors = Packed("w.weight", "U8", stored.shape, ("w.weight",)), {"w.weight": Tensor("U8", stored)}
    write_engine_file(tmp_path / "engine", [item], tensors, None)
    with closing(TensorFile.open(tmp_path / "engine")) as file:
        on_cpu = file.tensors["w.weight"].array.copy()
    np.testing.assert_array_equal(np.stack([on_cpu & 15, on_cpu >> 4], -1).reshape(1, 16), levels + 8)
    pytest.importorskip("triton")
    from farrier.plugins import gemv
    from farrier.targets.cuda.pack import Item, item_values

    on_gpu = item_values(Item(item.name, item.dtype, item.shape, item), tensors)
    np.testing.assert_array_equal(on_gpu, gemv.pack_int4(levels))
