"""Bytes of an installation, package by package; run it with the Python that farrier is installed in.

python -m venv /tmp/size && /tmp/size/bin/pip install '.[cuda]' && /tmp/size/bin/python tests/device/install_size.py

CUDA's own libraries (`nvidia-*`), and pip and setuptools, are left out of the sum; compiled bytecode is said apart.
"""

import json
import sys
from importlib import metadata

CUDA_LIBRARIES = ("nvidia-cublas", "nvidia-cuda-nvrtc")
CUDA_FOR_PYTHON = ("cuda-bindings", "cuda-core", "cuda-pathfinder", "nvmath-python")
_NOT_OURS = ("pip", "setuptools")


def main() -> int:
    sizes: dict[str, int] = {}
    bytecode = 0
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        for file in distribution.files or []:
            path = distribution.locate_file(file)
            size = path.stat().st_size if path.is_file() else 0  # type: ignore[attr-defined]
            if file.suffix == ".pyc":
                bytecode += 0 if name in (*_NOT_OURS, *CUDA_LIBRARIES) else size
            else:
                sizes[name] = sizes.get(name, 0) + size
    sizes = {name: size for name, size in sizes.items() if name not in _NOT_OURS}
    libraries = sum(sizes.pop(name, 0) for name in CUDA_LIBRARIES)
    document = {
        "bytes": sum(sizes.values()),
        "of_that_nvidias_python_packages": sum(sizes.get(name, 0) for name in CUDA_FOR_PYTHON),
        "bytecode_beside_it": bytecode,
        "cudas_own_libraries": libraries,
        "largest": dict(sorted(sizes.items(), key=lambda item: -item[1])[:10]),
    }
    print(json.dumps(document, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
