"""NVIDIA GPUs on PCI (and under WSL), from sysfs, the driver's /proc entry and NVML."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farrier.targets.probes import nvml as nv
from farrier.targets.probes.files import read_text
from farrier.targets.probes.memory import Memory
from farrier.targets.target import Cpu, Target, UnusableDevice, sm_name

MINIMUM_COMPUTE_CAPABILITY = (8, 0)
MINIMUM_CUDA = (12, 0)

_NAMED = (("A100", (8, 0)), ("H100", (9, 0)), ("H200", (9, 0)))
_INSTALL = "install the NVIDIA driver (525 or newer) and reboot"


@dataclass(frozen=True)
class PciGpu:
    """A display-class PCI device of NVIDIA; `driver` is the kernel driver bound to it."""

    address: str
    driver: str | None

    @property
    def label(self) -> str:
        return f"NVIDIA GPU at {self.address}"


@dataclass(frozen=True)
class _Driver:
    """What all GPUs of the machine share."""

    version: str | None
    cuda: tuple[int, int] | None


def probe_driver_version(root: Path) -> str | None:
    """The version of the loaded NVIDIA kernel module."""
    version = re.search(r"\b([0-9]{3,4}(?:\.[0-9]+){1,2})\b", read_text(root / "proc/driver/nvidia/version"))
    return version[1] if version else None


def probe_pci_gpus(root: Path) -> list[PciGpu]:
    try:
        folders = sorted((root / "sys/bus/pci/devices").iterdir())
    except OSError:
        return []
    return [
        PciGpu(folder.name, _bound_driver(folder))
        for folder in folders
        if read_text(folder / "vendor").strip() == "0x10de" and read_text(folder / "class").startswith("0x03")
    ]


def probe_gpus(
    root: Path, nvml: nv.Nvml, cpu: Cpu, memory: Memory, pci: list[PciGpu]
) -> tuple[list[Target], list[UnusableDevice]]:
    """Every NVIDIA GPU, usable (a MIG slice counts as one) or not."""
    module = probe_driver_version(root)
    if not pci and module is None and not (root / "usr/lib/wsl/lib/libnvidia-ml.so.1").exists():
        return [], []
    try:
        nvml.call("nvmlInit")
    except nv.NvmlError as error:
        if not pci:
            return [], [UnusableDevice("NVIDIA GPU", _init_failure(error, None, module))]
        return [], [UnusableDevice(gpu.label, _init_failure(error, gpu.driver, module)) for gpu in pci]
    try:
        return _enumerate(nvml, cpu, memory, pci, module)
    finally:
        nv.query(nvml, "nvmlShutdown")


def _enumerate(
    nvml: nv.Nvml, cpu: Cpu, memory: Memory, pci: list[PciGpu], module: str | None
) -> tuple[list[Target], list[UnusableDevice]]:
    targets: list[Target] = []
    unusable: list[UnusableDevice] = []
    seen: set[str] = set()
    cuda = nv.query(nvml, "nvmlSystemGetCudaDriverVersion_v2")
    driver = _Driver(
        version=nv.query(nvml, "nvmlSystemGetDriverVersion") or module,
        cuda=(cuda // 1000, cuda % 1000 // 10) if cuda else None,
    )
    for index in range(nv.query(nvml, "nvmlDeviceGetCount") or 0):
        label = f"NVIDIA GPU {index}"
        try:
            handle = nvml.call("nvmlDeviceGetHandleByIndex", index)
            address = _pci_address(nvml.call("nvmlDeviceGetPciInfo", handle).busId)
            seen.add(address)
            label = f"{nvml.call('nvmlDeviceGetName', handle)} at {address}"
            capability = tuple(nvml.call("nvmlDeviceGetCudaComputeCapability", handle))
            if reason := _too_old(capability, driver):
                unusable.append(UnusableDevice(label, reason))
                continue
            found = _targets_of(nvml, handle, capability, driver, cpu, memory)
        except nv.NvmlError as error:
            unusable.append(UnusableDevice(label, f"NVML reports: {error}"))
            continue
        targets += found
        if not found:
            unusable.append(UnusableDevice(label, "MIG mode is on but has no slice; create one with nvidia-smi mig"))
    # A GPU that belongs to another container is bound to the driver and not listed: no fault of this one.
    unlisted = [gpu for gpu in pci if gpu.address not in seen and (gpu.driver != "nvidia" or not seen)]
    unusable += [UnusableDevice(gpu.label, _unlisted(gpu.driver)) for gpu in unlisted]
    return targets, unusable


def _targets_of(
    nvml: nv.Nvml, gpu: Any, capability: tuple[int, int], driver: _Driver, cpu: Cpu, memory: Memory
) -> list[Target]:
    """The GPU itself, or its MIG slices (perhaps none) where MIG mode is on."""
    mig = nv.query(nvml, "nvmlDeviceGetMigMode", gpu)
    sliced = mig is not None and mig[0] == 1
    handles = _mig_slices(nvml, gpu) if sliced else [gpu]
    targets = []
    for handle in handles:
        product = nvml.call("nvmlDeviceGetName", handle)
        size = _own_memory(nvml, handle)
        targets.append(
            Target(
                name=_target_name(capability, product),
                kind="cuda",
                device_name=product,
                device_id=nv.query(nvml, "nvmlDeviceGetUUID", handle),
                cpu=cpu,
                memory_total=size.total if size else memory.total,
                memory_available=size.free if size else memory.available,
                unified_memory=size is None,
                memory_bandwidth=None if sliced else _memory_bandwidth(nvml, handle),
                compute_capability=capability,
                driver_version=driver.version,
                cuda_version=driver.cuda,
                mig=None if mig is None else "slice" if sliced else "disabled",
            )
        )
    return targets


def _own_memory(nvml: nv.Nvml, handle: Any) -> Any | None:
    """NVML's total and free bytes, or None for a GPU that shares the host's memory: it has no such query."""
    try:
        return nvml.call("nvmlDeviceGetMemoryInfo", handle)
    except nv.NvmlError as error:
        if error.code != nv.NOT_SUPPORTED:
            raise
        return None


def _mig_slices(nvml: nv.Nvml, gpu: Any) -> list[Any]:
    count = nv.query(nvml, "nvmlDeviceGetMaxMigDeviceCount", gpu) or 0
    slices = (nv.query(nvml, "nvmlDeviceGetMigDeviceHandleByIndex", gpu, index) for index in range(count))
    return [handle for handle in slices if handle is not None]


def _target_name(capability: tuple[int, int], product: str) -> str:
    """ "h100", "a100-mig-1g.5gb", and "cuda-sm_89" for what has no name of its own here."""
    name = next((n.lower() for n, sm in _NAMED if sm == capability and re.search(rf"\b{n}\b", product)), None)
    profile = re.search(r"\bMIG (\S+)$", product)
    return (name or f"cuda-{sm_name(capability)}") + (f"-mig-{profile[1]}" if profile else "")


def _memory_bandwidth(nvml: nv.Nvml, handle: Any) -> float | None:
    """Peak bytes/s: the bus moves two bits per wire in each cycle of the clock NVML reports (in MHz)."""
    bus_bits = nv.query(nvml, "nvmlDeviceGetMemoryBusWidth", handle)
    clock = nv.query(nvml, "nvmlDeviceGetMaxClockInfo", handle, nv.CLOCK_MEMORY)
    return bus_bits / 8 * clock * 1e6 * 2 if bus_bits and clock else None


def _too_old(capability: tuple[int, int], driver: _Driver) -> str | None:
    if capability < MINIMUM_COMPUTE_CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}; farrier needs 8.0 or higher"
    if driver.cuda is not None and driver.cuda < MINIMUM_CUDA:
        return f"driver {driver.version} supports CUDA only up to {driver.cuda[0]}.{driver.cuda[1]}; {_INSTALL}"
    return None


def _init_failure(error: nv.NvmlError, bound: str | None, module: str | None) -> str:
    if bound not in (None, "nvidia"):
        return f"it is bound to the kernel driver {bound}; {_INSTALL}"
    if error.code == nv.LIBRARY_DRIVER_MISMATCH:
        return f"the driver library does not match the loaded kernel module {module or ''}".rstrip() + "; reboot"
    if error.code == nv.NO_PERMISSION:
        return "this user may not open /dev/nvidiactl; add the user to the group that owns it"
    if module is None:
        return f"no driver is loaded; {_INSTALL}"
    if error.code == nv.LIBRARY_NOT_FOUND:
        return f"driver {module} is loaded but libnvidia-ml.so.1 is missing; start the container with --gpus all"
    return f"driver {module} is loaded but NVML fails to start: {error}"


def _unlisted(bound: str | None) -> str:
    if bound == "nvidia":
        return "its driver is loaded but lists no GPU; look for errors in dmesg, or start the container with --gpus all"
    return f"it is bound to {f'the kernel driver {bound}' if bound else 'no kernel driver'}, not to nvidia"


def _bound_driver(folder: Path) -> str | None:
    try:
        return (folder / "driver").readlink().name
    except OSError:
        return None


def _pci_address(bus_id: str) -> str:
    """NVML's "00000000:01:00.0" as sysfs spells it, "0000:01:00.0"."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"
