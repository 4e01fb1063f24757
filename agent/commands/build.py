"""`farrier build`"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from farrier.agent.commands.choices import Name, Overrides, Precision, model_source, parse_overrides
from farrier.agent.console import errors_console, progress_bars


def build_command(
    source: Annotated[str, typer.Argument(help="A checkpoint, a Hugging Face model directory, or demo.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the engine goes.")],
    target: Annotated[
        str, typer.Option(help="auto, a target named by `farrier detect` such as cpu, or a100, orin, h100, h200.")
    ] = "auto",
    precision: Precision = "auto",
    overrides: Overrides = None,
    kv_dtype: Annotated[
        Literal["auto", "f32", "bf16", "f16", "fp8", "u8"], typer.Option(help="Type of the KV cache.")
    ] = "auto",
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences in one step; by default 16 on a CPU, 64 on a GPU.")
    ] = None,
    max_num_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one step; by default 512 on a CPU, 4096 on a GPU.")
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(min=1, help="Prompt plus output; by default the model's limit, at most 4096.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option(help="Logits that do not depend on the rest of the batch, to the bit; slower.")
    ] = False,
    name: Name = None,
) -> None:
    """Build the engine of a model, for this machine or for another."""
    from farrier.targets.backend import get_backend
    from farrier.targets.build import BuildOptions, Estimate, build
    from farrier.targets.detect import detect
    from farrier.targets.known import build_target

    detection = detect()
    for warning in detection.warnings:
        errors_console().print(f"Warning: {warning}", markup=False, soft_wrap=True)
    options = BuildOptions(
        precision=precision,
        overrides=parse_overrides(overrides),
        kv_dtype=None if kv_dtype == "auto" else kv_dtype,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        deterministic=deterministic,
        name=name or ("demo" if source == "demo" else None),
    )

    def say(estimate: Estimate) -> None:
        errors_console().print(
            f"Needs {_mb(estimate.disk)} on disk while building; {_mb(estimate.weights)} of memory for weights and "
            f"{_mb(estimate.kv_one)} for the KV cache of one full sequence ({_mb(estimate.kv_all)} for a full batch).",
            highlight=False,
            soft_wrap=True,
        )

    chosen, runs_here = build_target(detection, target)
    with progress_bars() as progress:
        built = build(
            model_source(source),
            out,
            chosen,
            options,
            runs_here=runs_here,
            on_estimate=say,
            on_progress=progress,
        )
    for warning in built.warnings:
        errors_console().print(f"Warning: {warning}", markup=False, soft_wrap=True)
    what = "the identical engine was already there" if built.reused else f"built for {built.config.target}"
    typer.echo(f"{out}: {what} ({built.config.precision}, KV {built.config.kv_dtype})")
    details = get_backend(built.config.fingerprint.backend).details(out)
    if details.get("swept") is False and not deterministic:
        errors_console().print(
            f"Its kernels were chosen by rule, unswept; run `farrier tune {out}` on the device.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
