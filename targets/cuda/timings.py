"""What a sweep measured, as `model.cache` keeps it."""

import json
from pathlib import Path

from farrier.plugins.gemv import GemvTile
from farrier.plugins.weight_form import GemmTile
from farrier.targets.cuda.products import Choice

Timings = dict[str, dict[str, float]]
"""Product's key → candidate → seconds."""


def spelled(choice: Choice) -> str:
    """A choice as `model.cache` has it."""
    if isinstance(choice, str):
        return choice
    kind = "stream" if isinstance(choice, GemvTile) else "matrix"
    return kind + ":" + ",".join(str(value) for value in vars(choice).values())


def unspelled(text: str) -> Choice:
    """The choice that `spelled` wrote."""
    kind, _, fields = text.partition(":")
    if kind == "library":
        return "library"
    numbers = [int(field) for field in fields.split(",")]
    return GemvTile(*numbers) if kind == "stream" else GemmTile(*numbers)


def fastest(timings: Timings) -> dict[str, Choice]:
    return {key: unspelled(min(times, key=times.__getitem__)) for key, times in timings.items() if times}


def read_timings(path: Path | None, device: str) -> Timings:
    """What was measured on a device of this name; nothing where there is no such file, or an unreadable one."""
    if path is None:
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return dict(document["timings"]) if document["device"] == device else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write_timings(path: Path, device: str, timings: Timings) -> None:
    path.write_text(json.dumps({"device": device, "timings": timings}, indent=1) + "\n", encoding="utf-8")
