"""Reading small system files that may be missing, unreadable or garbage."""

import re
from pathlib import Path

_LIMIT = 4 << 20


def read_text(path: Path) -> str:
    """The file's text without NULs at its end; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_LIMIT).decode("utf-8", "replace").strip("\0")
    except (OSError, ValueError):  # ValueError: a path with a NUL in it
        return ""


def read_int(path: Path) -> int | None:
    """The decimal number the file consists of, or None."""
    match = re.fullmatch(r"\s*([0-9]{1,20})\s*", read_text(path))
    return int(match[1]) if match else None
