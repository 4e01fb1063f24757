"""`farrier serve` whose engine runs a kernel that writes where nothing is: before its next step once SIGUSR1 came, or
before the step that FAULT_AT_STEP counts.

python tests/device/faulty_server.py ENGINE OPTIONS OF farrier serve...
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from farrier.agent.cli import main
from farrier.plugins.kernel import KernelSource, compile_kernel
from farrier.runtime import assembly
from farrier.targets.engine import load_engine

NOWHERE = 16


@triton.jit
def wild_store(pointer):
    tl.store(pointer, 1)


WILD = KernelSource(wild_store, {"pointer": "*i32"}, {})


class Sabotaged:
    """An engine that does what the one inside it does, until it is armed."""

    def __init__(self, engine: Any) -> None:
        from farrier.targets.cuda.compile import described
        from farrier.targets.cuda.device import Array, LoadedKernel, PreparedLaunch

        self._engine = engine
        compiled = compile_kernel(WILD, engine._plan.capability)
        loaded = LoadedKernel(described(compiled), compiled.cubin)
        self._wild = PreparedLaunch(loaded, (1, 1, 1), [Array(NOWHERE, "i32", (1,))])
        self.armed = False
        self._left = int(os.environ.get("FAULT_AT_STEP", "-1"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, batch: Any) -> Any:
        self._left -= 1
        if self.armed or self._left == 0:
            self.armed = False
            self._wild.launch({}, self._engine._stream)
        return self._engine.step(batch)


def run() -> None:
    engines: list[Sabotaged] = []

    def load(path: Path) -> Any:
        engines.append(Sabotaged(load_engine(path)))
        return engines[-1]

    def arm(*_: object) -> None:
        for engine in engines:
            engine.armed = True

    assembly.load_engine = load
    signal.signal(signal.SIGUSR1, arm)
    main()


if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    run()
