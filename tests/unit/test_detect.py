"""Detection against recorded machines (tests/fixtures/machines), and against garbage."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from farrier.targets.detect import Detection, detect, detection_to_dict, render, select_target
from farrier.targets.errors import TargetError
from farrier.targets.probes.nvml import NvmlError
from farrier.targets.target import Target, memory_budget

MACHINES = Path(__file__).parents[1] / "fixtures" / "machines"
NAMES = sorted(path.stem for path in MACHINES.glob("*.json"))
GIB = 1 << 30


class RecordedNvml:
    """Answers each call as `log` has it; what is not in there is not supported."""

    def __init__(self, log: dict[str, Any]) -> None:
        self._log = log

    def call(self, function: str, *args: Any) -> Any:
        result = self._log.get(f"{function}({', '.join(map(str, args))})", {"error": [3, "Not Supported"]})
        if not isinstance(result, dict):
            return result
        if "error" in result:
            raise NvmlError(*result["error"])
        return SimpleNamespace(**result)


def load(name: str) -> dict[str, Any]:
    recording: dict[str, Any] = json.loads((MACHINES / f"{name}.json").read_text())
    return recording


def lay_out(recording: dict[str, Any], root: Path) -> None:
    for name, lines in recording["files"].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("\n".join(lines))
    for name, target in recording["links"].items():
        (root / name).symlink_to(target)


def replay(name: str, root: Path) -> Detection:
    recording = load(name)
    lay_out(recording, root)
    return detect(root, RecordedNvml(recording["nvml"]))


@pytest.mark.parametrize("name", NAMES)
def test_every_fact_of_every_recorded_machine(name: str, tmp_path: Path) -> None:
    found = detection_to_dict(replay(name, tmp_path))
    assert json.loads(json.dumps(found)) == load(name)["expected"]


# fixture, chosen target, kind, capability, memory of the product in GiB, its published bandwidth in GB/s
CHOSEN = [
    ("h100-sxm", "h100", "cuda", "sm_90", 80, 3350),
    ("h200", "h200", "cuda", "sm_90", 141, 4800),
    ("h200-one-of-eight", "h200", "cuda", "sm_90", 141, 4800),
    ("h100-mig", "h100-mig-3g.40gb", "cuda", "sm_90", 40, None),
    ("a100-40gb", "a100", "cuda", "sm_80", 40, 1555),
    ("a100-80gb", "a100", "cuda", "sm_80", 80, 2039),
    ("rtx-4090", "cuda-sm_89", "cuda", "sm_89", 24, 1008),
    ("rtx-3090", "cuda-sm_86", "cuda", "sm_86", 24, 936),
    ("gb10", "cuda-sm_121", "cuda", "sm_121", 120, None),
    ("agx-orin-64gb-r36", "agx-orin-64gb", "jetson", "sm_87", 62, 204.8),
    ("agx-orin-64gb-r39", "agx-orin-64gb", "jetson", "sm_87", 62, 204.8),
    ("agx-orin-32gb-r35", "agx-orin-32gb", "jetson", "sm_87", 30, 204.8),
    ("agx-orin-container", "jetson-sm_87", "jetson", "sm_87", 32, None),
    ("orin-nx-16gb", "jetson-orin-nx-16gb", "jetson", "sm_87", 15.5, 102.4),
    ("thor", "jetson-thor-128gb", "jetson", "sm_110", 123, 273),
    ("cpu-x86-epyc", "cpu-x86_64", "cpu", "x86_64+bf16", 23.5, None),
    ("cpu-arm64-neoverse", "cpu-aarch64", "cpu", "aarch64+bf16", 7.6, None),
    ("container-memory-limit", "cpu-x86_64", "cpu", "x86_64+bf16", 4, None),
    ("systemd-memory-max", "cpu-x86_64", "cpu", "x86_64+bf16", 16, None),
]


@pytest.mark.parametrize(("fixture", "name", "kind", "capability", "gib", "gb_per_s"), CHOSEN)
def test_the_best_usable_device_is_chosen_without_a_warning(
    fixture: str, name: str, kind: str, capability: str, gib: float, gb_per_s: float | None, tmp_path: Path
) -> None:
    detection = replay(fixture, tmp_path)
    target = detection.chosen
    assert (target.name, target.kind, target.capability) == (name, kind, capability)
    assert target.memory_total / GIB == pytest.approx(gib, rel=0.02)
    if gb_per_s is None:
        assert target.memory_bandwidth is None
    else:
        assert target.memory_bandwidth == pytest.approx(gb_per_s * 1e9, rel=0.03)
    assert (detection.warnings, detection.degraded_reason) == ((), None)


@pytest.mark.parametrize(
    ("fixture", "reason"),
    [
        ("gpu-no-driver", "NVIDIA GPU at 0000:01:00.0 cannot be used: no driver is loaded; install"),
        ("gpu-nouveau", "bound to the kernel driver nouveau; install"),
        ("gpu-driver-mismatch", "does not match the loaded kernel module 550.107.02; reboot"),
        ("gpu-container-without-library", "libnvidia-ml.so.1 is missing; start the container with --gpus all"),
        ("t4", "Tesla T4 at 0000:00:1e.0 cannot be used: its compute capability is 7.5"),
        ("xavier", "its compute capability is 7.2"),
        ("a100-old-driver", "driver 470.256.02 supports CUDA only up to 11.4; install"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_never_silently_replaced(fixture: str, reason: str, tmp_path: Path) -> None:
    detection = replay(fixture, tmp_path)
    assert select_target(detection, "auto").kind == "cpu"
    assert detection.degraded_reason is not None
    assert reason in detection.degraded_reason
    assert detection.warnings == (detection.degraded_reason,)
    with pytest.raises(TargetError) as refused:
        select_target(detection, "cuda")
    assert reason in str(refused.value)
    console = Console(width=400, color_system=None)
    with console.capture() as shown:
        console.print(render(detection))
    assert reason in shown.get()


def test_a_jetson_without_its_gpu_driver_says_so(tmp_path: Path) -> None:
    lay_out(load("agx-orin-64gb-r36"), tmp_path)
    shutil.rmtree(tmp_path / "dev")
    detection = detect(tmp_path, RecordedNvml({}))
    assert detection.chosen.name == "cpu-aarch64"
    assert "NVIDIA Jetson AGX Orin Developer Kit cannot be used: its GPU driver is not up" in detection.warnings[0]


def test_an_unknown_tegra_chip_is_reported_not_guessed(tmp_path: Path) -> None:
    recording = load("agx-orin-64gb-r36")
    recording["files"]["proc/device-tree/compatible"] = ["nvidia,p9999-0000\0nvidia,tegra424\0"]
    lay_out(recording, tmp_path)
    detection = detect(tmp_path, RecordedNvml({}))
    assert detection.chosen.kind == "cpu"
    assert "Tegra id 0x42" in detection.warnings[0]


def test_mig_mode_without_a_slice_is_unusable(tmp_path: Path) -> None:
    recording = load("h100-mig")
    recording["nvml"]["nvmlDeviceGetMaxMigDeviceCount(gpu0)"] = 0
    lay_out(recording, tmp_path)
    detection = detect(tmp_path, RecordedNvml(recording["nvml"]))
    assert detection.chosen.kind == "cpu"
    assert "MIG mode is on but has no slice" in detection.warnings[0]


def test_a_lost_gpu_does_not_hide_the_others(tmp_path: Path) -> None:
    recording = load("h200")
    lay_out(recording, tmp_path)
    lost = {"nvmlDeviceGetCount()": 2, "nvmlDeviceGetHandleByIndex(1)": {"error": [15, "GPU is lost"]}}
    detection = detect(tmp_path, RecordedNvml(recording["nvml"] | lost))
    assert detection.chosen.name == "h200"
    assert detection.degraded_reason is None
    assert detection.warnings == ("NVIDIA GPU 1 cannot be used: NVML reports: GPU is lost.",)


def test_a_driver_that_lists_no_gpu_is_reported(tmp_path: Path) -> None:
    recording = load("h200")
    lay_out(recording, tmp_path)
    detection = detect(tmp_path, RecordedNvml(recording["nvml"] | {"nvmlDeviceGetCount()": 0}))
    assert "its driver is loaded but lists no GPU" in detection.warnings[0]


def test_select_target(tmp_path: Path) -> None:
    detection = replay("h100-mig", tmp_path)
    assert select_target(detection).name == "h100-mig-3g.40gb"
    assert select_target(detection, "h100-mig-1g.10gb").memory_total < 10 * GIB
    assert select_target(detection, "cuda") is detection.chosen
    assert select_target(detection, "cpu").name == "cpu-x86_64"
    with pytest.raises(TargetError, match=r"no target 'a100'.*found: h100-mig-3g.40gb, h100-mig-1g.10gb, cpu-x86_64"):
        select_target(detection, "a100")


def test_memory_budgets(tmp_path: Path) -> None:
    def chosen(name: str) -> Target:
        return replay(name, tmp_path / name).chosen

    h200, orin = chosen("h200"), chosen("agx-orin-64gb-r36")
    assert memory_budget(h200) == h200.memory_available == (143771 - 530) << 20  # what NVML calls free
    assert memory_budget(orin) == 60129280 * 1024 - orin.memory_total // 16  # MemAvailable less the reserve
    # 4 GiB limit, 1.5 GiB in use of which 0.75 GiB is droppable cache, 0.25 GiB reserve
    assert memory_budget(chosen("container-memory-limit")) == 3 * GIB
    # the slice's 16 GiB bind, not the service's own "max"
    assert memory_budget(chosen("systemd-memory-max")) == 16 * GIB - 2 * GIB - GIB


def test_hyper_threads_are_not_cores(tmp_path: Path) -> None:
    assert replay("rtx-3090", tmp_path).chosen.cpu.cores == 16  # of 32 logical processors


def test_instructions_that_only_some_cores_have_do_not_count(tmp_path: Path) -> None:
    recording = load("cpu-arm64-neoverse")
    lay_out(recording, tmp_path)
    first, _, rest = (tmp_path / "proc/cpuinfo").read_text().partition("\n\n")
    (tmp_path / "proc/cpuinfo").write_text(f"{first.replace(' bf16', '').replace(' sve', '')}\n\n{rest}")
    cpu = detect(tmp_path, RecordedNvml({})).chosen.cpu
    assert cpu.features == ("asimd", "asimddp", "i8mm")
    assert not cpu.native_bf16


def test_the_device_id_of_a_cpu_is_stable_and_hides_the_machine_id(tmp_path: Path) -> None:
    lay_out(load("cpu-x86-epyc"), tmp_path)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    first, second = (detect(tmp_path, RecordedNvml({})).chosen.device_id for _ in range(2))
    assert first == second
    assert first not in (None, "0123456789abcdef0123456789abcdef")


def test_this_machine() -> None:
    detection = detect()
    assert detection.targets[-1].kind == "cpu"
    assert 0 < detection.targets[-1].memory_available <= detection.targets[-1].memory_total


FILES = sorted({file for name in NAMES for file in load(name)["files"]})
NASTY = [
    b"MemTotal: 99999999999999999999999 kB\nMemAvailable: 12 kB",
    b"processor : 0\nmodel name\n\nprocessor\ncpu part : 0xzz\ncpu implementer : 0x41",
    b"0::/../../\0/..\n3:memory:relative",
    b"pmode:9999",
    b"nvidia,tegraff9",
    b"nvidia,tegra234\0nvidia,p3701-",
    b"99999999999999999999",
    "\u0661\u0662\u00b2".encode(),
]
GARBAGE = st.one_of(st.binary(max_size=100), st.sampled_from(NASTY))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a shared machine is slow now and then
@given(machine=st.sampled_from(NAMES), garbage=st.dictionaries(st.sampled_from(FILES), st.none() | GARBAGE))
def test_garbage_in_any_file_never_raises(machine: str, garbage: dict[str, bytes | None]) -> None:
    recording = load(machine)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        lay_out(recording, root)
        for name, content in garbage.items():
            (root / name).unlink(missing_ok=True)
            if content is None:
                (root / name).mkdir(parents=True)
            else:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
        detection = detect(root, RecordedNvml(recording["nvml"]))
        json.dumps(detection_to_dict(detection))
        assert detection.targets[-1].kind == "cpu"
        assert all(memory_budget(target) >= 0 for target in detection.targets)
