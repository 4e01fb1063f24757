"""How fast, in one run and on one machine: a table of measurements beside their peers and goals.

python tests/bench/run.py [--only decode|http|health|llama|host|memory] [--json FILE]

FARRIER_LLAMA_PYTHON: a Python that has llama-cpp-python and gguf; without it, one is made in .venv-llama, which needs
a C++ compiler.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from lines import ROUNDS, Line
from part_decode import CONTEXT, decode
from part_health import health
from part_host import host
from part_http import http
from part_llama import llama
from part_memory import memory
from rich.console import Console
from rich.table import Table

from farrier.runtime.bench.conditions import machine_conditions
from farrier.targets.detect import detect, select_target
from farrier.targets.errors import FarrierError

PARTS = {"decode": decode, "http": http, "health": health, "llama": llama, "host": host, "memory": memory}
BUSY = 0.5


def main() -> int:
    """The exit status: 1 when something could not be measured. A missed goal is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="may be repeated; by default everything")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the lines as JSON")
    arguments = parser.parse_args()
    console, progress = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True, highlight=False)
    load = os.getloadavg()[0]
    lines: list[Line] = []
    failures = [reason for name in arguments.only or PARTS if (reason := _measure(name, lines, progress))]
    console.print(_table(lines))
    for name, text in machine_conditions(select_target(detect(), "cpu")).items():
        console.print(f"{name}: {text}", style="dim")
    console.print(f"decode: from a context of {CONTEXT}, medians of {ROUNDS} rounds in turns, no TTFT", style="dim")
    for failure in failures:
        console.print(failure, style="bold red", markup=False)
    if load > BUSY:
        console.print(f"Something else was running (load {load:.1f}): these numbers say little.", style="yellow")
    if arguments.json is not None:
        document = [asdict(line) | {"ratio": line.ratio, "verdict": line.verdict} for line in lines]
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if failures else 0


def _measure(part: str, lines: list[Line], progress: Console) -> str | None:
    """Appends to `lines` as they come; returns why it could not go on, if so."""
    try:
        for line in PARTS[part]():
            lines.append(line)
            progress.print("  ".join(line.cells()), soft_wrap=True)
    except (FarrierError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"{part} could not be measured: {error}"
    return None


def _table(lines: list[Line]) -> Table:
    table = Table()
    for index, column in enumerate(("", "measured", "peer", "ratio", "goal", "")):
        table.add_column(column, justify="left" if index == 0 else "right")
    for line in lines:
        table.add_row(*line.cells(), style=None if line.verdict != "miss" else "bold")
    return table


if __name__ == "__main__":
    sys.exit(main())
