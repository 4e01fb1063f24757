"""A launch plan: what one step does on the device, as data. The build writes it, the executor follows it and knows
nothing of models.

Device tensors go by name: weights as in the engine file, `key_cache.0` and so on for the KV pool, the step's inputs
(see `inputs`), and the plan's own buffers. Sizes that differ from step to step are written `#T` (tokens), `#B`
(sequences), `#S` (sampled rows), `#tiles` (tiles of prefill attention).
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

Size = Literal["#T", "#B", "#S", "#tiles"]
Extent = int | tuple[Size, int, int]
"""A grid's dimension: a number, or (size, block, factor): ceil(size / block) · factor."""

Type = Literal["bf16", "fp16", "fp32", "fp64", "fp8e4nv", "i8", "u8", "i32", "u32", "i64"]
Activation = Literal["bf16", "fp16"]
Float = Literal["bf16", "fp16", "fp32"]
TYPE_BYTES: dict[Type, int] = {
    "bf16": 2,
    "fp16": 2,
    "fp32": 4,
    "fp64": 8,
    "fp8e4nv": 1,
    "i8": 1,
    "u8": 1,
    "i32": 4,
    "u32": 4,
    "i64": 8,
}

KERNEL_PREFIX, PLAN_TENSOR = "kernel.", "plan"
"""Names in the engine file: of each kernel's code, and of the plan."""


@dataclass(frozen=True)
class Buffer:
    """`[rows, columns]` of device memory, zero before the first step. `rows` may be a size: then there are as many as
    the engine's ceilings allow."""

    name: str
    type: Type
    rows: Size | int
    columns: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel in the engine file (tensor `kernel.<name>`); see `farrier.plugins.kernel.CompiledKernel`.

    `tensor_maps`: for each TMA descriptor argument its block, element bytes, element type and swizzle mode.
    """

    entry: str
    num_warps: int
    shared_bytes: int
    parameters: tuple[str, ...]
    tensor_maps: tuple[tuple[tuple[int, ...], int, int, int], ...]
    pdl: bool


@dataclass(frozen=True)
class Launch:
    """`arguments`: names of device tensors, sizes (`#T` …), or plain numbers."""

    kernel: str
    grid: tuple[Extent, Extent, Extent]
    arguments: tuple[str | int | float, ...]


@dataclass(frozen=True)
class Multiply:
    """A product by cuBLASLt: out[rows, n] (+)= x[rows, k] @ weight[n, k]ᵀ (+ bias)."""

    x: str
    weight: str
    bias: str | None
    out: str
    rows: Size | int
    n: int
    k: int
    type: Type
    out_type: Type
    accumulate: bool


Step = Launch | Multiply


@dataclass(frozen=True)
class Program:
    """What runs, in order.

    decode: one token of each of up to `rows` sequences of at most `context` tokens; sizes are `rows`, so that the
    program can be captured as a graph. mixed: any batch of up to `rows` tokens. The others turn logits into tokens:
    greedy always runs, sample (or masked, where a grammar restricts a row) and logprobs after it when a row asks.
    """

    kind: Literal["decode", "mixed", "greedy", "sample", "masked", "logprobs"]
    rows: int
    context: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Plan:
    """`tile_rows`: query tokens in a tile of prefill attention. `swept`: tactics were measured on a device."""

    capability: int
    activation: Activation
    kv_type: Type
    tile_rows: int
    swept: bool
    buffers: tuple[Buffer, ...]
    kernels: dict[str, Kernel]
    programs: tuple[Program, ...]


PLAN = TypeAdapter(Plan)
