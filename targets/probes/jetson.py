"""NVIDIA Jetson boards, from the device tree, /etc/nv_tegra_release and nvpmodel's files."""

import re
from dataclasses import dataclass
from pathlib import Path

from farrier.targets.probes.files import read_int, read_text

# Compute capability of the GPU inside each Tegra chip, by chip id (0x23 is "tegra234").
_CHIPS = {0x21: (5, 3), 0x18: (6, 2), 0x19: (7, 2), 0x23: (8, 7), 0x26: (11, 0)}


@dataclass(frozen=True)
class _Product:
    name: str
    pattern: str  # the module's part number in `compatible`, or its name in `model`
    memory_bandwidth: float | None


_PRODUCTS = (
    _Product("agx-orin", r"p3701-|AGX Orin", 204.8e9),
    _Product("jetson-orin-nx", r"p3767-000[01]|Orin NX", 102.4e9),
    _Product("jetson-orin-nano", r"p3767-000[345]|Orin Nano", None),  # depends on the power mode
    _Product("jetson-thor", r"p3834-|Thor", 273e9),
)

# Any of these appears only once the GPU's kernel driver has come up, and is what a container must be given.
_GPU_NODES = ("dev/nvgpu/igpu0/ctrl", "dev/nvhost-ctrl-gpu", "dev/nvidiactl")


@dataclass(frozen=True)
class Jetson:
    """`compute_capability` is None for a chip that is not known; `has_gpu_node`: its driver is up."""

    name: str
    device_name: str
    serial: str | None
    chip: int
    compute_capability: tuple[int, int] | None
    memory_bandwidth: float | None
    l4t: str | None
    power_mode: str | None
    has_gpu_node: bool


def probe_jetson(root: Path, installed_memory: int) -> Jetson | None:
    """The board, or None on a machine without a Tegra chip. `installed_memory` in bytes."""
    compatible = read_text(root / "proc/device-tree/compatible").replace("\0", " ")
    model = read_text(root / "proc/device-tree/model") or read_text(root / "sys/devices/soc0/machine").strip()
    chip = _chip_id(root, compatible)
    if chip is None:
        return None
    product = _product(compatible) or _product(model)
    capability = _CHIPS.get(chip)
    if product is not None:
        name = f"{product.name}-{_module_gigabytes(installed_memory)}gb"
    else:
        name = f"jetson-sm_{capability[0]}{capability[1]}" if capability else f"jetson-tegra{chip:x}"
    return Jetson(
        name=name,
        device_name=model or "NVIDIA Jetson",
        serial=read_text(root / "proc/device-tree/serial-number") or None,
        chip=chip,
        compute_capability=capability,
        memory_bandwidth=product.memory_bandwidth if product else None,
        l4t=_l4t(read_text(root / "etc/nv_tegra_release")),
        power_mode=_power_mode(root),
        has_gpu_node=any((root / node).exists() for node in _GPU_NODES),
    )


def _chip_id(root: Path, compatible: str) -> int | None:
    """From the device tree; containers hide that, and then from the SoC driver's sysfs node."""
    if match := re.search(r"nvidia,tegra([0-9a-f]{2})[0-9a-f]\b", compatible):
        return int(match[1], 16)
    if read_text(root / "sys/devices/soc0/family").strip() == "Tegra":
        return read_int(root / "sys/devices/soc0/soc_id")
    return None


def _product(text: str) -> _Product | None:
    return next((product for product in _PRODUCTS if re.search(product.pattern, text)), None)


def _module_gigabytes(installed_memory: int) -> int:
    """The module's memory size: firmware carves some off, so the next power of two."""
    return 1 << ((max(installed_memory, 1) - 1) >> 30).bit_length()


def _l4t(release: str) -> str | None:
    match = re.search(r"R([0-9]+) \(release\), REVISION: ([0-9]+(?:\.[0-9]+)*)", release)
    return f"{match[1]}.{match[2]}" if match else None


def _power_mode(root: Path) -> str | None:
    """The name of the current mode; ids mean different modes on different boards, so never the id alone."""
    status = re.search(r"pmode:([0-9]{1,4})", read_text(root / "var/lib/nvpmodel/status"))
    if status is None:
        return None
    modes = re.findall(
        r"^\s*<\s*POWER_MODEL\s+ID=([0-9]{1,4})\s+NAME=(\S+)", read_text(root / "etc/nvpmodel.conf"), re.MULTILINE
    )
    names: dict[int, str] = {int(number): name for number, name in modes}
    return names.get(int(status[1]), f"unnamed mode {int(status[1])}")
