"""From a model or a checkpoint to an engine directory: decide, estimate, pack, verify, publish."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from farrier import __version__
from farrier.targets.backend import Backend, Choices, Progress, backend_for
from farrier.targets.checkpoint import FLOATS, WEIGHTS_FILE, CheckpointReader, stored_bytes
from farrier.targets.convert import convert, converted_weights, model_files
from farrier.targets.decoder import DecoderSpec
from farrier.targets.digest import file_digest
from farrier.targets.engine import Ceilings, EngineConfig, Fingerprint, KvDtype
from farrier.targets.engine_dir import TIMINGS_FILE, TOKENIZER_DIR, damaged_file, is_engine, read_config, seal
from farrier.targets.errors import BuildError, FarrierError, InsufficientResourcesError
from farrier.targets.hf_config import from_hf_config
from farrier.targets.hf_quantization import source_format
from farrier.targets.hf_weights import read_json, source_tensors
from farrier.targets.quantize import Quantization
from farrier.targets.target import Target, memory_budget
from farrier.targets.trial import trial_step
from farrier.targets.workspace import disk_errors, publish, publish_over, workspace

DEFAULT_MAX_SEQ_LEN = 4096


@dataclass(frozen=True)
class BuildOptions:
    """What a user decides. `max_seq_len` None: the model's own limit, at most DEFAULT_MAX_SEQ_LEN; the other ceilings:
    the backend's own. `deterministic`: a sequence's logits do not depend on what else is in the batch, to the bit."""

    precision: str = "auto"
    overrides: Mapping[str, str] = field(default_factory=dict)
    kv_dtype: KvDtype | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    name: str | None = None
    deterministic: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes, said before a build. `kv_one` is KV for one sequence of `max_seq_len`, `kv_all` for `max_batch_size`."""

    disk: int
    weights: int
    kv_one: int
    kv_all: int


@dataclass(frozen=True)
class Built:
    """`reused`: an identical engine was already there."""

    config: EngineConfig
    reused: bool
    warnings: tuple[str, ...]


def build(
    source: Path,
    out: Path,
    target: Target,
    options: BuildOptions,
    *,
    runs_here: bool = True,
    on_estimate: Callable[[Estimate], None] | None = None,
    on_progress: Callable[[str], Progress] | None = None,
) -> Built:
    """Builds the engine of `source`, a Hugging Face model directory or a unified checkpoint, for `target` in `out`.

    An identical engine in `out` is reused, another engine is replaced once the new one is whole; anything else in
    `out` is refused. `runs_here`: `target` is in this machine, so the engine is tried out. `on_progress` is asked once
    per stage, by its title, for a callback of (bytes done, in all).

    Raises BuildError about the options, CheckpointError and UnsupportedModelError about the source,
    InsufficientResourcesError when disk or memory would not do.
    """
    backend = backend_for(target)
    progress = on_progress or (lambda _: lambda done, total: None)
    if out.exists() and not is_engine(out):
        raise BuildError(f"{out} exists and is not an engine; choose another place or remove it.")
    converted = CheckpointReader(source) if _is_checkpoint(source) else None
    spec, precision, stored = _describe(source, converted, options)
    kinds = {kind.kind for kind in stored.values() if isinstance(kind, Quantization)}
    backend.check(target, {precision, *kinds, *options.overrides.values()}, deterministic=options.deterministic)
    ceilings = _ceilings(backend, spec, options)
    kv_dtype = backend.kv_dtype(spec, target, precision, options.kv_dtype)
    estimate = _estimate(backend, converted, spec, stored, ceilings, kv_dtype)
    if on_estimate is not None:
        on_estimate(estimate)
    fingerprint = backend.fingerprint(target, precision, kv_dtype)
    identity = _identity(source, options, ceilings, kv_dtype, fingerprint)
    with workspace(out) as partial:
        if reusable := _reusable(out, identity):
            return Built(reusable, True, ())
        _check_resources(estimate, target, partial)
        with disk_errors(out):
            checkpoint, warnings = (
                (converted, ()) if converted else _converted(source, partial, ceilings, options, progress)
            )
            timings = out / TIMINGS_FILE
            choices = Choices(
                target,
                precision,
                kv_dtype,
                ceilings,
                options.deterministic,
                runs_here,
                timings if timings.is_file() else None,
            )
            backend.pack(checkpoint, partial, choices, progress)
            shutil.copytree(checkpoint.path / TOKENIZER_DIR, partial / TOKENIZER_DIR)
            config = EngineConfig(
                model=options.name or checkpoint.config.model,
                target=target.name,
                fingerprint=fingerprint,
                spec=checkpoint.spec,
                precision=precision,
                overrides=dict(options.overrides),
                kv_dtype=kv_dtype,
                block_size=backend.block_size,
                ceilings=ceilings,
                eos_token_ids=checkpoint.config.eos_token_ids,
                has_tokenizer=(partial / TOKENIZER_DIR / "tokenizer.json").is_file(),
                source_digest=identity,
                files={},
                weight_bytes=estimate.weights if converted else backend.packed_bytes(checkpoint),
                kv_bytes_per_block=backend.kv_bytes_per_block(checkpoint.spec, kv_dtype),
                farrier_version=__version__,
                deterministic=options.deterministic,
            )
            checkpoint.close()
            if checkpoint is not converted:
                shutil.rmtree(checkpoint.path)
            config = seal(partial, config)
            if runs_here:
                trial_step(backend.load(partial, config))
            if out.exists():
                publish_over(partial, out)
            else:
                publish(partial, out)
    return Built(config, False, warnings)


def _describe(
    source: Path, converted: CheckpointReader | None, options: BuildOptions
) -> tuple[DecoderSpec, str, Mapping[str, Quantization | str]]:
    """The model's spec, the precision its engine will have, and how each weight will be stored in its checkpoint."""
    if converted:
        if options.precision != "auto" or options.overrides:
            raise BuildError(f"{source} is converted already; give --precision and --override to `farrier convert`.")
        kinds = {converted.dtype(name) for name in converted.names}
        # int4 and fp8 checkpoints keep some layers in int8, which so does not name the engine.
        quantized = [kind for kind in ("int4", "fp8", "int8") if kind in kinds]
        precision = quantized[0] if quantized else converted.dtype("layers.0.q.weight")
        return (
            converted.spec,
            precision,
            {name: converted.quantization(name) or converted.dtype(name) for name in converted.names},
        )
    hf_config = read_json(source / "config.json")
    spec = from_hf_config(hf_config, max_seq_len=options.max_seq_len)
    stored = converted_weights(
        source, precision=options.precision, overrides=options.overrides, max_seq_len=options.max_seq_len
    )
    if options.precision != "auto":
        return spec, options.precision, stored
    if quantized_source := source_format(hf_config):
        return spec, quantized_source.kind, stored
    largest = max(source_tensors(source).values(), key=lambda info: info.stop - info.start)
    return spec, FLOATS.get(largest.dtype, "f32"), stored


def _is_checkpoint(source: Path) -> bool:
    return (source / WEIGHTS_FILE).is_file()


def _ceilings(backend: Backend, spec: DecoderSpec, options: BuildOptions) -> Ceilings:
    longest = spec.max_positions
    max_seq_len = options.max_seq_len or min(longest, DEFAULT_MAX_SEQ_LEN)
    if max_seq_len > longest:
        raise BuildError(f"The model knows {longest} positions; build with --max-seq-len {longest} or less.")
    batch_size = options.max_batch_size or backend.default_batch_size
    num_tokens = options.max_num_tokens or max(backend.default_num_tokens, batch_size)
    if num_tokens < batch_size:
        raise BuildError(
            f"A step of {num_tokens} tokens cannot hold {batch_size} sequences; "
            f"build with --max-num-tokens {batch_size} or more."
        )
    return Ceilings(batch_size, num_tokens, max_seq_len)


def _estimate(
    backend: Backend,
    converted: CheckpointReader | None,
    spec: DecoderSpec,
    stored: Mapping[str, Quantization | str],
    ceilings: Ceilings,
    kv_dtype: KvDtype,
) -> Estimate:
    if converted:
        weights = backend.packed_bytes(converted)
        disk = weights
    else:
        weights = stored_bytes(spec, stored)
        disk = 2 * weights  # the converted checkpoint and the engine, for a moment side by side
    kv_one = math.ceil(ceilings.max_seq_len / backend.block_size) * backend.kv_bytes_per_block(spec, kv_dtype)
    return Estimate(disk, weights, kv_one, kv_one * ceilings.max_batch_size)


def _check_resources(estimate: Estimate, target: Target, place: Path) -> None:
    free = shutil.disk_usage(place).free
    if free < estimate.disk:
        raise InsufficientResourcesError(
            f"The build needs {_mb(estimate.disk)} on disk, {_mb(free)} are free; make room or build elsewhere."
        )
    needed, budget = estimate.weights + estimate.kv_one, memory_budget(target)
    if budget < needed:
        raise InsufficientResourcesError(
            f"The engine needs {_mb(needed)} of memory (weights {_mb(estimate.weights)}, KV of one sequence "
            f"{_mb(estimate.kv_one)}), {_mb(budget)} are available; build with a smaller --precision or --max-seq-len."
        )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _identity(
    source: Path, options: BuildOptions, ceilings: Ceilings, kv_dtype: KvDtype, fingerprint: Fingerprint
) -> str:
    """Equal for builds that give the same engine: a digest of the source's content and all that was decided."""
    if _is_checkpoint(source):
        files = sorted(path for path in source.rglob("*") if path.is_file())
    else:
        files = model_files(source)
    decided = {
        "sources": {str(path.relative_to(source)): file_digest(path) for path in files},
        "name": options.name or source.resolve().name,
        "precision": options.precision,
        "overrides": list(options.overrides.items()),
        "ceilings": asdict(ceilings),
        "kv_dtype": kv_dtype,
        "deterministic": options.deterministic,
        "fingerprint": asdict(fingerprint),
        "farrier": __version__,
    }
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


def _reusable(out: Path, identity: str) -> EngineConfig | None:
    if not out.exists():
        return None
    try:
        config = read_config(out)
        whole = config.source_digest == identity and damaged_file(out, config) is None
    except FarrierError:  # of another ABI, or damaged: to be replaced
        return None
    return config if whole else None


def _converted(
    source: Path, partial: Path, ceilings: Ceilings, options: BuildOptions, progress: Callable[[str], Progress]
) -> tuple[CheckpointReader, tuple[str, ...]]:
    conversion = convert(
        source,
        partial / "checkpoint",
        precision=options.precision,
        overrides=options.overrides,
        max_seq_len=ceilings.max_seq_len,
        progress=progress("Converting"),
    )
    return CheckpointReader(conversion.path), conversion.warnings
