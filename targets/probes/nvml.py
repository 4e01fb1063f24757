"""NVML behind one method, so that a recording can stand in for a driver."""

from typing import Any, Protocol

# The return codes detection tells apart, and one constant; nvml.h fixes these numbers.
NOT_SUPPORTED = 3
NO_PERMISSION = 4
DRIVER_NOT_LOADED = 9
LIBRARY_NOT_FOUND = 12
LIBRARY_DRIVER_MISMATCH = 18
CLOCK_MEMORY = 2


class NvmlError(Exception):
    """NVML refused a call with `code`."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Nvml(Protocol):
    def call(self, function: str, *args: Any) -> Any:
        """What `pynvml.<function>(*args)` returns. Raises NvmlError."""


class SystemNvml:
    """The machine's own NVML, through nvidia-ml-py."""

    def call(self, function: str, *args: Any) -> Any:
        import pynvml  # only machines that may have a GPU pay for it

        try:
            return getattr(pynvml, function)(*args)
        except pynvml.NVMLError as error:
            raise NvmlError(error.value, str(error)) from error


def query(nvml: Nvml, function: str, *args: Any) -> Any | None:
    """The call's result, or None where this GPU or driver does not support it."""
    try:
        return nvml.call(function, *args)
    except NvmlError:
        return None
