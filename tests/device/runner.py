"""Runs `KernelSource`s on this machine's GPU over numpy arrays, with the executor's own launching."""

from functools import cache
from typing import Any

import numpy as np
from cuda.bindings import driver

from farrier.plugins.kernel import KernelSource, compile_kernel
from farrier.targets.cuda.compile import described
from farrier.targets.cuda.device import Array, DeviceMemory, LoadedKernel, PreparedLaunch, check, open_device


def run(source: KernelSource, grid: tuple[int, ...], *arguments: Any) -> None:
    """The same as `tests.kernels.interpreter.run`: numpy arrays are written in place."""
    assert len(arguments) == len(source.arguments), f"expected {list(source.arguments)}"
    device, capability = _device()
    compiled = compile_kernel(source, capability)
    memory = DeviceMemory()
    loaded = LoadedKernel(described(compiled), compiled.cubin)
    stream = device.create_stream()
    try:
        sent: list[Any] = []
        for (name, type_), value in zip(source.arguments.items(), arguments, strict=True):
            if isinstance(value, np.ndarray):
                assert value.flags.c_contiguous, f"{name} is not contiguous"
                address = memory.allocate(value.nbytes)
                check(driver.cuMemcpyHtoD(address, value.ctypes.data, value.nbytes))
                sent.append(Array(address, type_, value.shape))
            else:
                sent.append(value)
        x, y, z = (*grid, 1, 1)[:3]
        PreparedLaunch(loaded, (x, y, z), sent).launch({}, stream)
        stream.sync()
        for value, array in zip(arguments, sent, strict=True):
            if isinstance(value, np.ndarray):
                check(driver.cuMemcpyDtoH(value.ctypes.data, array.address, value.nbytes))
    finally:
        loaded.close()
        memory.close()
        stream.close()


@cache
def _device() -> tuple[Any, int]:
    device = open_device()
    capability = device.compute_capability
    return device, 10 * capability.major + capability.minor
