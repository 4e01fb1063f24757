"""Which drivers can run what this installation brings."""

CUBIN_CUDA = 12
"""Kernels are assembled by CUDA 12's ptxas; any driver of this major version or a later one loads them."""
_FIRST_DRIVERS = {12: "525", 13: "580"}


def driver_too_old(driver: int, libraries: int) -> str | None:
    """Why a driver cannot be used that supports CUDA up to `driver` together with CUDA libraries of version
    `libraries`, both as CUDA counts (12080 for 12.8); None when it can.

    CUDA promises that a library runs on every driver of its major version, and on later ones.
    """
    needed = max(libraries // 1000, CUBIN_CUDA)
    if driver // 1000 >= needed:
        return None
    found = f"{driver // 1000}.{driver % 1000 // 10}"
    drivers = f"driver {_FIRST_DRIVERS[needed]}" if needed in _FIRST_DRIVERS else f"a driver for CUDA {needed}"
    older = f", or install CUDA {CUBIN_CUDA}'s libraries ('cuda-bindings<{CUBIN_CUDA + 1}')"
    alternative = older if needed > CUBIN_CUDA and driver // 1000 >= CUBIN_CUDA else ""
    return (
        f"The NVIDIA driver supports CUDA up to {found}, and the CUDA libraries installed here need {needed}.0; "
        f"install {drivers} or newer{alternative}."
    )
