"""`farrier inspect`"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from farrier.agent.console import console
from farrier.targets.engine import EngineConfig


def inspect_command(
    engine: Annotated[Path, typer.Argument(help="An engine directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what was baked into an engine, and whether it fits this machine. Exits with 1 when it does not."""
    from farrier.targets.backend import get_backend
    from farrier.targets.detect import detect
    from farrier.targets.engine_dir import damaged_file, read_config
    from farrier.targets.loading import misfit

    config = read_config(engine)
    mismatch, damaged = misfit(config, detect()), damaged_file(engine, config)
    details = {} if damaged else get_backend(config.fingerprint.backend).details(engine)
    if as_json:
        document = asdict(config) | {
            "fits": mismatch is None,
            "mismatch": mismatch and mismatch.field,
            "damaged": damaged,
            "details": details,
        }
        typer.echo(json.dumps(document, indent=2))
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        for key, value in _rows(config):
            table.add_row(key, str(value))
        if details:
            table.add_row("kernels", _kernels(config, details))
        table.add_row("whole", f"no, {damaged} is damaged: build it again" if damaged else "yes")
        table.add_row("fits here", "yes" if mismatch is None else f"no: {mismatch}")
        console().print(table)
    if mismatch is not None or damaged is not None:
        raise typer.Exit(1)


def _kernels(config: EngineConfig, details: dict[str, Any]) -> str:
    if config.deterministic:
        tactics = "deterministic: logits do not depend on the rest of the batch"
    else:
        tactics = "swept" if details["swept"] else "unswept: run `farrier tune` on the device"
    return f"{details['kernels']} for compute capability {details['compute_capability']}, {tactics}"


def _rows(config: EngineConfig) -> list[tuple[str, Any]]:
    spec, ceilings, fingerprint = config.spec, config.ceilings, config.fingerprint
    overrides = "".join(f", {pattern}={precision}" for pattern, precision in config.overrides.items())
    experts = f", {spec.experts.num_experts} experts of which {spec.experts.top_k}" if spec.experts else ""
    versions = ", ".join(f"{library} {version}" for library, version in fingerprint.versions)
    return [
        ("model", f"{config.model} ({spec.architecture}, {spec.num_parameters() / 1e6:,.1f} M parameters)"),
        (
            "shape",
            f"{len(spec.layers)} layers × {spec.hidden_size}, {spec.num_heads} heads over {spec.num_kv_heads} KV heads"
            f" × {spec.head_dim}, MLP {spec.intermediate_size}{experts}, vocabulary {spec.vocab_size}",
        ),
        (
            "precision",
            f"{config.precision}{overrides}; KV cache {config.kv_dtype} in blocks of {config.block_size} tokens",
        ),
        (
            "ceilings",
            f"{ceilings.max_batch_size} sequences, {ceilings.max_num_tokens} tokens a step, "
            f"{ceilings.max_seq_len} tokens a sequence",
        ),
        ("size", f"weights {config.weight_bytes / 1e6:,.1f} MB, {config.kv_bytes_per_block / 1e3:,.1f} kB a KV block"),
        ("tokenizer", "yes" if config.has_tokenizer else "no: serves token ids"),
        (
            "built for",
            f"{config.target} with {fingerprint.backend}{versions and f' ({versions})'}, {fingerprint.architecture}"
            f"{''.join(' + ' + f for f in fingerprint.features)}, engine ABI {fingerprint.abi}",
        ),
        ("built by", f"farrier {config.farrier_version}, source digest {config.source_digest[:16]}"),
    ]
