"""The GPU: opening it, memory on it, and kernel launches prepared once and repeated at little cost."""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver
from cuda.core import Device, Stream

from farrier.targets.cuda.driver import driver_too_old
from farrier.targets.cuda.plan import Extent, Kernel, Size
from farrier.targets.errors import EngineError, InsufficientResourcesError

Sizes = Mapping[Size, int]

_OUT_OF_MEMORY = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
_NOT_ITS_CODE = (
    driver.CUresult.CUDA_ERROR_INVALID_IMAGE,
    driver.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU,
    driver.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
)
_TENSOR_MAP_BYTES = 128
_ALIGNMENT = 64
_SCALARS: dict[str, Any] = {
    "i1": np.int8,
    "i8": np.int8,
    "u8": np.uint8,
    "i16": np.int16,
    "i32": np.int32,
    "u32": np.uint32,
    "i64": np.int64,
    "u64": np.uint64,
    "fp32": np.float32,
    "fp64": np.float64,
}


def check(result: tuple[Any, ...]) -> Any:
    """The value of a driver call. Raises InsufficientResourcesError or EngineError naming what CUDA says."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(status)
        _, text = driver.cuGetErrorString(status)
        message = f"{text.decode()} ({name.decode()})" if isinstance(name, bytes) else str(status)
        if status == _OUT_OF_MEMORY:
            raise InsufficientResourcesError(f"The GPU's memory does not suffice, {_free()}: {message}.")
        raise EngineError(f"CUDA failed: {message}; start the engine again.", code="device_failed")
    return values[0] if len(values) == 1 else tuple(values)


@contextmanager
def farrier_errors() -> Iterator[None]:
    """Raises whatever cuda-core and cuBLASLt raise as InsufficientResourcesError or EngineError."""
    try:
        yield
    except Exception as error:
        source = type(error).__module__.partition(".")[0]
        if source not in ("cuda", "nvmath"):
            raise
        if source == "nvmath":
            check(driver.cuCtxSynchronize())  # it may have met what an earlier kernel did, and this names that
        if _OUT_OF_MEMORY.name in str(error):
            raise InsufficientResourcesError(f"The GPU's memory does not suffice, {_free()}: {error}") from error
        raise EngineError(f"The GPU failed: {error}; start the engine again.", code="device_failed") from error


def open_device() -> Device:
    """The first GPU, made current in this thread. Raises EngineError when there is none that can be used."""
    try:
        problem = driver_too_old(check(driver.cuDriverGetVersion()), driver.CUDA_VERSION)
    except Exception as error:  # the driver's library is missing, or not the kernel module's
        raise EngineError(f"No NVIDIA GPU can be used: {error}") from error
    if problem is not None:
        raise EngineError(problem, code="driver_too_old")
    try:
        device = Device(0)
        device.set_current()
    except Exception as error:  # cuda-core raises its own type, RuntimeError or ImportError by what is missing
        raise EngineError(f"No NVIDIA GPU can be used: {error}") from error
    return device


def free_memory() -> int:
    """Bytes free on the current device."""
    free, _ = check(driver.cuMemGetInfo())
    return int(free)


def _free() -> str:
    status, free, total = driver.cuMemGetInfo()
    return f"{free} of {total} bytes are free" if status == driver.CUresult.CUDA_SUCCESS else "it does not say how much"


def shares_memory(device: Device) -> bool:
    """Whether the device's memory is the host's."""
    attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED
    return bool(check(driver.cuDeviceGetAttribute(attribute, device.device_id)))


class DeviceMemory:
    """Device allocations that live until `close`."""

    def __init__(self) -> None:
        self._pointers: list[int] = []

    def allocate(self, size: int) -> int:
        """Address of `size` bytes, aligned to 256, zeroed. Raises InsufficientResourcesError."""
        result = driver.cuMemAlloc(max(size, 16))
        if result[0] == _OUT_OF_MEMORY:
            raise InsufficientResourcesError(
                f"{size} bytes of GPU memory were asked for at once, {_free()}; free some, or build a smaller engine."
            )
        pointer = int(check(result))
        self._pointers.append(pointer)
        check(driver.cuMemsetD8(pointer, 0, max(size, 16)))
        return pointer

    def close(self) -> None:
        while self._pointers:
            driver.cuMemFree(self._pointers.pop())


class PinnedMemory:
    """Host memory the device reads and writes directly; `array` is a view of all its bytes."""

    def __init__(self, size: int) -> None:
        self._address = 0
        result = driver.cuMemHostAlloc(size, 0)
        if result[0] == _OUT_OF_MEMORY:
            raise InsufficientResourcesError(f"The host cannot pin {size} bytes of memory for the GPU; free some.")
        self._address = int(check(result))
        self.array: npt.NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._address))

    @property
    def address(self) -> int:
        return self._address

    def close(self) -> None:
        if self._address:
            driver.cuMemFreeHost(self._address)
            self._address = 0


@dataclass(frozen=True)
class Array:
    """A device tensor: address, Triton type name of its elements, and shape."""

    address: int
    type: str
    shape: tuple[int, ...]


class LoadedKernel:
    """A kernel's code on the device."""

    def __init__(self, kernel: Kernel, cubin: bytes) -> None:
        self.kernel = kernel
        result = driver.cuModuleLoadData(cubin)
        if result[0] in _NOT_ITS_CODE:
            raise EngineError(
                f"The GPU's driver refuses the engine's machine code ({result[0].name}); install a newer driver, or "
                "build the engine again on this machine.",
                code="driver_too_old",
            )
        self._module = check(result)
        self.function = check(driver.cuModuleGetFunction(self._module, kernel.entry.encode()))
        if kernel.shared_bytes > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(self.function, attribute, kernel.shared_bytes))

    def close(self) -> None:
        driver.cuModuleUnload(self._module)


class PreparedLaunch:
    """A kernel with its arguments packed; `launch` fills in the sizes of the step.

    `arguments` follow the kernel's source: an Array for a pointer or a tensor descriptor, None for a null pointer,
    a size's name or a number for the rest.
    """

    def __init__(
        self, loaded: LoadedKernel, grid: Sequence[Extent], arguments: Sequence[Array | Size | int | float | None]
    ) -> None:
        packer = _Packer(loaded.kernel, arguments)
        self._function = loaded.function
        self._grid = tuple(grid)
        self._memory = packer.memory
        self._sized = packer.sized
        self._pointers = packer.pointers
        self._config = driver.CUlaunchConfig()
        self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = 1, 1, 1
        self._config.blockDimX, self._config.blockDimY, self._config.blockDimZ = 32 * loaded.kernel.num_warps, 1, 1
        self._config.sharedMemBytes = loaded.kernel.shared_bytes
        if loaded.kernel.pdl:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            self._config.attrs = [attribute]
            self._config.numAttrs = 1

    def launch(self, sizes: Sizes, stream: Stream) -> None:
        """Enqueues on `stream`, or records into the graph being captured there. Nothing happens for an empty grid."""
        x, y, z = (extent if isinstance(extent, int) else _count(extent, sizes) for extent in self._grid)
        if not x * y * z:
            return
        for view, size in self._sized:
            view[0] = sizes[size]
        config = self._config
        config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
        config.hStream = stream.handle
        check(driver.cuLaunchKernelEx(config, self._function, self._pointers.ctypes.data, 0))


def _count(extent: tuple[Size, int, int], sizes: Sizes) -> int:
    size, block, factor = extent
    return -(-sizes[size] // block) * factor


class _Packer:
    """Lays arguments out in memory as the driver wants them: the values, and an array of pointers to them."""

    def __init__(self, kernel: Kernel, arguments: Sequence[Array | Size | int | float | None]) -> None:
        space = sum(_TENSOR_MAP_BYTES if type_ == "tensormap" else 16 for type_ in kernel.parameters) + 32
        raw = np.zeros(space + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        self.memory = raw[start : start + space]
        self._offset = 0
        self._addresses: list[int] = []
        self.sized: list[tuple[npt.NDArray[Any], Size]] = []
        maps = iter(kernel.tensor_maps)
        types = iter(kernel.parameters)
        for argument in arguments:
            type_ = next(types)
            if type_ == "tensormap":
                assert isinstance(argument, Array)
                block, element_bytes, element_type, swizzle = next(maps)
                encoded = _tensor_map(argument, block, element_bytes, element_type, swizzle)
                self._put(np.frombuffer(encoded, np.uint8), _ALIGNMENT)
                strides = [int(np.prod(argument.shape[axis + 1 :])) for axis in range(len(argument.shape))]
                for number in (*argument.shape, *strides):
                    self._put(np.array([number], _SCALARS[next(types)]))
            elif type_.startswith("*"):
                assert argument is None or isinstance(argument, Array)
                self._put(np.array([0 if argument is None else argument.address], np.uint64))
            elif isinstance(argument, str):
                self.sized.append((self._put(np.zeros(1, _SCALARS[type_])), argument))
            else:
                self._put(np.array([argument], _SCALARS[type_]))
        if next(types, None) is not None:
            raise EngineError(f"The kernel {kernel.entry} was given too few arguments; build the engine again.")
        null = self._put(np.zeros(1, np.uint64))  # Triton's kernels end with two scratch pointers that ours never use
        self._addresses.append(null.ctypes.data)
        self.pointers = np.array(self._addresses, np.uint64)

    def _put(self, value: npt.NDArray[Any], alignment: int = 8) -> npt.NDArray[Any]:
        self._offset += -self._offset % alignment
        place = self.memory[self._offset : self._offset + value.nbytes].view(value.dtype)
        place[:] = value
        self._offset += value.nbytes
        self._addresses.append(place.ctypes.data)
        return place


def _tensor_map(array: Array, block: Sequence[int], element_bytes: int, element_type: int, swizzle: int) -> bytes:
    """A TMA descriptor of a row-major `array`, innermost dimension first as CUDA wants it."""
    rank = len(array.shape)
    strides = [int(np.prod(array.shape[axis:])) * element_bytes for axis in range(rank - 1, 0, -1)]
    encoded = check(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType(element_type),
            rank,
            array.address,
            [driver.cuuint64_t(size) for size in reversed(array.shape)],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in reversed(block)],
            [driver.cuuint32_t(1)] * rank,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle(swizzle),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return ctypes.string_at(encoded.getPtr(), _TENSOR_MAP_BYTES)
