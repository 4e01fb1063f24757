"""What is said before a GPU is touched: of its driver, its kind and its memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from farrier.targets.cuda.driver import driver_too_old
from farrier.targets.cuda.footprint import RESERVE_BYTES, Footprint, buffer_bytes, weight_bytes
from farrier.targets.cuda.plan import Buffer, Plan
from farrier.targets.engine import ENGINE_ABI, Ceilings, EngineConfig, Fingerprint
from farrier.targets.errors import InsufficientResourcesError
from farrier.targets.loading import misfit
from tests.integration.parrot import parrot_config
from tests.unit.test_detect import replay

GIB = 1 << 30
ENGINE = Footprint(weights=15 * GIB, buffers=GIB, kv_block=4 << 20)


@pytest.mark.parametrize(
    ("driver", "libraries"), [(12000, 12090), (12080, 12000), (13000, 13050), (13000, 12090), (14000, 13000)]
)
def test_drivers_of_the_same_major_version_or_a_later_one_do(driver: int, libraries: int) -> None:
    assert driver_too_old(driver, libraries) is None


@pytest.mark.parametrize(
    ("driver", "libraries", "said"),
    [
        (11040, 12090, ["up to 11.4", "need 12.0", "install driver 525 or newer."]),
        (12080, 13050, ["up to 12.8", "need 13.0", "install driver 580 or newer, or", "'cuda-bindings<13'"]),
        (11080, 13000, ["up to 11.8", "need 13.0", "install driver 580 or newer."]),
        (13000, 14010, ["up to 13.0", "need 14.0", "a driver for CUDA 14"]),
    ],
)
def test_an_older_driver_is_refused_with_the_one_that_is_needed(driver: int, libraries: int, said: list[str]) -> None:
    problem = driver_too_old(driver, libraries)
    assert problem is not None
    for part in said:
        assert part in problem


def test_an_engine_is_loaded_only_where_it_fits() -> None:
    ENGINE.check_load(ENGINE.weights + ENGINE.buffers + ENGINE.kv_block + RESERVE_BYTES)
    with pytest.raises(InsufficientResourcesError) as caught:
        ENGINE.check_load(ENGINE.weights + ENGINE.buffers)
    for number in (ENGINE.weights, ENGINE.buffers, ENGINE.kv_block, ENGINE.weights + ENGINE.buffers):
        assert f"{number}" in str(caught.value)


def test_as_many_blocks_as_are_offered_can_be_had() -> None:
    free = 20 * GIB
    most = ENGINE.max_blocks(free)
    ENGINE.check_pool(most, free)
    assert ENGINE.max_blocks(ENGINE.buffers) == 0
    with pytest.raises(InsufficientResourcesError) as caught:
        ENGINE.check_pool(10_000, free)
    for number in (10_000 * ENGINE.kv_block, ENGINE.buffers, free, f"{most} blocks"):
        assert f"{number}" in str(caught.value)


def test_buffers_hold_as_many_rows_as_the_ceilings_allow() -> None:
    buffers = (Buffer("a", "bf16", "#T", 100), Buffer("b", "i64", 3, 7), Buffer("c", "fp32", "#S", 5))
    plan = Plan(90, "bf16", "bf16", 64, False, buffers, {}, ())
    assert buffer_bytes(plan, {"#T": 10, "#B": 2, "#S": 4, "#tiles": 1}) == 2000 + 168 + 80
    assert weight_bytes([1, 256, 257]) == 256 + 256 + 512


def engine_for(architecture: str) -> EngineConfig:
    config = parrot_config(Ceilings(1, 1, 1))
    return replace(config, fingerprint=Fingerprint(ENGINE_ABI, "cuda", architecture, (), ()))


@pytest.mark.parametrize(
    ("machine", "architecture"),
    [("h200", "sm_90"), ("h100-sxm", "sm_90"), ("a100-40gb", "sm_80"), ("agx-orin-64gb-r36", "sm_87")],
)
def test_an_engine_fits_every_device_of_its_capability(machine: str, architecture: str, tmp_path: Path) -> None:
    assert misfit(engine_for(architecture), replay(machine, tmp_path)) is None


@pytest.mark.parametrize(
    ("machine", "found", "reason"),
    [
        ("a100-80gb", "sm_80 here", "build it again here."),
        ("agx-orin-64gb-r36", "sm_87 here", "build it again here."),
        ("cpu-x86-epyc", "none here", "build it again here."),
        ("a100-old-driver", "none here", "driver 470.256.02 supports CUDA only up to 11.4; install"),
        ("gpu-no-driver", "none here", "no driver is loaded; install"),
    ],
)
def test_another_capability_is_named(machine: str, found: str, reason: str, tmp_path: Path) -> None:
    mismatch = misfit(engine_for("sm_90"), replay(machine, tmp_path))
    assert mismatch is not None
    assert mismatch.field == "architecture"
    assert f"architecture is sm_90 in the engine, {found}" in str(mismatch)
    assert reason in str(mismatch)
