"""Walks a `DecoderSpec` into a launch plan and the kernels it needs."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from farrier.plugins.activation import Gated
from farrier.plugins.attention import AttentionShape, DecodeAttention, PrefillAttention
from farrier.plugins.draw import Draw
from farrier.plugins.embedding import Embedding
from farrier.plugins.gemm import Gemm
from farrier.plugins.gemm_tiles import gemm_tiles
from farrier.plugins.gemv import Gemv, GemvTile
from farrier.plugins.grouped_gemm import GroupedGemm
from farrier.plugins.kernel import PDL_CAPABILITY, KernelSource, PerRows, Variant
from farrier.plugins.logprobs import MAX_LOGPROBS, Logprobs
from farrier.plugins.norm import PostNormAdd, Quantize, RmsNorm
from farrier.plugins.rope import RopeAppend
from farrier.plugins.routing import Align, Combine, TopK
from farrier.plugins.sampling import Adjust, Greedy, padded_vocab
from farrier.plugins.weight_form import TMA_CAPABILITY, GemmTile, WeightForm
from farrier.targets.cuda.plan import Activation, Buffer, Extent, Float, Launch, Multiply, Program, Size, Step, Type
from farrier.targets.cuda.products import GEMV_ROWS, Choice, Epilogue, Format, Product, Tactics
from farrier.targets.decoder import DecoderSpec, LayerSpec
from farrier.targets.engine import Ceilings
from farrier.targets.errors import BuildError

_DECODE_ROWS = (*GEMV_ROWS, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MIXED_ROWS = (64, 256)
_CONTEXTS = (1024, 8192)
_FEW_ROWS = 16
"""Up to so many sequences, attention is split over the context, and how finely depends on its length."""

_DIRECT_PAIRS = 64
"""Up to so many pairs of a token and an expert, sorting them by expert does not pay."""

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


@dataclass(frozen=True)
class Lowered:
    programs: tuple[Program, ...]
    buffers: tuple[Buffer, ...]
    sources: Mapping[str, KernelSource]
    tile_rows: int
    products: Mapping[str, tuple[Product, int, bool]]
    """Key in `model.cache` → each product, the rows it was chosen for, and whether they are decode rows."""


def lower(spec: DecoderSpec, weights: Mapping[str, Shaped], settings: Settings, tactics: Tactics) -> Lowered:
    """`weights`: the engine file's tensors (see `pack`)."""
    return _Lowering(spec, weights, settings, tactics).lowered()


def lower_product(
    spec: DecoderSpec, product: Product, choice: Choice, rows: int, settings: Settings, *, decode: bool
) -> tuple[tuple[Step, ...], tuple[Buffer, ...], Mapping[str, KernelSource]]:
    """The steps of one product alone, for a sweep: from the buffer `x` and the weight `product.weight` to `out`."""
    lowering = _Lowering(spec, product.tensors("product"), settings, _Fixed(choice))
    lowering.one_product(product, _Rows("decode" if decode else "mixed", "#T", rows, 0))
    return lowering._taken(), tuple(lowering._buffers.values()), lowering._sources


class _Fixed:
    def __init__(self, choice: Choice) -> None:
        self._choice = choice

    def choose(self, product: Product, rows: int, *, decode: bool) -> Choice:
        return self._choice


class Chooses(Protocol):
    def choose(self, product: Product, rows: int, *, decode: bool) -> Choice: ...


class _Lowering:
    def __init__(self, spec: DecoderSpec, weights: Mapping[str, Shaped], settings: Settings, tactics: Chooses) -> None:
        self.spec = spec
        self.weights = weights
        self.settings = settings
        self.tactics = tactics
        self._sources: dict[str, KernelSource] = {}
        self._buffers: dict[str, Buffer] = {}
        self._products: dict[str, tuple[Product, int, bool]] = {}
        self._steps: list[Step] = []

    def lowered(self) -> Lowered:
        programs = [*self._decode_programs(), *self._mixed_programs(), *self._tails()]
        return Lowered(tuple(programs), tuple(self._buffers.values()), self._sources, self._tile_rows, self._products)

    # Programs

    def _decode_programs(self) -> list[Program]:
        if self.settings.deterministic:
            return []
        ceilings = self.settings.ceilings
        rows_list = [rows for rows in _DECODE_ROWS if rows < ceilings.max_batch_size]
        rows_list.append(next((r for r in _DECODE_ROWS if r >= ceilings.max_batch_size), ceilings.max_batch_size))
        programs = []
        for rows in rows_list:
            contexts = [c for c in _CONTEXTS if c < ceilings.max_seq_len] if rows <= _FEW_ROWS else []
            for context in (*contexts, ceilings.max_seq_len):
                self._forward(_Rows("decode", "#T", rows, context))
                programs.append(Program("decode", rows, context, self._taken()))
        return programs

    def _mixed_programs(self) -> list[Program]:
        most = self.settings.ceilings.max_num_tokens
        programs = []
        for rows in (*(rows for rows in _MIXED_ROWS if rows < most), most):
            self._forward(_Rows("mixed", "#T", rows, self.settings.ceilings.max_seq_len))
            programs.append(Program("mixed", rows, self.settings.ceilings.max_seq_len, self._taken()))
        return programs

    def _tails(self) -> list[Program]:
        """From logits to tokens. Greedy always runs; a row that is adjusted or drawn is overwritten after it."""
        vocab, most = self.spec.vocab_size, self.settings.ceilings.max_batch_size
        programs = []

        def add(kind: Literal["greedy", "sample", "masked", "logprobs"]) -> None:
            programs.append(Program(kind, most, 0, self._taken()))

        pdl = self.settings.pdl
        greedy = Greedy(vocab, pdl=pdl)
        adjust = Adjust(vocab, pdl=pdl)
        self._buffer("rank_partials", "i64", "#S", max(greedy.parts, adjust.parts))
        self._buffer("rank_counters", "i32", "#S", 1)
        ranking = ("rank_partials", "rank_counters", "sampled")
        self._launch(greedy, "#S", "logits", *ranking)
        add("greedy")
        self._buffer("work", "fp32", "#S", padded_vocab(vocab))
        for kind in ("sample", "masked"):
            adjust = Adjust(vocab, masked=kind == "masked", pdl=pdl)
            masks = ("masks",) if adjust.masked else ()
            self._launch(
                adjust, "#S", "logits", *masks, "bias_ids", "bias_values", "bias_starts", "history_ids",
                "history_starts", "output_starts", "repetition_penalty", "presence_penalty", "frequency_penalty",
                "work", *ranking,
            )  # fmt: skip
            draw = Draw(vocab, pdl=pdl)
            self._launch(draw, "#S", "work", "temperature", "top_k", "top_p", "min_p", "draws", "sampled")
            add(kind)
        logprobs = Logprobs(vocab, pdl=pdl)
        self._buffer("top_partials", "i64", "#S", logprobs.parts * 32)
        self._buffer("exp_sums", "fp32", "#S", logprobs.parts * 2)
        self._buffer("token_logprobs", "fp32", "#S", 1)
        self._buffer("top_ids", "i32", "#S", MAX_LOGPROBS)
        self._buffer("top_values", "fp32", "#S", MAX_LOGPROBS)
        self._launch(
            logprobs, "#S", "logits", "num_logprobs", "sampled", "top_partials", "exp_sums", "rank_counters",
            "token_logprobs", "top_ids", "top_values",
        )  # fmt: skip
        add("logprobs")
        return programs

    def _taken(self) -> tuple[Step, ...]:
        steps, self._steps = tuple(self._steps), []
        return steps

    # The model

    def _forward(self, rows: "_Rows") -> None:
        spec = self.spec
        table = self.weights["embed.weight"]
        self._buffer("residual", "fp32", "#T", spec.hidden_size)
        self._buffer("sampled", "i32", "#S", 1)
        embedding = Embedding(
            vocab_size=table.shape[0],
            hidden=spec.hidden_size,
            table_type=_float_type(table),
            multiplier=spec.embedding_multiplier,
            pdl=self.settings.pdl,
        )
        self._launch(embedding, rows.size, "token_ids", "sampled", "embed.weight", "residual")
        for index, layer in enumerate(spec.layers):
            self._attention(index, layer, rows)
            self._mlp(index, layer, rows)
        self._logits(rows)

    def _attention(self, index: int, layer: LayerSpec, rows: "_Rows") -> None:
        spec, p = self.spec, f"layers.{index}."
        columns = spec.q_size + 2 * spec.kv_size
        self._buffer("qkv", self.settings.activation, "#T", columns)
        self._buffer("attended", self.settings.activation, "#T", spec.q_size)
        self._product(p + "qkv", "residual", "qkv", "store", rows, norm=p + "attn_norm.weight")
        rope = (f"rope.{layer.rope}.cos", f"rope.{layer.rope}.sin")
        norms = (f"{p}q_norm.weight", f"{p}k_norm.weight") if spec.qk_norm else ()
        caches = (f"key_cache.{index}", f"value_cache.{index}")
        blocks = ("block_ids", "block_starts")
        if rows.kind == "decode":
            variant = self._decode_variant(layer, rows)
            per_row = spec.num_heads * variant.splits
            self._buffer("partial_out", "fp32", "#B", per_row * spec.head_dim)
            self._buffer("partial_stats", "fp32", "#B", per_row * 2)
            self._buffer("attention_counters", "i32", "#B", spec.num_kv_heads)
            partial = ("partial_out", "partial_stats", "attention_counters")
            self._launch(
                variant, rows.size, "qkv", "context_lens", *blocks, *rope, *norms, *caches, *partial,
                "attended",
            )  # fmt: skip
        else:
            append = self._append_variant(layer)
            self._buffer("q", self.settings.activation, "#T", spec.q_size)
            self._launch(
                append, rows.size, "qkv", "positions", "slots", *rope, *norms, "q", *caches
            )  # fmt: skip
            prefill = self._prefill_variant(layer)
            self._launch(
                prefill, "#tiles", "q", *caches, "tiles", "query_starts", "context_lens", *blocks,
                "attended",
            )  # fmt: skip
        self._joined(p + "o", "attended", p + "attn_post_norm.weight", rows)

    def _mlp(self, index: int, layer: LayerSpec, rows: "_Rows") -> None:
        p = f"layers.{index}."
        if layer.moe:
            self._experts(p, rows)
            return
        self._buffer("hidden", self.settings.activation, "#T", self.spec.intermediate_size)
        self._product(p + "gate_up", "residual", "hidden", "gated", rows, norm=p + "mlp_norm.weight")
        self._joined(p + "down", "hidden", p + "mlp_post_norm.weight", rows)

    def _experts(self, p: str, rows: "_Rows") -> None:
        """Router, the chosen experts' products over pairs of a token and an expert, and their sum."""
        spec, settings, act = self.spec, self.settings, self.settings.activation
        experts = spec.experts
        assert experts is not None
        k, num, width = experts.top_k, experts.num_experts, experts.intermediate_size
        x = self._normalized("residual", p + "mlp_norm.weight", rows, quantized=False)
        self._buffer("router_logits", "fp32", "#T", num)
        self._buffer("expert_ids", "i32", "#T", k)
        self._buffer("routing", "fp32", "#T", k)
        self._product(p + "router", x, "router_logits", "store", rows)
        top = TopK(num, k, experts.normalize_top_k, settings.pdl)
        # What is negative marks padding: of a decode step, the context length.
        padding = "context_lens" if rows.kind == "decode" else "slots"
        self._launch(top, rows.size, "router_logits", padding, "expert_ids", "routing", rows.size)

        self._buffer("expert_hidden", act, "#T", k * width)
        self._buffer("expert_out", act, "#T", k * spec.hidden_size)
        forms = [self._expert_form(p + name) for name in ("experts.gate_up", "experts.down")]
        tiles, direct = self._expert_tiles(forms, rows)
        pairs = ["expert_ids"]
        if not direct:
            align = Align(num, k, tiles[0].block_m, settings.pdl)
            blocks = align.blocks.count(max(settings.ceilings.max_num_tokens, rows.count))
            self._buffer("pairs", "i32", blocks * align.block, 1)
            self._buffer("block_experts", "i32", blocks, 1)
            self._launch(align, rows.size, "expert_ids", "pairs", "block_experts", rows.size)
            pairs = ["block_experts", "pairs"]
        for name, form, tile, ins, outs in (
            ("gate_up", forms[0], tiles[0], x, "expert_hidden"),
            ("down", forms[1], tiles[1], "expert_hidden", "expert_out"),
        ):
            gated = name == "gate_up"
            variant = GroupedGemm(
                experts=num,
                top_k=k,
                n=width if gated else spec.hidden_size,
                k=spec.hidden_size if gated else width,
                form=form,
                tile=tile,
                out_type=act,
                epilogue="gated" if gated else "weighted",
                activation=spec.activation if gated else None,
                direct=direct,
                tma=settings.tma and form.suits_tma(spec.hidden_size if gated else width),
                pdl=settings.pdl,
            )
            routing = [] if gated else ["routing"]
            operands = self._operands(f"{p}experts.{name}")
            self._launch(variant, rows.size, ins, *operands, *pairs, *routing, outs, rows.size)
        if spec.sandwich_norms:
            self._buffer("joining", "fp32", "#T", spec.hidden_size)
        out = "joining" if spec.sandwich_norms else "residual"
        epilogue: Literal["add", "store"] = "store" if spec.sandwich_norms else "add"
        combine = Combine(k, spec.hidden_size, act, "fp32", epilogue, settings.pdl)
        self._launch(combine, rows.size, "expert_out", out, rows.size)
        if spec.sandwich_norms:
            self._post_norm(p + "mlp_post_norm.weight", rows)

    def _expert_form(self, name: str) -> WeightForm:
        format_, _, group_size = self._stored(name)
        return WeightForm(format_, self.settings.activation, group_size or 0, name + ".zero" in self.weights)

    def _expert_tiles(self, forms: list[WeightForm], rows: "_Rows") -> tuple[list[GemmTile], bool]:
        """A tile for each of both products, with blocks of as many pairs, and whether pairs need no sorting."""
        experts, capability = self.spec.experts, self.settings.capability
        assert experts is not None
        pairs = rows.count * experts.top_k
        direct = rows.kind == "decode" and pairs <= _DIRECT_PAIRS
        # Deterministic: the same blocks for any number of tokens.
        each = _DIRECT_PAIRS if self.settings.deterministic else max(1, pairs // experts.num_experts)
        wanted = gemm_tiles(forms[0], True, pairs if direct else each, capability)
        first = next((tile for tile in wanted if not direct or tile.block_m >= pairs), None)
        if first is None:
            first = replace(wanted[0], block_m=_DIRECT_PAIRS)
        second = gemm_tiles(forms[1], False, first.block_m, capability)
        alike = next((tile for tile in second if tile.block_m == first.block_m), None)
        return [first, alike or replace(second[0], block_m=first.block_m)], direct

    def _joined(self, name: str, x: str, post_norm: str, rows: "_Rows") -> None:
        """residual += x @ weightᵀ, normalized on the way where the model does that."""
        if not self.spec.sandwich_norms:
            self._product(name, x, "residual", "add", rows)
            return
        self._buffer("joining", "fp32", "#T", self.spec.hidden_size)
        self._product(name, x, "joining", "store", rows)
        self._post_norm(post_norm, rows)

    def _post_norm(self, name: str, rows: "_Rows") -> None:
        variant = PostNormAdd(self.spec.hidden_size, self.spec.norm_eps, pdl=self.settings.pdl)
        self._launch(variant, rows.size, "joining", name, "residual")

    def _logits(self, rows: "_Rows") -> None:
        name = "lm_head" if "lm_head.weight" in self.weights else "embed"
        self._buffer("logits", "fp32", "#S", self.spec.vocab_size)
        x = "residual"
        if rows.kind == "mixed":
            rows = _Rows("mixed", "#S", self.settings.ceilings.max_batch_size, rows.context, picked="sample_rows")
        self._product(
            name, x, "logits", "store", rows, norm="final_norm.weight", softcap=self.spec.final_softcap
        )  # fmt: skip

    # Products

    def one_product(self, product: Product, rows: "_Rows") -> None:
        self._buffer("x", "fp32" if product.normed else self.settings.activation, "#T", product.k)
        self._buffer("out", product.out_type, "#T", product.columns)
        norm = "product_norm" if product.normed else None
        self._product("product", "x", "out", product.epilogue, rows, norm=norm, softcap=product.softcap)

    def _product(
        self,
        name: str,
        x: str,
        out: str,
        epilogue: Epilogue,
        rows: "_Rows",
        *,
        norm: str | None = None,
        softcap: float | None = None,
    ) -> None:
        format_, (n, k), group_size = self._stored(name)
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
            out_type=_float(self._buffers[out].type),
        )
        choice = self.tactics.choose(product, rows.count, decode=rows.kind == "decode")
        decode = rows.kind == "decode"
        self._products[product.key(rows.count, decode=decode)] = (product, rows.count, decode)
        operands = self._operands(name)
        if isinstance(choice, GemvTile):
            self._stream(product, choice, rows, x, norm, operands, out)
            return
        quantized = product.quantizes_x
        if norm is not None:
            x = self._normalized(x, norm, rows, quantized=quantized)
        elif quantized:
            x = self._quantized(x, k, rows)
        if isinstance(choice, GemmTile):
            self._multiply(product, choice, rows, x, operands, out)
        else:
            self._library(product, rows, x, operands, out)

    def _stored(self, name: str) -> tuple[Format, tuple[int, int], int | None]:
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

    def _operands(self, name: str) -> list[str]:
        suffixes = (".scale", ".zero", ".bias")
        return [name + ".weight", *(name + suffix for suffix in suffixes if name + suffix in self.weights)]

    def _stream(
        self, product: Product, tile: GemvTile, rows: "_Rows", x: str, norm: str | None, operands: list[str], out: str
    ) -> None:
        variant = Gemv(
            rows=rows.count,
            n=product.columns,
            k=product.k,
            weight=product.weight,
            x_type=self._buffers[x].type,
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
        self._launch(variant, rows.size, x, *([norm] if norm else []), *operands, out)

    def _multiply(self, product: Product, tile: GemmTile, rows: "_Rows", x: str, operands: list[str], out: str) -> None:
        x_type = self._buffers[x].type
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
        self._launch(variant, rows.size, x, *scales, *operands, out, rows.size)

    def _library(self, product: Product, rows: "_Rows", x: str, operands: list[str], out: str) -> None:
        activation = self.settings.activation
        weight, bias = operands[0], operands[1] if product.bias else None
        target, type_ = out, product.out_type
        if product.epilogue == "gated":
            target, type_ = "gate_up", activation
            self._buffer("gate_up", activation, "#T", product.n)
        self._steps.append(
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
            self._launch(variant, rows.size, "gate_up", out)

    def _normalized(self, x: str, norm: str, rows: "_Rows", *, quantized: bool) -> str:
        hidden = self._buffers[x].columns
        out_type: Type = "fp8e4nv" if quantized else self.settings.activation
        out = "normed8" if quantized else "normed"
        self._buffer(out, out_type, "#T", hidden)
        scales = self._scales(out) if quantized else ()
        variant = RmsNorm(
            hidden, self.spec.norm_eps, out_type, picks_rows=rows.picked is not None, pdl=self.settings.pdl
        )
        picked = [rows.picked] if rows.picked else []
        self._launch(variant, rows.size, x, *picked, norm, out, *scales)
        return out

    def _quantized(self, x: str, columns: int, rows: "_Rows") -> str:
        out = x + "8"
        self._buffer(out, "fp8e4nv", "#T", columns)
        variant = Quantize(columns, self.settings.activation, pdl=self.settings.pdl)
        self._launch(variant, rows.size, x, out, *self._scales(out))
        return out

    def _scales(self, name: str) -> tuple[str]:
        self._buffer(name + ".scale", "fp32", "#T", 1)
        return (name + ".scale",)

    # Attention variants

    def _shape(self, layer: LayerSpec) -> AttentionShape:
        return AttentionShape(
            num_heads=self.spec.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            scale=self.spec.attention_scale,
            window=layer.window,
            softcap=self.spec.attention_softcap,
            act_type=self.settings.activation,
            kv_type=self.settings.kv_type,
        )

    def _decode_variant(self, layer: LayerSpec, rows: "_Rows") -> DecodeAttention:
        return DecodeAttention(
            self._shape(layer),
            rotary_dim=self.spec.ropes[layer.rope].rotary_dim,
            qk_norm_eps=self.spec.norm_eps if self.spec.qk_norm else None,
            qkv_type=self.settings.activation,
            pdl=self.settings.pdl,
        ).default(rows.count, rows.context)

    def _append_variant(self, layer: LayerSpec) -> RopeAppend:
        return RopeAppend(
            num_heads=self.spec.num_heads,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            rotary_dim=self.spec.ropes[layer.rope].rotary_dim,
            qk_norm_eps=self.spec.norm_eps if self.spec.qk_norm else None,
            qkv_type=self.settings.activation,
            act_type=self.settings.activation,
            kv_type=self.settings.kv_type,
            pdl=self.settings.pdl,
        )

    def _prefill_variant(self, layer: LayerSpec) -> PrefillAttention:
        return PrefillAttention(self._shape(layer), pdl=self.settings.pdl).default(self.settings.capability)

    @property
    def _tile_rows(self) -> int:
        # Every layer has as many heads, so their tiles are alike.
        return self._prefill_variant(self.spec.layers[0]).block_q

    # Bookkeeping

    def _buffer(self, name: str, type_: Type, rows: Size | int, columns: int) -> None:
        known = self._buffers.get(name)
        if known is not None:
            columns = max(columns, known.columns)
            if isinstance(rows, int) and isinstance(known.rows, int):
                rows = max(rows, known.rows)
        self._buffers[name] = Buffer(name, type_, rows, columns)

    def _launch(self, variant: Variant, size: Size, *arguments: str) -> None:
        """Enqueues `variant` over so many rows."""
        name = f"{type(variant).__name__.lower()}-{hashlib.sha256(repr(variant).encode()).hexdigest()[:16]}"
        if name not in self._sources:
            self._sources[name] = variant.source()
        expected = list(self._sources[name].arguments)
        if len(arguments) != len(expected):
            raise ValueError(f"{type(variant).__name__} takes {expected}, not {arguments}.")
        x, y, z = (*(_extent(extent, size) for extent in variant.extents), 1, 1)[:3]
        self._steps.append(Launch(name, (x, y, z), arguments))


def _extent(extent: int | PerRows, size: Size) -> Extent:
    return extent if isinstance(extent, int) else (size, extent.block, extent.factor)


@dataclass(frozen=True)
class _Rows:
    """The rows a part of a program works on: their run-time size, and how many there are at most (decode: exactly)."""

    kind: str
    size: Size
    count: int
    context: int
    picked: str | None = None


def _float(type_: Type) -> Float:
    if type_ == "bf16" or type_ == "fp16" or type_ == "fp32":
        return type_
    raise ValueError(f"No product puts out {type_}.")


def _float_type(tensor: Shaped) -> str:
    return {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}[tensor.dtype]
