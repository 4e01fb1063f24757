"""Where a Hugging Face model's files keep each canonical weight."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from farrier.targets.decoder import DecoderSpec
from farrier.targets.errors import CheckpointError
from farrier.targets.hf_config import MULTIMODAL_GEMMA3
from farrier.targets.hf_formats import Format
from farrier.targets.hf_source import Candidate, Source
from farrier.targets.safetensors_file import TensorInfo, read_bytes, read_header

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
_SCALES_NOT_OF_WEIGHTS = (
    *(".input_scale", ".input_zero_point", ".activation_scale", ".output_scale", ".weight_shape"),
    *(".q_scale", ".k_scale", ".v_scale", ".kv_scale"),
)
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a model, in order of name. Raises CheckpointError when there are none, or not all."""
    if (model_dir / _SINGLE).is_file():
        return [model_dir / _SINGLE]
    if (model_dir / _INDEX).is_file():
        files = [model_dir / name for name in sorted(set(_weight_map(model_dir).values()))]
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"the shard {file.name} that {_INDEX} names is missing in {model_dir}")
        return files
    if any(model_dir.glob("*.bin")) or any(model_dir.glob("*.pt")) or any(model_dir.glob("*.pth")):
        raise CheckpointError(
            f"{model_dir} holds PyTorch pickles only, which can run code when read; save the model as safetensors"
        )
    raise CheckpointError(f"{model_dir} holds neither {_SINGLE} nor {_INDEX}")


def source_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """All tensors of a model by the names in its files. Raises CheckpointError."""
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(model_dir):
        for name, info in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"'{name}' is in two files, {tensors[name].path.name} and {path.name}")
            tensors[name] = info
    if not (model_dir / _SINGLE).is_file():
        for name, file in _weight_map(model_dir).items():
            if name not in tensors:
                raise CheckpointError(f"'{name}' is not in {file}, where {_INDEX} says it is")
    return tensors


def map_weights(
    spec: DecoderSpec, tensors: Mapping[str, TensorInfo], quantized: Format | None = None
) -> dict[str, Source]:
    """Canonical name → source, for every weight of `spec`; with tied embeddings also `lm_head.weight`.

    `quantized`: how those matrices are stored that are quantized.
    Where a model that ties its embeddings stores both, `lm_head.weight` maps to the one stored for it.
    Raises CheckpointError naming the first tensor that is missing, has another shape, or is not called for.
    """
    prefix = next((prefix for prefix in _PREFIXES if prefix + "embed_tokens.weight" in tensors), "model.")
    used: set[str] = set()
    sources: dict[str, Source] = {}
    shapes = spec.tensors()
    for name, shape in shapes.items():
        candidates = list(_candidates(spec, prefix, name, shape))
        found = _first(candidates, tensors, shape[0], quantized)
        if found is None:
            raise CheckpointError(f"the model lacks the tensor '{candidates[0].name}' of shape {list(shape)}")
        sources[name] = found[0]
        used |= found[1]
    if spec.tied_embeddings:
        sources["lm_head.weight"] = sources["embed.weight"]
        shape = shapes["embed.weight"]
        for candidate in _candidates(spec, prefix, "lm_head.weight", shape):
            found = candidate.find(tensors, shape[0], quantized)
            if found is not None:
                sources["lm_head.weight"] = found[0]
                used |= found[1]
    unused = [name for name in tensors if name not in used and not _ignorable(spec, name, tensors, quantized)]
    if unused:
        more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise CheckpointError(
            f"the model holds the tensor '{unused[0]}'{more}, which its config.json does not call for"
        )
    return sources


def _first(
    candidates: list[Candidate], tensors: Mapping[str, TensorInfo], rows: int, quantized: Format | None
) -> tuple[Source, set[str]] | None:
    found = (candidate.find(tensors, rows, quantized) for candidate in candidates)
    return next((one for one in found if one is not None), None)


def _candidates(spec: DecoderSpec, prefix: str, name: str, shape: tuple[int, ...]) -> Iterator[Candidate]:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        for outer in _OUTER_NAMES[name]:
            yield Candidate(outer.format(prefix=prefix), shape)
        return
    index, expert, part, kind = match.groups()
    inner = _in_layer(spec, part, kind, shape) if expert is None else _in_expert(spec, int(expert), part, kind, shape)
    for candidate in inner:
        yield Candidate(f"{prefix}layers.{index}.{candidate.name}", candidate.shape, candidate.first_row)


def _in_layer(spec: DecoderSpec, part: str, kind: str, shape: tuple[int, ...]) -> Iterator[Candidate]:
    # In Gemma the name that others give to the MLP's norm is that of the attention's second one.
    modules = _MODULES | ({"mlp_norm": ("pre_feedforward_layernorm",)} if spec.sandwich_norms else {})
    for module in modules[part]:
        yield Candidate(f"{module}.{kind}", shape)
    if part in ("q", "k", "v"):
        fused = (spec.q_size + 2 * spec.kv_size, *shape[1:])
        first_row = {"q": 0, "k": spec.q_size, "v": spec.q_size + spec.kv_size}[part]
        yield Candidate(f"self_attn.qkv_proj.{kind}", fused, first_row)
    if part in ("gate", "up"):
        yield Candidate(f"mlp.gate_up_proj.{kind}", (2 * shape[0], *shape[1:]), shape[0] if part == "up" else 0)


def _in_expert(spec: DecoderSpec, expert: int, part: str, kind: str, shape: tuple[int, ...]) -> Iterator[Candidate]:
    assert spec.experts is not None
    rows, columns = shape
    yield Candidate(f"mlp.experts.{expert}.{part}_proj.{kind}", shape)
    yield Candidate(f"block_sparse_moe.experts.{expert}.{_MIXTRAL_NAMES[part]}.{kind}", shape)
    if part == "down":
        yield Candidate("mlp.experts.down_proj", (spec.experts.num_experts, rows, columns), expert * rows)
    else:
        first_row = (2 * expert + (part == "up")) * rows
        yield Candidate("mlp.experts.gate_up_proj", (spec.experts.num_experts, 2 * rows, columns), first_row)


_LAYER_NAME = re.compile(r"layers\.(\d+)\.(?:experts\.(\d+)\.)?(\w+)\.(weight|bias)")
_OUTER_NAMES = {
    "embed.weight": ("{prefix}embed_tokens.weight",),
    "final_norm.weight": ("{prefix}norm.weight",),
    "lm_head.weight": ("lm_head.weight", "language_model.lm_head.weight"),
}
_MODULES = {
    "attn_norm": ("input_layernorm",),
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "o": ("self_attn.o_proj",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "mlp_norm": ("post_attention_layernorm",),
    "attn_post_norm": ("post_attention_layernorm",),
    "mlp_post_norm": ("post_feedforward_layernorm",),
    "router": ("mlp.gate", "block_sparse_moe.gate"),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj",),
    "down": ("mlp.down_proj",),
}
_MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}


def _ignorable(spec: DecoderSpec, name: str, tensors: Mapping[str, TensorInfo], quantized: Format | None) -> bool:
    """Tables that old checkpoints store although they follow from the config, the parts that see, and what quantized
    models hold besides their weights: scales of activations and of the KV cache, and biases that are all zero."""
    if spec.architecture == MULTIMODAL_GEMMA3 and name.startswith(_VISION):
        return True
    if quantized is not None:
        if name.endswith(_SCALES_NOT_OF_WEIGHTS):
            return True
        if name.endswith(".bias") and name.removesuffix("bias") + quantized.marker[0] in tensors:
            return not any(read_bytes(tensors[name]))
    return name.endswith((".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"))


def _weight_map(model_dir: Path) -> dict[str, str]:
    """Tensor → file name, as the index says."""
    path = model_dir / _INDEX
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names or not all(_is_file_name(name) for name in names.values()):
        raise CheckpointError(f"'weight_map' in {path} must map tensors to file names beside it")
    return names


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON") from error
