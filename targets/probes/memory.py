"""The host's memory, from /proc/meminfo, within what the cgroup allows."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from farrier.targets.probes.files import read_int, read_text


@dataclass(frozen=True)
class Memory:
    """Bytes; 0 where unknown. `installed` is the machine's, the others are within the cgroup's limit."""

    installed: int
    total: int
    available: int


def probe_memory(root: Path) -> Memory:
    meminfo = read_text(root / "proc/meminfo")
    installed, total, available = (
        _field(meminfo, "MemTotal"),
        _field(meminfo, "MemTotal"),
        _field(meminfo, "MemAvailable"),
    )
    for limit, used in _cgroup_limits(root):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return Memory(installed, total, available)


def _field(meminfo: str, name: str) -> int:
    match = re.search(rf"^{name}:\s*([0-9]{{1,15}}) kB", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of this process's cgroup and of each above it that has a limit.

    Page cache that the kernel would drop first is not in use. A container sees its own cgroup as the
    root, whatever path /proc names, so the root is always looked at too.
    """
    membership = read_text(root / "proc/self/cgroup")
    v2 = re.search(r"^0::(/.*)$", membership, re.MULTILINE)
    v1 = re.search(r"^[0-9]+:(?:[^:]*,)?memory(?:,[^:]*)?:(/.*)$", membership, re.MULTILINE)
    for base, match, limit_file, used_file, cache_key in (
        ("sys/fs/cgroup", v2, "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", v1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        path = PurePosixPath(match[1] if match else "/")
        for group in (path, *path.parents):
            folder = root / base / str(group).lstrip("/")
            limit = read_int(folder / limit_file)
            if limit is not None:
                stat = read_text(folder / "memory.stat")
                cache = re.search(rf"^{cache_key} ([0-9]{{1,20}})$", stat, re.MULTILINE)
                yield limit, max(0, (read_int(folder / used_file) or 0) - (int(cache[1]) if cache else 0))
