"""A kernel before and after it is compiled for a compute capability; needs no GPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

WARP_SIZE = 32
PDL_CAPABILITY = 90
"""Programmatic dependent launch, and the instructions that go with it, exist from this compute capability on."""


# CUtensorMapDataType counts some types in another order than the instruction that Triton names them for.
_HOST_ELEMENT_TYPES = {8: 10, 9: 8, 10: 9}


@dataclass(frozen=True)
class KernelSource:
    """A kernel and all that is fixed when it is compiled.

    `arguments`: type of each run-time argument in order, in Triton's spelling (`*bf16`, `i32`, `fp32`); pointers are
    aligned to 16 bytes. `constants`: a value for each constexpr. `pdl`: the kernel calls gdc_wait and may start while
    the kernel before it still runs; only from compute capability 9.0 on.
    """

    function: Any
    arguments: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    pdl: bool = False
    max_registers: int | None = None


@dataclass(frozen=True)
class PerRows:
    """So many programs for rows that are counted only at launch: ceil(rows / block) · factor."""

    block: int = 1
    factor: int = 1

    def count(self, rows: int) -> int:
        return -(-rows // self.block) * self.factor


class Variant:
    """A kernel with its compile-time decisions made; subclasses are frozen dataclasses that say what to pass."""

    def source(self) -> KernelSource:
        raise NotImplementedError

    @property
    def extents(self) -> tuple[int | PerRows, ...]:
        """How many programs to launch, in up to three dimensions."""
        raise NotImplementedError

    def grid(self, rows: int = 0) -> tuple[int, ...]:
        """`extents` for so many rows."""
        return tuple(extent if isinstance(extent, int) else extent.count(rows) for extent in self.extents)


@dataclass(frozen=True)
class TensorMap:
    """How a TMA descriptor argument is to be encoded: elements of a block, their size in bytes, and the driver's
    numbers for their type and the swizzle mode."""

    block: tuple[int, ...]
    element_bytes: int
    element_type: int
    swizzle: int


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code for one compute capability.

    `parameters`: types of what is passed at launch, in order. A tensor descriptor of n dimensions counts as
    `tensormap` followed by n `i32` (shape) and n `i64` (strides). Two null pointers follow the last one.
    """

    entry: str
    cubin: bytes
    num_warps: int
    shared_bytes: int
    parameters: tuple[str, ...]
    tensor_maps: tuple[TensorMap, ...]
    pdl: bool


def compile_kernel(source: KernelSource, compute_capability: int) -> CompiledKernel:
    """Compiles for `compute_capability` (80, 87, 90).

    Raises ValueError for a kernel that needs what this capability does not have, or scratch memory at launch;
    Triton's own errors when the kernel is wrong.
    """
    if source.pdl and compute_capability < PDL_CAPABILITY:
        raise ValueError(f"Programmatic dependent launch does not exist on sm_{compute_capability}.")
    function = source.function
    names = [name for name in function.arg_names if name in source.arguments]
    if names != list(source.arguments) or set(function.arg_names) != {*source.arguments, *source.constants}:
        raise ValueError(f"{function.__name__} takes ({', '.join(function.arg_names)}), in this order.")
    signature = {name: source.arguments.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*")
    }
    kind = GluonASTSource if function.is_gluon() else ASTSource
    options = {
        "num_warps": source.num_warps,
        "num_stages": source.num_stages,
        "launch_pdl": source.pdl,
        "maxnreg": source.max_registers,
    }
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        compiled = triton.compile(
            kind(fn=function, signature=signature, constexprs=dict(source.constants), attrs=aligned),
            target=GPUTarget("cuda", compute_capability, WARP_SIZE),
            options=options,
        )
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{function.__name__} needs scratch memory at launch, which farrier does not provide.")
    maps = tuple(
        TensorMap(
            tuple(meta["block_size"]),
            meta["elem_size"],
            _HOST_ELEMENT_TYPES.get(meta["elem_type"], meta["elem_type"]),
            meta["swizzle"],
        )
        for meta in metadata.tensordesc_meta
    )
    return CompiledKernel(
        entry=metadata.name,
        cubin=compiled.asm["cubin"],
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        parameters=tuple(_expanded(source.arguments.values())),
        tensor_maps=maps,
        pdl=source.pdl,
    )


def _expanded(types: Any) -> Any:
    for type_ in types:
        if type_.startswith("tensordesc"):
            dimensions = type_.partition("[")[2].partition("]")[0].count(",") + 1
            yield from ("tensormap", *["i32"] * dimensions, *["i64"] * dimensions)
        else:
            yield type_
