"""Directories that appear whole or not at all, written by one process at a time."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farrier.targets.errors import BuildError, InsufficientResourcesError


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """An empty directory beside `out` to be filled and then handed to `publish`.

    Waits while another process fills one for the same `out`, so ask after entering whether it is still to be done.
    What a killed process has left is removed; so is the directory when the block ends without `publish`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    lock = _lock(partial)
    try:
        _clear(partial)
        yield partial
    finally:
        if _is_at(lock, partial):
            shutil.rmtree(partial)
        os.close(lock)


def publish(partial: Path, out: Path) -> None:
    """Moves a filled workspace to `out`, which must not exist, once everything is on the disk."""
    for folder, _, files in os.walk(partial):
        for name in (*files, "."):
            _sync(Path(folder, name))
    partial.rename(out)
    _sync(out.parent)


def replace_published(partial: Path, out: Path) -> None:
    """Publishes `partial` as `out`; what was there goes, but stays valid for those that have its files open."""
    old = partial.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    publish(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def _lock(partial: Path) -> int:
    """A descriptor of the directory that holds the lock. It may be published, or removed, while we wait."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, partial):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns OSErrors of writing `out` into InsufficientResourcesError (a full disk) or BuildError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InsufficientResourcesError(f"the disk that {out} is to be on is full; nothing was written") from error
        raise BuildError(f"cannot write {out}: {error.strerror}") from error
