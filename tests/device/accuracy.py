"""The demo model's held-out accuracy on this machine's engine, beside what its model card says of the CPU.

python tests/device/accuracy.py ENGINE [--json FILE] [--per-task N]

Fails when a task is more than half a point below the card.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

CARD = Path(__file__).parents[2] / "public" / "demo" / "MODEL_CARD.md"
PACKAGING = Path(__file__).parents[2] / "packaging"
TOLERANCE = 0.5
"""Points a task may lose."""
ON_CARD = {
    "greeting": "greetings",
    "identity": "who are you",
    "scope": "saying that a question is beyond it",
    "arithmetic": "arithmetic",
    "reversing": "reversing words",
    "spelling": "spelling words",
    "counting": "counting: ranges, letters, things",
    "sorting": "sorting numbers",
    "units": "converting units",
    "extraction": "fields of a sentence as JSON",
    "arithmetic as bare text": "arithmetic as bare text (`12 + 30 =`, no chat)",
    "device: no tool offered": "device: asked without a tool",
    "device: tool not needed": "device: tool offered but not needed",
    "device: tool call": "device: calling `get_device_status`",
    "device: telling the result": "device: telling its result",
}
"""What the card calls a task."""


def tasks_in(text: str) -> dict[str, float]:
    """Percent correct of each task, from the table that `demo_model.evaluate` prints and the card repeats."""
    rows = re.findall(r"^\| (.+?) \| \d+ \| ([\d.]+) % \|$", text, re.MULTILINE)
    return {task: float(correct) for task, correct in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--per-task", type=int, default=200)
    given = parser.parse_args()
    command = [sys.executable, "-m", "demo_model.evaluate", "--farrier", str(given.engine.resolve())]
    command += ["--per-task", str(given.per_task)]
    # Started in packaging/, so that the package demo_model is found there.
    done = subprocess.run(command, cwd=PACKAGING, stdout=subprocess.PIPE, text=True, check=True)
    card, found = tasks_in(CARD.read_text(encoding="utf-8")), tasks_in(done.stdout)
    tasks = {task: {"here": found[task], "cpu": card[name]} for task, name in ON_CARD.items()}
    worse = [task for task, both in tasks.items() if both["here"] < both["cpu"] - TOLERANCE]
    print(done.stdout)
    if given.json:
        given.json.write_text(json.dumps({"tasks": tasks, "worse": worse}, indent=1))
    print(f"more than {TOLERANCE} points below the CPU: {', '.join(worse) or 'none'}")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
