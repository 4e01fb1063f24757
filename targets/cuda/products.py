"""The matrix products of a model, and which kernel runs each of them at how many rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from farrier.plugins import gemv
from farrier.plugins.gemm_tiles import gemm_tiles
from farrier.plugins.gemv import GemvTile
from farrier.plugins.weight_form import GemmTile, WeightForm
from farrier.targets.cuda.plan import Activation, Float
from farrier.targets.safetensors_file import DTYPE_SIZES

Format = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
_STORED = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp8": "F8_E4M3", "int8": "I8", "int4": "U8"}
Epilogue = Literal["store", "add", "gated"]
Library = Literal["library"]
Choice = GemvTile | GemmTile | Library
"""A tile of our own streaming or matrix kernel, or cuBLASLt."""

GEMV_ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Operand:
    """safetensors dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_SIZES[self.dtype]


@dataclass(frozen=True)
class Product:
    """x[rows, k] → [rows, n]: `n` counts weight rows, twice the output columns for `gated`. `normed`: x is the
    residual and still has to be normalized."""

    n: int
    k: int
    weight: Format
    group_size: int | None
    zeros: bool
    epilogue: Epilogue
    normed: bool
    bias: bool
    softcap: float | None
    out_type: Float

    @property
    def columns(self) -> int:
        return self.n // 2 if self.epilogue == "gated" else self.n

    @property
    def in_library(self) -> bool:
        """Whether cuBLASLt can run it: it takes weights of the activations' own type, and a bias only of the type it
        puts out."""
        return self.weight in ("bf16", "fp16") and self.softcap is None and not (self.bias and self.out_type == "fp32")

    @property
    def quantizes_x(self) -> bool:
        """Whether many rows of x are brought to fp8: for weights in fp8 with one scale a row."""
        return self.weight == "fp8" and self.group_size is None

    def tensors(self, name: str) -> dict[str, Operand]:
        """What its weight consists of in an engine file."""
        stored = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "fp8": "F8_E4M3", "int8": "I8", "int4": "U8"}[
            self.weight
        ]
        parts = {name + ".weight": Operand(stored, (self.n, self.k // 2 if self.weight == "int4" else self.k))}
        if self.weight in ("fp8", "int8", "int4"):
            groups = (self.k // self.group_size,) if self.group_size else ()
            parts[name + ".scale"] = Operand("F32", (self.n, *groups))
            if self.zeros:
                parts[name + ".zero"] = Operand("I8", (self.n, *groups))
        if self.bias:
            parts[name + ".bias"] = Operand("F32", (self.n,))
        return parts

    def form(self, activation: Activation) -> WeightForm:
        """How our matrix kernel takes it: fp8 weights meet fp8 activations, quantized row by row."""
        return WeightForm(self.weight, "fp8e4nv" if self.quantizes_x else activation, self.group_size or 0, self.zeros)

    def key(self, rows: int, *, decode: bool) -> str:
        """Names this product in `model.cache`, at exactly (`decode`) or up to so many rows."""
        bound = "" if decode else "<="
        group = f"g{self.group_size}" if self.group_size else ""
        flags = "".join(name[0] for name in ("normed", "bias", "zeros") if getattr(self, name))
        return f"{bound}{rows}x{self.n}x{self.k}-{self.weight}{group}-{self.epilogue}-{self.out_type}{flags}"


class Tactics:
    """Choices: what a sweep measured to be fastest where it did, else defaults."""

    def __init__(
        self, capability: int, activation: Activation, *, deterministic: bool, swept: Mapping[str, Choice] | None = None
    ) -> None:
        self._capability = capability
        self._activation = activation
        self._deterministic = deterministic
        self._swept = swept or {}

    def choose(self, product: Product, rows: int, *, decode: bool) -> Choice:
        """`rows`: as many as the product has (`decode`), or at most has."""
        if self._deterministic:
            # One kernel and tile for any number of rows: then no row's result depends on the others.
            return self._matrix(product, 64)[0]
        swept = self._swept.get(product.key(rows, decode=decode))
        return swept if swept is not None else self.candidates(product, rows, decode=decode)[0]

    def candidates(self, product: Product, rows: int, *, decode: bool) -> list[Choice]:
        """What is worth measuring, the default first."""
        found: list[Choice] = []
        if decode and rows in GEMV_ROWS and product.k % 32 == 0 and product.weight != "fp32":
            gated = product.epilogue == "gated"
            found += gemv.candidates(rows, product.columns, product.k, product.weight, gated)
        if product.in_library:
            found.append("library")
        return found + self._matrix(product, rows)

    def _matrix(self, product: Product, rows: int) -> list[Choice]:
        return list(gemm_tiles(product.form(self._activation), product.epilogue == "gated", rows, self._capability))
