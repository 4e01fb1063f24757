"""What farrier can run on: one `Target` per usable device, as plain facts read from the machine."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["cuda", "jetson", "cpu"]

MIB = 1 << 20
_SMALLEST_RESERVE = 256 * MIB
_LARGEST_RESERVE = 4096 * MIB

_NATIVE_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True)
class Cpu:
    """The host's processor.

    `features` holds, sorted, those instruction sets an engine may use and every core has, under the
    names of /proc/cpuinfo. `cores` counts physical cores.
    """

    architecture: str
    name: str
    features: tuple[str, ...]
    cores: int

    @property
    def native_bf16(self) -> bool:
        return not _NATIVE_BF16.isdisjoint(self.features)


@dataclass(frozen=True)
class Target:
    """One usable device. Sizes in bytes, bandwidth in bytes/s; None where the machine does not tell.

    `memory_total` and `memory_available` are the device's own memory, or the host's where
    `unified_memory` says that the two are one; a cgroup limit on the host's is already applied.
    `device_id` stays the same across boots. `mig` is None where the GPU has no such mode.
    """

    name: str
    kind: Kind
    device_name: str
    device_id: str | None
    cpu: Cpu
    memory_total: int
    memory_available: int
    unified_memory: bool
    memory_bandwidth: float | None = None
    compute_capability: tuple[int, int] | None = None
    driver_version: str | None = None
    cuda_version: tuple[int, int] | None = None
    mig: Literal["disabled", "slice"] | None = None
    l4t: str | None = None
    power_mode: str | None = None

    @property
    def capability(self) -> str:
        """What compiled code must match: "sm_90", or "x86_64+bf16" where the CPU has bf16 instructions."""
        if self.compute_capability is not None:
            return sm_name(self.compute_capability)
        return self.cpu.architecture + ("+bf16" if self.cpu.native_bf16 else "")


@dataclass(frozen=True)
class UnusableDevice:
    """A device that is present but cannot be used; `reason` says why and what to do."""

    device: str
    reason: str

    def __str__(self) -> str:
        return f"{self.device} cannot be used: {self.reason}"


def memory_budget(target: Target) -> int:
    """Bytes an engine may take on `target`, as of its detection.

    A discrete GPU gives what is free. Memory shared with the host keeps a reserve for the rest of
    the system: a sixteenth of the total, between 256 MiB and 4 GiB.
    """
    if not target.unified_memory:
        return target.memory_available
    reserve = min(max(target.memory_total // 16, _SMALLEST_RESERVE), _LARGEST_RESERVE)
    return max(0, target.memory_available - reserve)


def sm_name(compute_capability: tuple[int, int]) -> str:
    major, minor = compute_capability
    return f"sm_{major}{minor}"
