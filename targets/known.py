"""Machines that engines can be built for without being there: facts from their data sheets."""

from dataclasses import dataclass, replace

from farrier.targets.detect import Detection, select_target
from farrier.targets.target import Target

_GIB = 1 << 30


@dataclass(frozen=True)
class _Facts:
    device_name: str
    compute_capability: tuple[int, int]
    memory: int
    bandwidth: float
    unified: bool = False


_KNOWN = {
    "a100": _Facts("NVIDIA A100", (8, 0), 40 * _GIB, 1.555e12),
    "orin": _Facts("NVIDIA Jetson AGX Orin", (8, 7), 32 * _GIB, 204.8e9, unified=True),
    "h100": _Facts("NVIDIA H100", (9, 0), 80 * _GIB, 3.35e12),
    "h200": _Facts("NVIDIA H200", (9, 0), 141 * _GIB, 4.8e12),
}


def build_target(detection: Detection, name: str) -> tuple[Target, bool]:
    """The target called `name`, and whether it is in this machine. Raises TargetError when nobody knows it."""
    if name in _KNOWN and not any(name in (target.name, target.kind) for target in detection.targets):
        return _elsewhere(name, _KNOWN[name], detection.targets[-1]), False
    return select_target(detection, name), True


def _elsewhere(name: str, facts: _Facts, host: Target) -> Target:
    # The host stands in for what no data sheet of a GPU says: the processor.
    return replace(
        host,
        name=name,
        kind="jetson" if facts.unified else "cuda",
        device_name=facts.device_name,
        device_id=None,
        memory_total=facts.memory,
        memory_available=facts.memory,
        unified_memory=facts.unified,
        memory_bandwidth=facts.bandwidth,
        compute_capability=facts.compute_capability,
    )
