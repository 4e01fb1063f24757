"""Compiles a plan's kernels, several at a time; needs no GPU."""

import importlib
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

from farrier.plugins.kernel import CompiledKernel, KernelSource, compile_kernel
from farrier.targets.cuda.plan import Kernel
from farrier.targets.errors import BuildError


def compile_all(
    sources: Mapping[str, KernelSource], capability: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, CompiledKernel]:
    """Every kernel by its name. `progress` gets how many are done, and how many there are.

    Raises BuildError naming the kernel that does not compile.
    """
    compiled: dict[str, CompiledKernel] = {}
    workers = min(os.cpu_count() or 1, len(sources)) or 1
    # Forked children would share the parent's threads' locks.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, _Sent.of(source), capability): name for name, source in sources.items()}
        try:
            for future in as_completed(futures):
                name = futures[future]
                try:
                    compiled[name] = future.result()
                except Exception as error:
                    raise BuildError(f"The kernel {name} does not compile for sm_{capability}: {error}") from error
                if progress is not None:
                    progress(len(compiled), len(sources))
        finally:
            pool.shutdown(cancel_futures=True)
    return compiled


@dataclass(frozen=True)
class _Sent:
    """A source on its way to another process, where its function is found by name: Triton's do not travel."""

    module: str
    function: str
    source: KernelSource

    @classmethod
    def of(cls, source: KernelSource) -> "_Sent":
        function = source.function.fn
        return cls(function.__module__, function.__name__, replace(source, function=None))


def _compile(sent: _Sent, capability: int) -> CompiledKernel:
    function = getattr(importlib.import_module(sent.module), sent.function)
    return compile_kernel(replace(sent.source, function=function), capability)


def described(kernel: CompiledKernel) -> Kernel:
    """What the launch plan says of a kernel; its code goes beside it."""
    return Kernel(
        kernel.entry,
        kernel.num_warps,
        kernel.shared_bytes,
        kernel.parameters,
        tuple((m.block, m.element_bytes, m.element_type, m.swizzle) for m in kernel.tensor_maps),
        kernel.pdl,
    )
