"""The two ceilings of this machine's GPU, measured: a streaming read, and a bf16 matrix product by cuBLASLt.

python tests/device/ceilings.py [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import triton
import triton.language as tl

from farrier.plugins.kernel import KernelSource, PerRows, Variant, compile_kernel

READ_BYTES = 4 << 30
"""Far more than a cache holds."""
_READS = ((2048, 16, 4), (4096, 8, 8), (4096, 16, 8), (8192, 8, 8), (8192, 8, 16), (16384, 4, 16))
_PRODUCTS = ((8192, 8192, 8192), (8192, 28672, 4096), (16384, 8192, 8192))
_REPEATS = 9


@triton.jit
def stream_read(x, out, BLOCK: tl.constexpr, LOADS: tl.constexpr):  # noqa: N803
    """Sums BLOCK · LOADS words a program: every word is read once and nearly nothing is written."""
    program = tl.program_id(0)
    start = program.to(tl.int64) * BLOCK * LOADS
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for load in tl.static_range(LOADS):
        total += tl.load(x + start + load * BLOCK + offsets, eviction_policy="evict_first")
    tl.store(out + program, tl.sum(total, 0))


@dataclass(frozen=True)
class StreamRead(Variant):
    """Arguments: x i32 `[rows · block · loads]`, out i32 `[rows]`: the sum of each program's words."""

    block: int
    loads: int
    num_warps: int

    def source(self) -> KernelSource:
        constants = {"BLOCK": self.block, "LOADS": self.loads}
        return KernelSource(stream_read, {"x": "*i32", "out": "*i32"}, constants, num_warps=self.num_warps)

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        return (PerRows(),)


def measure() -> dict[str, float | str]:
    """Bytes and floating-point operations a second, the best of a few kernels or shapes each."""
    from farrier.targets.cuda.device import open_device

    device = open_device()
    return {
        "device": device.name,
        "read_bytes_per_s": max(_read(StreamRead(*fields)) for fields in _READS),
        "bf16_flop_per_s": max(_product(*shape) for shape in _PRODUCTS),
    }


def _read(variant: StreamRead) -> float:
    from cuda.bindings import driver

    from farrier.targets.cuda.compile import described
    from farrier.targets.cuda.device import Array, DeviceMemory, LoadedKernel, PreparedLaunch, check, open_device

    device = open_device()
    capability = device.compute_capability
    compiled = compile_kernel(variant.source(), 10 * capability.major + capability.minor)
    programs = READ_BYTES // (4 * variant.block * variant.loads)
    memory, loaded, stream = DeviceMemory(), LoadedKernel(described(compiled), compiled.cubin), device.create_stream()
    try:
        x = memory.allocate(READ_BYTES)
        check(driver.cuMemsetD32(x, 3, READ_BYTES // 4))
        sums = np.zeros(programs, np.int32)
        out = memory.allocate(sums.nbytes)
        arguments = [Array(x, "i32", (READ_BYTES // 4,)), Array(out, "i32", (programs,))]
        launch = PreparedLaunch(loaded, (programs, 1, 1), arguments)
        seconds = _timed(stream, lambda: launch.launch({}, stream))
        check(driver.cuMemcpyDtoH(sums.ctypes.data, out, sums.nbytes))
        assert (sums == 3 * variant.block * variant.loads).all(), "not everything was read"
        return READ_BYTES / seconds
    finally:
        loaded.close()
        memory.close()
        stream.close()


def _product(rows: int, n: int, k: int) -> float:
    from cuda.bindings import driver

    from farrier.targets.bfloat16 import to_bfloat16
    from farrier.targets.cuda.device import Array, DeviceMemory, check, open_device
    from farrier.targets.cuda.library import Library

    device = open_device()
    memory, stream = DeviceMemory(), device.create_stream()
    # Random, as real data is: the clock depends on how many bits toggle.
    pool = to_bfloat16(np.random.default_rng(0).standard_normal(1 << 24, np.float32))

    def sent(shape: tuple[int, int]) -> Array:
        address = memory.allocate(2 * shape[0] * shape[1])
        for start in range(0, shape[0] * shape[1], len(pool)):
            size = min(len(pool), shape[0] * shape[1] - start)
            check(driver.cuMemcpyHtoD(address + 2 * start, pool.ctypes.data, 2 * size))
        return Array(address, "bf16", shape)

    library = Library(memory)
    try:
        x, weight, out = sent((rows, k)), sent((n, k)), Array(memory.allocate(2 * rows * n), "bf16", (rows, n))
        seconds = _timed(stream, lambda: library.multiply(x, weight, None, out, rows, accumulate=False, stream=stream))
        return 2 * rows * n * k / seconds
    finally:
        library.close()
        memory.close()
        stream.close()


def _timed(stream, enqueue: Callable[[], None]) -> float:  # type: ignore[no-untyped-def]
    """Seconds of one call: the median of several runs, each long enough that the clock is what load makes it."""
    from cuda.core import EventOptions

    timing, calls = EventOptions(timing_enabled=True), 8
    for _ in range(calls):
        enqueue()
    stream.sync()
    seconds = []
    for _ in range(_REPEATS):
        start = stream.record(options=timing)
        for _ in range(calls):
            enqueue()
        end = stream.record(options=timing)
        end.sync()
        seconds.append((end - start) / 1000 / calls)
    return median(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure()
    print(f"{found['device']}: reads {float(found['read_bytes_per_s']) / 1e12:.2f} TB/s, ", end="")
    print(f"multiplies bf16 at {float(found['bf16_flop_per_s']) / 1e12:.0f} TFLOP/s")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
