"""Directories that appear whole or not at all, written by one process at a time."""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from farrier.targets.errors import BuildError, InsufficientResourcesError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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
    _sync_all(partial)
    partial.rename(out)
    _sync(out.parent)


def publish_over(partial: Path, out: Path) -> None:
    """Like `publish`, in place of a directory `out`, which is removed. Whenever this is killed, one of the two is at
    `out`, whole; only where the file system cannot exchange two names is there nothing for the instant between two
    renames. Who has files of the old directory open keeps them."""
    _sync_all(partial)
    # The old directory gets the workspace's name for a while: who waits for that must not take it for an empty one.
    old = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(old, fcntl.LOCK_EX)
        if _exchange(partial, out):
            _sync(out.parent)
            shutil.rmtree(partial)
        else:
            aside = out.with_name(f".{out.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            out.rename(aside)
            partial.rename(out)
            _sync(out.parent)
            shutil.rmtree(aside)
    finally:
        os.close(old)


def forget_cached(folder: Path) -> None:
    """Puts everything in `folder` on the disk and out of the page cache: what is read next comes from the disk."""
    _sync_all(folder)
    for inside, _, files in os.walk(folder):
        for name in files:
            with open(Path(inside, name), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_all(folder: Path) -> None:
    for inside, _, files in os.walk(folder):
        for name in (*files, "."):
            _sync(Path(inside, name))


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one instant; False where the file system or the C library cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(error, os.strerror(error), str(other))


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
