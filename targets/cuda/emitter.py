"""What lowering writes down: steps, and the buffers, kernels and products that they need."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from farrier.plugins.activation import Gated
from farrier.plugins.gemm import Gemm
from farrier.plugins.gemv import Gemv, GemvTile
from farrier.plugins.kernel import PDL_CAPABILITY, KernelSource, PerRows, Variant
from farrier.plugins.norm import Quantize, RmsNorm
from farrier.plugins.weight_form import TMA_CAPABILITY, GemmTile
from farrier.targets.cuda.plan import Activation, Buffer, Extent, Float, Launch, Multiply, Size, Step, Type
from farrier.targets.cuda.products import Choice, Epilogue, Format, Product
from farrier.targets.decoder import DecoderSpec
from farrier.targets.engine import Ceilings
from farrier.targets.errors import BuildError

_WEIGHTS: dict[str, Format] = {
    "F32": "fp32",
    "BF16": "bf16",
    "F16": "fp16",
    "F8_E4M3": "fp8",
    "I8": "int8",
    "U8": "int4",
}


class Shaped(Protocol):
    """A tensor of the engine file, as far as lowering looks at it."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Settings:
    """What was decided before lowering; `capability` as in `sm_90`."""

    capability: int
    activation: Activation
    kv_type: Type
    block_size: int
    ceilings: Ceilings
    deterministic: bool

    @property
    def pdl(self) -> bool:
        return self.capability >= PDL_CAPABILITY

    @property
    def tma(self) -> bool:
        return self.capability >= TMA_CAPABILITY


class Chooses(Protocol):
    def choose(self, product: Product, rows: int, *, decode: bool) -> Choice: ...


@dataclass(frozen=True)
class Rows:
    """The rows a part of a program works on: their run-time size, and how many there are at most (decode: exactly)."""

    kind: str
    size: Size
    count: int
    context: int
    picked: str | None = None


class Emitter:
    """Steps pile up until `taken`; buffers grow to the largest that was asked for; equal kernels are one."""

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, Shaped], settings: Settings, tactics: Chooses) -> None:
        self.spec = spec
        self.weights = weights
        self.settings = settings
        self._tactics = tactics
        self.sources: dict[str, KernelSource] = {}
        self.buffers: dict[str, Buffer] = {}
        self.products: dict[str, tuple[Product, int, bool]] = {}
        self.steps: list[Step] = []

    def taken(self) -> tuple[Step, ...]:
        """The steps since the last time."""
        steps, self.steps = tuple(self.steps), []
        return steps

    def product(
        self,
        name: str,
        x: str,
        out: str,
        epilogue: Epilogue,
        rows: Rows,
        *,
        norm: str | None = None,
        softcap: float | None = None,
    ) -> None:
        """out = epilogue(x @ weightᵀ) by the kernel that the tactics choose, `norm` applied to x before."""
        format_, (n, k), group_size = self.stored(name)
        product = Product(
            n=n,
            k=k,
            weight=format_,
            group_size=group_size,
            zeros=name + ".zero" in self.weights,
            epilogue=epilogue,
            normed=norm is not None,
            bias=name + ".bias" in self.weights,
            softcap=softcap,
            out_type=_float(self.buffers[out].type),
        )
        decode = rows.kind == "decode"
        choice = self._tactics.choose(product, rows.count, decode=decode)
        self.products[product.key(rows.count, decode=decode)] = (product, rows.count, decode)
        operands = self.operands(name)
        if isinstance(choice, GemvTile):
            self._stream(product, choice, rows, x, norm, operands, out)
            return
        quantized = product.quantizes_x
        if norm is not None:
            x = self.normalized(x, norm, rows, quantized=quantized)
        elif quantized:
            x = self._quantized(x, k, rows)
        if isinstance(choice, GemmTile):
            self._multiply(product, choice, rows, x, operands, out)
        else:
            self._library(product, rows, x, operands, out)

    def stored(self, name: str) -> tuple[Format, tuple[int, int], int | None]:
        """How a weight is stored: format, [n, k], and group size if its scales come in groups."""
        if name + ".weight" not in self.weights:
            raise BuildError(
                f"A GPU engine keeps {name.rpartition('.')[2].replace('_', ' and ')} in one precision; override the "
                f"matrices of {name.rpartition('.')[0]} that share an input together."
            )
        weight, scale = self.weights[name + ".weight"], self.weights.get(name + ".scale")
        format_ = _WEIGHTS[weight.dtype]
        k = weight.shape[1] * (2 if format_ == "int4" else 1)
        in_groups = scale is not None and len(scale.shape) == 2
        return format_, (weight.shape[0], k), k // scale.shape[1] if in_groups and scale is not None else None

    def operands(self, name: str) -> list[str]:
        """The tensors that make up a weight, in the order kernels take them."""
        suffixes = (".scale", ".zero", ".bias")
        return [name + ".weight", *(name + suffix for suffix in suffixes if name + suffix in self.weights)]

    def _stream(
        self, product: Product, tile: GemvTile, rows: Rows, x: str, norm: str | None, operands: list[str], out: str
    ) -> None:
        variant = Gemv(
            rows=rows.count,
            n=product.columns,
            k=product.k,
            weight=product.weight,
            x_type=self.buffers[x].type,
            out_type=product.out_type,
            tile=tile,
            group_size=product.group_size,
            zeros=product.zeros,
            epilogue=product.epilogue,
            activation=self.spec.activation if product.epilogue == "gated" else None,
            norm_eps=self.spec.norm_eps if norm is not None else None,
            bias=self.settings.activation if product.bias else None,
            softcap=product.softcap,
            pdl=self.settings.pdl,
        )
        self.launch(variant, rows.size, x, *([norm] if norm else []), *operands, out)

    def _multiply(self, product: Product, tile: GemmTile, rows: Rows, x: str, operands: list[str], out: str) -> None:
        x_type = self.buffers[x].type
        form = product.form(self.settings.activation)
        tma = self.settings.tma and form.suits_tma(product.k)
        variant = Gemm(
            n=product.columns,
            k=product.k,
            form=form,
            tile=tile,
            out_type=product.out_type,
            epilogue=product.epilogue,
            activation=self.spec.activation if product.epilogue == "gated" else None,
            bias=self.settings.activation if product.bias else None,
            softcap=product.softcap,
            tma=tma,
            pdl=self.settings.pdl,
        )
        scales = [x + ".scale"] if x_type == "fp8e4nv" else []
        self.launch(variant, rows.size, x, *scales, *operands, out, rows.size)

    def _library(self, product: Product, rows: Rows, x: str, operands: list[str], out: str) -> None:
        activation = self.settings.activation
        weight, bias = operands[0], operands[1] if product.bias else None
        target, type_ = out, product.out_type
        if product.epilogue == "gated":
            target, type_ = "gate_up", activation
            self.buffer("gate_up", activation, "#T", product.n)
        self.steps.append(
            Multiply(
                x=x,
                weight=weight,
                bias=bias,
                out=target,
                rows=rows.size,
                n=product.n,
                k=product.k,
                type=activation,
                out_type=type_,
                accumulate=product.epilogue == "add",
            )
        )
        if product.epilogue == "gated":
            variant = Gated(product.columns, self.spec.activation, activation, activation, pdl=self.settings.pdl)
            self.launch(variant, rows.size, "gate_up", out)

    def normalized(self, x: str, norm: str, rows: Rows, *, quantized: bool) -> str:
        """The buffer that holds x normalized, in fp8 if `quantized`."""
        hidden = self.buffers[x].columns
        out_type: Type = "fp8e4nv" if quantized else self.settings.activation
        out = "normed8" if quantized else "normed"
        self.buffer(out, out_type, "#T", hidden)
        scales = self._scales(out) if quantized else ()
        variant = RmsNorm(
            hidden, self.spec.norm_eps, out_type, picks_rows=rows.picked is not None, pdl=self.settings.pdl
        )
        picked = [rows.picked] if rows.picked else []
        self.launch(variant, rows.size, x, *picked, norm, out, *scales)
        return out

    def _quantized(self, x: str, columns: int, rows: Rows) -> str:
        out = x + "8"
        self.buffer(out, "fp8e4nv", "#T", columns)
        variant = Quantize(columns, self.settings.activation, pdl=self.settings.pdl)
        self.launch(variant, rows.size, x, out, *self._scales(out))
        return out

    def _scales(self, name: str) -> tuple[str]:
        self.buffer(name + ".scale", "fp32", "#T", 1)
        return (name + ".scale",)

    def buffer(self, name: str, type_: Type, rows: Size | int, columns: int) -> None:
        """Asks for a buffer of at least this size."""
        known = self.buffers.get(name)
        if known is not None:
            columns = max(columns, known.columns)
            if isinstance(rows, int) and isinstance(known.rows, int):
                rows = max(rows, known.rows)
        self.buffers[name] = Buffer(name, type_, rows, columns)

    def launch(self, variant: Variant, size: Size, *arguments: str) -> None:
        """Enqueues `variant` over so many rows."""
        name = f"{type(variant).__name__.lower()}-{hashlib.sha256(repr(variant).encode()).hexdigest()[:16]}"
        if name not in self.sources:
            self.sources[name] = variant.source()
        expected = list(self.sources[name].arguments)
        if len(arguments) != len(expected):
            raise ValueError(f"{type(variant).__name__} takes {expected}, not {arguments}.")
        x, y, z = (*(_extent(extent, size) for extent in variant.extents), 1, 1)[:3]
        self.steps.append(Launch(name, (x, y, z), arguments))


def _extent(extent: int | PerRows, size: Size) -> Extent:
    return extent if isinstance(extent, int) else (size, extent.block, extent.factor)


def _float(type_: Type) -> Float:
    if type_ == "bf16" or type_ == "fp16" or type_ == "fp32":
        return type_
    raise ValueError(f"No product puts out {type_}.")
