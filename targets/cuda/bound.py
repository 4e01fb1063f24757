"""A step of a launch plan with its addresses filled in."""

from collections.abc import Mapping
from typing import Any

from cuda.core import Stream

from farrier.targets.cuda.device import Array, LoadedKernel, PreparedLaunch, Sizes
from farrier.targets.cuda.library import Library
from farrier.targets.cuda.plan import Launch, Step


class BoundStep:
    """One step of a program with its addresses filled in."""

    def __init__(
        self, step: Step, arrays: Mapping[str, Array], kernels: Mapping[str, LoadedKernel], library: Library
    ) -> None:
        self._step = step
        self._library = library
        if isinstance(step, Launch):
            arguments = [self._argument(argument, arrays) for argument in step.arguments]
            self._launch: PreparedLaunch | None = PreparedLaunch(kernels[step.kernel], step.grid, arguments)
        else:
            self._launch = None
            bias = None if step.bias is None else arrays[step.bias]
            self._operands = arrays[step.x], arrays[step.weight], bias, arrays[step.out]

    @staticmethod
    def _argument(argument: Any, arrays: Mapping[str, Array]) -> Any:
        return arrays[argument] if isinstance(argument, str) and not argument.startswith("#") else argument

    def run(self, sizes: Sizes, stream: Stream) -> None:
        if self._launch is not None:
            self._launch.launch(sizes, stream)
            return
        step: Any = self._step
        x, weight, bias, out = self._operands
        rows = rows_of(step.rows, sizes)
        if rows:
            self._library.multiply(x, weight, bias, out, rows, accumulate=step.accumulate, stream=stream)


def rows_of(rows: Any, sizes: Sizes) -> int:
    """A number of rows, or what a size's name stands for."""
    return rows if isinstance(rows, int) else sizes[rows]
