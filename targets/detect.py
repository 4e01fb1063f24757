"""Which targets this machine has, which one to use, and what stands in the way of a better one."""

from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farrier.targets.errors import TargetError
from farrier.targets.probes.cpu import probe_cpu
from farrier.targets.probes.files import read_text
from farrier.targets.probes.gpu import (
    MINIMUM_COMPUTE_CAPABILITY,
    probe_driver_version,
    probe_gpus,
    probe_pci_gpus,
)
from farrier.targets.probes.jetson import Jetson, probe_jetson
from farrier.targets.probes.memory import Memory, probe_memory
from farrier.targets.probes.nvml import Nvml, SystemNvml
from farrier.targets.target import Cpu, Target, UnusableDevice, memory_budget

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Detection:
    """`targets` in order of preference, never empty: the CPU comes last."""

    targets: tuple[Target, ...]
    unusable: tuple[UnusableDevice, ...]

    @property
    def chosen(self) -> Target:
        return self.targets[0]

    @property
    def degraded_reason(self) -> str | None:
        """Why the CPU was chosen although the machine has an accelerator; None when that is not so."""
        if self.chosen.kind != "cpu" or not self.unusable:
            return None
        return "Falling back to the CPU. " + ". ".join(str(device) for device in self.unusable) + "."

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences to show whenever the detection is used; empty when every device found is usable."""
        if self.degraded_reason is not None:
            return (self.degraded_reason,)
        return tuple(f"{device}." for device in self.unusable)


def detect(root: Path = Path("/"), nvml: Nvml | None = None) -> Detection:
    """Probe the machine whose file system is at `root`. Never raises because of what it finds there."""
    cpu, memory = probe_cpu(root), probe_memory(root)
    pci = probe_pci_gpus(root)
    jetson = probe_jetson(root, memory.installed)
    accelerators: list[Target] = []
    unusable: list[UnusableDevice] = []
    # A Jetson's own GPU has an NVML entry too, an almost empty one; NVML counts there only for PCI cards.
    if jetson is None or pci:
        accelerators, unusable = probe_gpus(root, nvml or SystemNvml(), cpu, memory, pci)
    if jetson is not None:
        accelerators = [t for t in accelerators if t.compute_capability != jetson.compute_capability]
        if reason := _unusable_jetson(jetson):
            unusable.append(UnusableDevice(jetson.device_name, reason))
        else:
            accelerators.append(_jetson_target(jetson, cpu, memory, probe_driver_version(root)))
    accelerators.sort(key=lambda target: (target.memory_bandwidth or 0, target.memory_total), reverse=True)
    return Detection((*accelerators, _cpu_target(cpu, memory, root)), tuple(unusable))


def select_target(detection: Detection, name: str = "auto") -> Target:
    """The target called `name`, the first of the kind `name` ("cpu", "cuda", "jetson"), or for "auto" the chosen one.

    Raises TargetError naming what there is instead.
    """
    if name == "auto":
        return detection.chosen
    for target in detection.targets:
        if name in (target.name, target.kind):
            return target
    found = ", ".join(dict.fromkeys(target.name for target in detection.targets))
    reasons = "".join(f"; {device}" for device in detection.unusable)
    raise TargetError(f"There is no target {name!r} on this machine; found: {found}{reasons}.")


def detection_to_dict(detection: Detection) -> dict[str, Any]:
    """The detection as JSON-ready data; sizes in bytes, bandwidth in bytes/s."""
    return {
        "chosen": detection.chosen.name,
        "degraded_reason": detection.degraded_reason,
        "warnings": list(detection.warnings),
        "targets": [_target_to_dict(target) for target in detection.targets],
        "unusable": [asdict(device) for device in detection.unusable],
    }


def render(detection: Detection) -> "RenderableType":
    """The detection for a terminal: a row per target, the chosen one marked, its details, then the warnings."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table("", "target", "device", "memory", "budget", "bandwidth", box=None)
    for target in detection.targets:
        chosen = target is detection.chosen
        bandwidth = f"{target.memory_bandwidth / 1e9:,.0f} GB/s" if target.memory_bandwidth else "unknown"
        sizes = (f"{size / 2**30:.1f} GiB" for size in (target.memory_total, memory_budget(target)))
        row = ("▸" if chosen else "", target.name, Text(target.device_name), *sizes, bandwidth)
        table.add_row(*row, style="bold" if chosen else None)
    warnings = [Text(f"Warning: {warning}", style="bold yellow") for warning in detection.warnings]
    return Group(table, Text("  " + _details(detection.chosen)), *warnings)


def _unusable_jetson(jetson: Jetson) -> str | None:
    capability = jetson.compute_capability
    if capability is None:
        return f"the compute capability of its chip (Tegra id {jetson.chip:#x}) is not known to this version of farrier"
    if capability < MINIMUM_COMPUTE_CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}; farrier needs 8.0 or higher"
    if not jetson.has_gpu_node:
        return (
            "its GPU driver is not up (no /dev/nvgpu); install NVIDIA's Jetson Linux, "
            "or start the container with --runtime nvidia"
        )
    return None


def _jetson_target(jetson: Jetson, cpu: Cpu, memory: Memory, driver_version: str | None) -> Target:
    return Target(
        name=jetson.name,
        kind="jetson",
        device_name=jetson.device_name,
        device_id=jetson.serial,
        cpu=cpu,
        memory_total=memory.total,
        memory_available=memory.available,
        unified_memory=True,
        memory_bandwidth=jetson.memory_bandwidth,
        compute_capability=jetson.compute_capability,
        driver_version=driver_version,
        l4t=jetson.l4t,
        power_mode=jetson.power_mode,
    )


def _cpu_target(cpu: Cpu, memory: Memory, root: Path) -> Target:
    machine_id = read_text(root / "etc/machine-id").strip()
    return Target(
        name=f"cpu-{cpu.architecture}",
        kind="cpu",
        device_name=cpu.name,
        # machine-id(5): the id itself is confidential, a keyed hash of it is not.
        device_id=sha256(f"farrier:{machine_id}".encode()).hexdigest()[:32] if machine_id else None,
        cpu=cpu,
        memory_total=memory.total,
        memory_available=memory.available,
        unified_memory=True,
    )


def _target_to_dict(target: Target) -> dict[str, Any]:
    facts = asdict(target)
    for version in ("compute_capability", "cuda_version"):
        if facts[version] is not None:
            facts[version] = ".".join(str(part) for part in facts[version])
    facts["cpu"]["features"] = list(target.cpu.features)
    return facts | {"capability": target.capability, "memory_budget": memory_budget(target)}


def _details(target: Target) -> str:
    facts = (
        ("", target.capability),
        ("L4T ", target.l4t),
        ("power mode ", target.power_mode),
        ("driver ", target.driver_version),
        ("CUDA ", ".".join(map(str, target.cuda_version)) if target.cuda_version else None),
        ("MIG ", target.mig if target.mig == "slice" else None),
        (f"{target.cpu.cores} CPU cores: ", " ".join(target.cpu.features)),
    )
    return " · ".join(label + value for label, value in facts if value)
