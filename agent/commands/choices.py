"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from farrier.targets.errors import BuildError

Precision = Annotated[
    str,
    typer.Option(help="auto (as in the model), f32, bf16, f16, fp8 or int8 (per channel), or int4 (group-wise)."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--override", metavar="PATTERN=PRECISION", help="Precision of some layers, such as lm_head=int8."),
]
Name = Annotated[str | None, typer.Option(help="The name clients use for the model; by default the directory's.")]


def parse_overrides(given: list[str] | None) -> dict[str, str]:
    overrides = {}
    for text in given or []:
        pattern, separator, precision = text.partition("=")
        if not (pattern and separator and precision):
            raise BuildError(f"--override takes PATTERN=PRECISION, such as lm_head=int8, not {text!r}.")
        overrides[pattern] = precision
    return overrides


def demo_model() -> Path:
    """The bundled demo model, a Hugging Face model directory."""
    import farrier.demo

    return Path(farrier.demo.__file__).parent


def model_source(given: str) -> Path:
    """`demo`, or a path."""
    return demo_model() if given == "demo" and not Path(given).exists() else Path(given)
