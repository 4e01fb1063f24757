"""What a file's content is known by."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from farrier.targets.errors import CheckpointError


def file_digest(path: Path, read: Callable[[int], None] = lambda size: None) -> str:
    """SHA-256 of a file, in hexadecimal; `read` is told the size of each piece."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    try:
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(memoryview(buffer)[:size])
                read(size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()
