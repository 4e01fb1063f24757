"""Hugging Face model directory → unified checkpoint, streamed: at most one packed tensor is ever whole in memory."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from farrier.targets.checkpoint import (
    CONFIG,
    CONFIG_FILE,
    FLOATS,
    FORMAT_VERSION,
    TOKENIZER_DIR,
    WEIGHTS_FILE,
    CheckpointConfig,
    CheckpointReader,
    Parallelism,
    scale_name,
    stored_tensors,
    zero_name,
)
from farrier.targets.decoder import DecoderSpec, is_projection
from farrier.targets.digest import file_digest
from farrier.targets.errors import BuildError, CheckpointError, UnsupportedModelError
from farrier.targets.hf_config import from_hf_config
from farrier.targets.hf_quantization import source_format
from farrier.targets.hf_source import QuantizedRows, Source, SourceRows
from farrier.targets.hf_weights import map_weights, read_json, source_tensors, weight_files
from farrier.targets.precision import Precision, precisions
from farrier.targets.quantize import (
    DEFAULT_GROUP_SIZE,
    SMALLEST_GROUP_SIZE,
    Quantization,
    group_size_for,
    quantize,
)
from farrier.targets.safetensors_file import SafetensorsWriter
from farrier.targets.weight_stream import blocks, cast, finite, float_blocks, quantized_blocks
from farrier.targets.workspace import disk_errors, publish, workspace

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and in all; the source is read twice, for its digest and for its weights."""

_SAFETENSORS_DTYPES = {ours: theirs for theirs, ours in FLOATS.items()}


@dataclass(frozen=True)
class Conversion:
    """`reused`: the checkpoint was already there. `warnings`: sentences for the user."""

    path: Path
    reused: bool
    warnings: tuple[str, ...]


def convert(
    model_dir: Path,
    out: Path,
    *,
    precision: str = "auto",
    overrides: Mapping[str, str] | None = None,
    group_size: int = DEFAULT_GROUP_SIZE,
    max_seq_len: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Writes the unified checkpoint of the model in `model_dir` to the directory `out`.

    `precision` and `overrides`: see `farrier.targets.precision.precisions`. `group_size` is that of int4: a power of
    two from 32 on, halved for matrices whose columns it does not divide. `max_seq_len`: see `from_hf_config`.
    Matrices that are quantized already (AWQ, GPTQ, fp8, compressed-tensors) keep their numbers where they have the
    precision asked for; else they are converted like any others.

    `out` appears whole or not at all. The same conversion found there is reused; anything else is left alone and
    refused. Raises CheckpointError and UnsupportedModelError about the model, BuildError about the options and
    `out`, InsufficientResourcesError when the disk is full.
    """
    if group_size < SMALLEST_GROUP_SIZE or group_size & (group_size - 1):
        raise BuildError(f"the group size must be a power of two from {SMALLEST_GROUP_SIZE} on, not {group_size}")
    plan = _plan(model_dir, precision, overrides or {}, group_size, max_seq_len)
    count = _Count(progress, plan.bytes_to_read)
    config = _config(plan, count)
    with disk_errors(out), workspace(out) as partial:
        reused = os.path.lexists(out)
        if reused:
            _refuse_unless_same(out, config)
        else:
            _write_weights(plan, partial / WEIGHTS_FILE, count)
            _copy_tokenizer(model_dir, partial / TOKENIZER_DIR)
            (partial / CONFIG_FILE).write_bytes(CONFIG.dump_json(config, indent=1))
            publish(partial, out)
    return Conversion(out, reused, _warnings(model_dir))


def converted_weights(
    model_dir: Path, *, precision: str, overrides: Mapping[str, str], max_seq_len: int | None
) -> dict[str, Quantization | str]:
    """Canonical name → quantization, or safetensors dtype, of every weight that `convert` would store."""
    return _plan(model_dir, precision, overrides, DEFAULT_GROUP_SIZE, max_seq_len).stored


def model_files(model_dir: Path) -> list[Path]:
    """Every file of a Hugging Face model that goes into its checkpoint."""
    others = (model_dir / name for name in ("config.json", "model.safetensors.index.json", *TOKENIZER_FILES))
    return [*(path for path in others if path.is_file()), *weight_files(model_dir)]


@dataclass(frozen=True)
class _Plan:
    model_dir: Path
    spec: DecoderSpec
    precision: str
    overrides: Mapping[str, str]
    sources: dict[str, Source]
    stored: dict[str, Quantization | str]
    """Canonical name → quantization, or safetensors dtype, of every weight that is written."""
    eos_token_ids: tuple[int, ...]

    @property
    def bytes_to_read(self) -> int:
        weights = sum(self.sources[name].num_bytes for name in self.stored)
        return weights + sum(path.stat().st_size for path in model_files(self.model_dir))


class _Count:
    """Tells `progress` how many bytes have been read."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def add(self, size: int) -> None:
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)


def _plan(
    model_dir: Path, precision: str, overrides: Mapping[str, str], group_size: int, max_seq_len: int | None
) -> _Plan:
    hf_config = read_json(model_dir / "config.json")
    spec = from_hf_config(hf_config, max_seq_len=max_seq_len)
    sources = map_weights(spec, source_tensors(model_dir), source_format(hf_config))
    chosen = precisions(spec, precision, overrides)
    stored = {name: _stored(name, source, chosen[name], group_size) for name, source in sources.items()}
    if spec.tied_embeddings:
        _check_tied(sources["embed.weight"], sources["lm_head.weight"])
        if stored["lm_head.weight"] == stored["embed.weight"]:
            del stored["lm_head.weight"]
    return _Plan(model_dir, spec, precision, overrides, sources, stored, _eos_token_ids(model_dir, hf_config))


def _stored(name: str, source: Source, precision: Precision, group_size: int) -> Quantization | str:
    if isinstance(source, QuantizedRows):
        if kept := _kept(name, source, precision):
            return kept
    elif source.tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"the weight '{name}' is stored as {source.tensor.dtype}; farrier converts from {', '.join(FLOATS)}"
        )
    if precision == "int8" or precision == "fp8":
        return Quantization(precision)
    if precision == "int4":
        size = group_size_for(source.columns, group_size)
        if size is None:
            raise BuildError(
                f"int4 needs groups of at least {SMALLEST_GROUP_SIZE}, which do not divide the {source.columns}"
                f" columns of '{name}'; add --override {name.removesuffix('.weight')}=int8"
            )
        return Quantization("int4", size)
    if precision != "auto":
        return _SAFETENSORS_DTYPES[precision]
    return source.tensor.dtype if isinstance(source, SourceRows) else "F32"


def _kept(name: str, source: QuantizedRows, precision: Precision) -> Quantization | None:
    """How a quantized matrix is stored whose numbers stay what they are; None if they do not."""
    if not is_projection(name):  # a router, say: small, and computed with as it is
        return None
    kept = source.quantization
    if kept is None:
        if precision == "auto":
            raise UnsupportedModelError(
                f"the weight '{name}' cannot be kept as it is quantized, as {source.obstacle}; convert it with"
                " --precision int8, bf16 or another"
            )
        return None
    # int8 and fp8 mean one scale for each row.
    alike = kept.kind == precision and (precision == "int4" or kept.group_size is None)
    return kept if alike or precision == "auto" else None


def _check_tied(table: Source, head: Source) -> None:
    """A model that says that both are one matrix must not store two, unless one is a quantized copy."""
    if table is head or isinstance(head, QuantizedRows):
        return
    pairs = zip(float_blocks("embed.weight", table), float_blocks("lm_head.weight", head), strict=True)
    if not all(np.array_equal(one, other) for one, other in pairs):
        raise CheckpointError(
            "config.json says that the output layer is the embedding ('tie_word_embeddings'), but the model stores two"
            " different ones; set tie_word_embeddings to false if both are meant"
        )


def _config(plan: _Plan, count: _Count) -> CheckpointConfig:
    return CheckpointConfig(
        format_version=FORMAT_VERSION,
        model=_model_name(plan.model_dir),
        spec=plan.spec,
        precision=plan.precision,
        overrides=tuple(plan.overrides.items()),
        quantization={name: kind for name, kind in plan.stored.items() if isinstance(kind, Quantization)},
        parallelism=Parallelism(),
        sources={path.name: file_digest(path, count.add) for path in model_files(plan.model_dir)},
        eos_token_ids=plan.eos_token_ids,
    )


def _model_name(model_dir: Path) -> str:
    """The directory's name; in the Hugging Face cache, whose directories are named for commits, the repository's."""
    path = model_dir.resolve()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def _eos_token_ids(model_dir: Path, hf_config: dict[str, Any]) -> tuple[int, ...]:
    """From generation_config.json, which wins, or config.json."""
    path = model_dir / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    text = hf_config.get("text_config")
    for config in (generation, hf_config, text):
        stated = config.get("eos_token_id") if isinstance(config, dict) else None
        if stated is not None:
            ids = stated if isinstance(stated, list) else [stated]
            if not all(type(token) is int and token >= 0 for token in ids):
                raise CheckpointError(f"'eos_token_id' of {model_dir} must be token ids, not {stated!r}")
            return tuple(ids)
    return ()


def _warnings(model_dir: Path) -> tuple[str, ...]:
    if (model_dir / "tokenizer.json").is_file():
        return ()
    found = "only tokenizer.model" if (model_dir / "tokenizer.model").is_file() else "no tokenizer"
    return (f"{model_dir} has {found}, not the tokenizer.json that farrier reads: it will serve token ids, not text",)


def _copy_tokenizer(model_dir: Path, folder: Path) -> None:
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, folder / name)


def _refuse_unless_same(out: Path, config: CheckpointConfig) -> None:
    try:
        there = CheckpointReader(out).config
    except CheckpointError as error:
        raise BuildError(
            f"{out} exists and is no whole checkpoint ({error}); remove it or choose another place"
        ) from error
    for field in fields(CheckpointConfig):
        if getattr(there, field.name) != getattr(config, field.name):
            raise BuildError(
                f"{out} holds another conversion (they differ in '{field.name}'); remove it or choose another place"
            )


def _write_weights(plan: _Plan, path: Path, count: _Count) -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    shapes = plan.spec.tensors()
    for name, stored in plan.stored.items():
        tensors |= stored_tensors(name, shapes.get(name, shapes["embed.weight"]), stored)
    with SafetensorsWriter(path, tensors) as writer:
        for name, stored in plan.stored.items():
            source, row, read = plan.sources[name], 0, 0
            for arrays in _converted(name, source, stored):
                for tensor, array in arrays.items():
                    writer.write(tensor, row * array[0].nbytes, array)
                row += len(arrays[name])
                count.add(source.num_bytes * row // source.rows - read)
                read = source.num_bytes * row // source.rows


def _converted(name: str, source: Source, stored: Quantization | str) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """Consecutive blocks of rows of every tensor that a weight is stored as."""
    if isinstance(source, QuantizedRows) and stored == source.quantization:
        for block in quantized_blocks(name, source):
            scale = {name: block.values, scale_name(name): block.scale}
            yield scale if block.zero is None else {**scale, zero_name(name): block.zero}
    elif isinstance(source, SourceRows) and stored == source.tensor.dtype:
        for rows in blocks(source):
            yield {name: rows}
    elif isinstance(stored, Quantization):
        for rows in float_blocks(name, source):
            values, scales = quantize(finite(name, rows), stored)
            yield {name: values, scale_name(name): scales}
    else:
        for rows in float_blocks(name, source):
            yield {name: cast(name, rows, stored)}
