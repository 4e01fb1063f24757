"""Small Llamas quantized and packed as the tools do whose models lie on the hub, by their formats' definitions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from farrier.targets.bfloat16 import from_bfloat16, to_bfloat16
from farrier.targets.float8 import from_float8, to_float8
from farrier.targets.safetensors_file import SafetensorsWriter

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Tensors = dict[str, tuple[str, Array]]
"""Name → safetensors dtype and the stored array."""
Packer = Callable[[Float32], tuple[Tensors, Float32]]
"""A matrix `[N, K]` → its tensors by suffix, and the numbers that they stand for."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours stands in each nibble of a word, from the lowest."""


def save_quantized(
    source: Path, folder: Path, config: dict[str, Any], pack: Packer, *, also: tuple[str, ...] = ()
) -> dict[str, Float32]:
    """Saves the f32 model in `source` to `folder` with the matrices of its layers, and `also` those of these modules,
    packed. Returns the weights by their names in `source`, with the numbers that the packed ones stand for."""
    folder.mkdir(parents=True)
    stated = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, "quantization_config": config}))
    tensors: Tensors = {}
    meant: dict[str, Float32] = {}
    for name, values in load_file(source / "model.safetensors").items():
        if "_proj" in name or ".experts." in name or name.removesuffix(".weight") in also:
            parts, numbers = pack(values)
            meant[name] = np.ascontiguousarray(numbers)
            tensors |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
        else:
            half = values.astype(np.float16)
            tensors[name], meant[name] = ("F16", half), half.astype(np.float32)
    save(folder / "model.safetensors", tensors)
    return meant


def save(path: Path, tensors: Tensors) -> None:
    with SafetensorsWriter(path, {name: (dtype, array.shape) for name, (dtype, array) in tensors.items()}) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, 0, np.ascontiguousarray(array))


def integers(values: Float32, bits: int, group: int, symmetric: bool) -> tuple[Array, Array, Array, Float32]:
    """Unsigned numbers `[N, K]`, f16 scales and zero points `[N, G]`, and the values they stand for."""
    rows, columns = values.shape
    groups = values.reshape(rows, columns // group, group)
    largest = (1 << bits) - 1
    if symmetric:
        scale = (np.abs(groups).max(axis=2) * 2 / largest).astype(np.float16)
        zero = np.full(scale.shape, 1 << (bits - 1))
    else:
        low, high = np.minimum(groups.min(axis=2), 0), np.maximum(groups.max(axis=2), 0)
        scale = ((high - low) / largest).astype(np.float16)
        zero = np.clip(np.rint(-low / scale), 0, largest).astype(int)
    wide = scale.astype(np.float32)[:, :, None]
    numbers = np.clip(np.rint(groups / wide) + zero[:, :, None], 0, largest).astype(int)
    meant = (wide * (numbers - zero[:, :, None])).reshape(rows, columns)
    return numbers.reshape(rows, columns), scale, zero, meant.astype(np.float32)


def words(numbers: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Array:
    """int32 words of 32 / bits neighbours along an axis."""
    count = 32 // bits
    moved = np.moveaxis(numbers.astype(np.uint32), axis, -1)
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % count)])
    packed = np.zeros((*moved.shape[:-1], moved.shape[-1] // count), np.uint32)
    for place, neighbour in enumerate(order or range(count)):
        packed |= moved[..., neighbour::count] << np.uint32(bits * place)
    return np.moveaxis(packed, -1, axis).view(np.int32)


def awq(group: int = 128) -> tuple[dict[str, Any], Packer]:
    def pack(values: Float32) -> tuple[Tensors, Float32]:
        numbers, scale, zero, meant = integers(values, 4, _width(values, group), symmetric=False)
        tensors: Tensors = {
            "qweight": ("I32", words(numbers.T, 4, 1, AWQ_ORDER)),
            "qzeros": ("I32", words(zero.T, 4, 1, AWQ_ORDER)),
            "scales": ("F16", scale.T),
        }
        return tensors, meant

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return {**config, "modules_to_not_convert": ["lm_head"]}, pack


def gptq(
    bits: int = 4, group: int = 128, *, symmetric: bool = True, layout: str = "gptq", shuffled: bool = False
) -> tuple[dict[str, Any], Packer]:
    """`shuffled`: the columns of a group do not stand side by side."""

    def pack(values: Float32) -> tuple[Tensors, Float32]:
        width, columns = _width(values, group), values.shape[1]
        order = np.random.default_rng(columns).permutation(columns) if shuffled else np.arange(columns)
        numbers, scale, zero, meant = integers(values[:, order], bits, width, symmetric)
        back = np.argsort(order)
        stored_zero = (zero - (layout == "gptq")) & ((1 << bits) - 1)
        tensors: Tensors = {
            "qweight": ("I32", words(numbers[:, back].T, bits, 0)),
            "qzeros": ("I32", words(stored_zero.T, bits, 1)),
            "scales": ("F16", scale.T),
            "g_idx": ("I32", (back // width).astype(np.int32)),
        }
        return tensors, meant[:, back]

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": layout}
    return {**config, "desc_act": shuffled, "damp_percent": 0.01, "true_sequential": True}, pack


def compressed_integers(bits: int = 4, group: int = 128, *, symmetric: bool = True) -> tuple[dict[str, Any], Packer]:
    def pack(values: Float32) -> tuple[Tensors, Float32]:
        numbers, scale, zero, meant = integers(values, bits, _width(values, group), symmetric)
        tensors: Tensors = {
            "weight_packed": ("I32", words(numbers, bits, 1)),
            "weight_scale": ("F16", scale),
            "weight_shape": ("I64", np.array(values.shape, np.int64)),
        }
        return tensors | ({} if symmetric else {"weight_zero_point": ("I32", words(zero, bits, 0))}), meant

    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None, **strategy}
    return _compressed("pack-quantized", weights, None), pack


def fp8(strategy: str, *, compressed: bool = False, block: int = 128) -> tuple[dict[str, Any], Packer]:
    """`strategy`: tensor, channel or block."""

    def pack(values: Float32) -> tuple[Tensors, Float32]:
        rows, columns = values.shape
        if strategy == "block":
            blocks = (-(-rows // block), -(-columns // block))
            padded = np.pad(values, ((0, blocks[0] * block - rows), (0, blocks[1] * block - columns)))
            scale = np.abs(padded).reshape(blocks[0], block, blocks[1], block).max(axis=(1, 3)) / np.float32(448)
            full = np.repeat(np.repeat(scale, block, 0), block, 1)[:rows, :columns]
        else:
            scale = np.abs(values).max(axis=1 if strategy == "channel" else None, keepdims=True) / np.float32(448)
            full = scale = scale if strategy == "channel" else scale.reshape(1)
        stored = to_float8(values / full)
        tensors: Tensors = {"weight": ("F8_E4M3", stored), f"weight_scale{suffix}": ("F32", scale)}
        if not dynamic:
            tensors["input_scale"] = ("F32", np.ones((), np.float32))
        return tensors, from_float8(stored) * full

    dynamic = strategy != "tensor"
    suffix = "_inv" if strategy == "block" and not compressed else ""
    if compressed:
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
        weights |= {"block_structure": [block, block]} if strategy == "block" else {}
        return _compressed("float-quantized", weights, {"num_bits": 8, "type": "float", "dynamic": True}), pack
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic" if dynamic else "static"}
    return config | ({"weight_block_size": [block, block], "fmt": "e4m3"} if strategy == "block" else {}), pack


def compressed_int8() -> tuple[dict[str, Any], Packer]:
    def pack(values: Float32) -> tuple[Tensors, Float32]:
        bits = to_bfloat16(np.abs(values).max(axis=1, keepdims=True) / np.float32(127))
        scale = from_bfloat16(bits)
        stored = np.clip(np.rint(values / scale), -128, 127).astype(np.int8)
        return {"weight": ("I8", stored), "weight_scale": ("BF16", bits)}, stored * scale

    weights = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "channel"}
    return _compressed("int-quantized", weights, {"num_bits": 8, "type": "int", "dynamic": True}), pack


def _compressed(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def _width(values: Float32, group: int) -> int:
    return values.shape[1] if group == -1 else group
