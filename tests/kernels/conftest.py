"""Kernels against their numpy references: under Triton's interpreter, or with FARRIER_DEVICE=1 on this machine's GPU.

The interpreter has to be chosen before Triton is imported: these tests need a process of their own.
"""

import os

import pytest

ON_DEVICE = os.environ.get("FARRIER_DEVICE") == "1"
if not ON_DEVICE:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def run():
    """`run(source, grid, *arguments)`; see `interpreter.run`."""
    if ON_DEVICE:
        from tests.device.runner import run
    else:
        from tests.kernels.interpreter import run
    return run
