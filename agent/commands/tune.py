"""`farrier tune`"""

from pathlib import Path
from typing import Annotated

import typer

from farrier.agent.console import progress_bars


def tune_command(engine: Annotated[Path, typer.Argument(help="An engine directory.")]) -> None:
    """Measure which kernels are fastest on this machine's GPU, and rewrite an engine that was built elsewhere."""
    from farrier.targets.tune import tune

    with progress_bars() as progress:
        config = tune(engine, progress)
    typer.echo(f"{engine}: tuned for {config.target} ({config.precision}, KV {config.kv_dtype})")
