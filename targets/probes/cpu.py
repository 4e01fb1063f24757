"""The processor, from /proc/cpuinfo."""

import os
import platform
import re
from pathlib import Path

from farrier.targets.probes.files import read_text
from farrier.targets.target import Cpu

_FEATURES = frozenset(
    {
        *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
        *("asimd", "asimddp", "i8mm", "bf16", "sve"),
    }
)

# Arm kernels give part numbers and no names: the parts of implementer 0x41 (Arm) seen under inference.
_ARM_PARTS = {
    0xD08: "Cortex-A72",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD40: "Neoverse-V1",
    0xD42: "Cortex-A78AE",
    0xD49: "Neoverse-N2",
    0xD4F: "Neoverse-V2",
    0xD83: "Neoverse-V3AE",
    0xD84: "Neoverse-V3",
}


def probe_cpu(root: Path) -> Cpu:
    processors = _processors(read_text(root / "proc/cpuinfo"))
    flags = [set((p.get("flags") or p.get("features") or "").split()) for p in processors]
    common = set.intersection(*flags) if flags else set()
    return Cpu(
        architecture=_architecture(common),
        name=_name(processors[0] if processors else {}),
        features=tuple(sorted(common & _FEATURES)),
        cores=_physical_cores(processors) or os.cpu_count() or 1,
    )


def _processors(cpuinfo: str) -> list[dict[str, str]]:
    """One dict of lower-case keys per logical processor; blocks that describe none are dropped."""
    blocks = re.split(r"\n\s*\n", cpuinfo)
    parsed = [
        {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in b.split("\n"))}
        for b in blocks
    ]
    return [block for block in parsed if "processor" in block]


def _architecture(flags: set[str]) -> str:
    if "lm" in flags:  # long mode
        return "x86_64"
    if "asimd" in flags:
        return "aarch64"
    return platform.machine()


def _name(processor: dict[str, str]) -> str:
    if name := processor.get("model name"):
        return name
    implementer, part = processor.get("cpu implementer", ""), processor.get("cpu part", "")
    if not implementer:
        return "unknown CPU"
    known = _ARM_PARTS.get(int(part, 16)) if re.fullmatch(r"0x[0-9a-f]{1,8}", part) else None
    if implementer == "0x41" and known:
        return known
    return f"Arm implementer {implementer} part {part}"


def _physical_cores(processors: list[dict[str, str]]) -> int:
    """Hyper-threads share a (socket, core) pair; Arm lists none, and every processor is a core."""
    if all("core id" in p for p in processors):
        return len({(p.get("physical id"), p["core id"]) for p in processors})
    return len(processors)
