"""`farrier detect`"""

import json
from typing import Annotated

import typer

from farrier.agent.console import console
from farrier.targets.detect import detect, detection_to_dict, render


def detect_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Name this machine's target, from facts, and say what cannot be used and why."""
    detection = detect()
    if as_json:
        typer.echo(json.dumps(detection_to_dict(detection), indent=2))
    else:
        console().print(render(detection))
