"""`farrier convert`"""

from pathlib import Path
from typing import Annotated

import typer

from farrier.agent.commands.choices import Overrides, Precision, model_source, parse_overrides
from farrier.agent.console import errors_console, progress_bar


def convert_command(
    model: Annotated[str, typer.Argument(help="A Hugging Face model directory (safetensors), or demo.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the unified checkpoint goes.")],
    precision: Precision = "auto",
    overrides: Overrides = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale in int4.")] = 128,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Longest sequence, for models whose rope depends on it.")
    ] = None,
) -> None:
    """Convert a Hugging Face model to a unified checkpoint, quantizing on the way."""
    from farrier.targets.convert import convert

    with progress_bar("Converting") as progress:
        conversion = convert(
            model_source(model),
            out,
            precision=precision,
            overrides=parse_overrides(overrides),
            group_size=group_size,
            max_seq_len=max_seq_len,
            progress=progress,
        )
    for warning in conversion.warnings:
        errors_console().print(f"Warning: {warning}", markup=False, soft_wrap=True)
    typer.echo(f"{out}: {'the same checkpoint was already there' if conversion.reused else 'converted'}")
