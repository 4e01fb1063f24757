"""The matrix products of a model, and which kernel runs each of them at how many rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from farrier.plugins.gemm import GemmTile
from farrier.plugins.gemv import GemvTile
from farrier.targets.cuda.plan import Type

Epilogue = Literal["store", "add", "gated"]
Library = Literal["library"]
Choice = GemvTile | GemmTile | Library
"""A tile of our own streaming or matrix kernel, or cuBLASLt."""

GEMV_ROWS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Product:
    """x[rows, k] → [rows, n]: `n` counts weight rows, twice the output columns for `gated`. `normed`: x is the
    residual and still has to be normalized."""

    n: int
    k: int
    weight: Literal["bf16", "fp16", "fp8", "int8", "int4"]
    group_size: int | None
    zeros: bool
    epilogue: Epilogue
    normed: bool
    bias: bool
    softcap: float | None
    out_type: Type

    @property
    def columns(self) -> int:
        return self.n // 2 if self.epilogue == "gated" else self.n

    @property
    def in_library(self) -> bool:
        """Whether cuBLASLt can run it: it takes weights of the activations' own type, and a bias only of the type it
        puts out."""
        return self.weight in ("bf16", "fp16") and self.softcap is None and not (self.bias and self.out_type == "fp32")

    @property
    def suits_tma(self) -> bool:
        """Whether rows of weight and x are a multiple of 16 bytes long, as TMA wants them."""
        return self.k % (32 if self.weight == "int4" else 16) == 0

    def key(self, rows: int) -> str:
        """Names this product at so many rows in `model.cache`."""
        group = f"g{self.group_size}" if self.group_size else ""
        flags = "".join(name[0] for name in ("normed", "bias", "zeros") if getattr(self, name))
        return f"{rows}x{self.n}x{self.k}-{self.weight}{group}-{self.epilogue}-{self.out_type}{flags}"


class Tactics:
    """Choices: what a sweep measured to be fastest where it did, else defaults."""

    def __init__(self, capability: int, *, deterministic: bool, swept: Mapping[str, Choice] | None = None) -> None:
        self._capability = capability
        self._deterministic = deterministic
        self._swept = swept or {}

    def choose(self, product: Product, rows: int) -> Choice:
        """`rows`: as many as the product has, or at most has."""
        if self._deterministic:
            # One kernel and tile for any number of rows: then no row's result depends on the others.
            return _gemm_tile(product, 64)
        swept = self._swept.get(product.key(rows))
        if swept is not None:
            return swept
        if rows in GEMV_ROWS:
            return GemvTile(2, 1, 4, 2)
        if product.in_library:
            return "library"
        return _gemm_tile(product, rows)


def _gemm_tile(product: Product, rows: int) -> GemmTile:
    return GemmTile(16 if rows <= 16 else 64, 64, 64, 4, 4)
