"""Walks a `DecoderSpec` into a launch plan and the kernels it needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from farrier.plugins.attention import AttentionShape, DecodeAttention, PrefillAttention
from farrier.plugins.draw import Draw
from farrier.plugins.embedding import Embedding
from farrier.plugins.kernel import KernelSource
from farrier.plugins.logprobs import MAX_LOGPROBS, Logprobs
from farrier.plugins.norm import PostNormAdd
from farrier.plugins.rope import RopeAppend
from farrier.plugins.sampling import Adjust, Greedy, padded_vocab
from farrier.targets.cuda.emitter import Chooses, Emitter, Rows, Settings, Shaped
from farrier.targets.cuda.experts import lower_experts
from farrier.targets.cuda.plan import Buffer, Program, Step
from farrier.targets.cuda.products import GEMV_ROWS, Choice, Product
from farrier.targets.decoder import DecoderSpec, LayerSpec

_DECODE_ROWS = (*GEMV_ROWS, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_MIXED_ROWS = (64, 256)
_CONTEXTS = (1024, 8192)
_FEW_ROWS = 16
"""Up to so many sequences, attention is split over the context, and how finely depends on its length."""


@dataclass(frozen=True)
class Lowered:
    programs: tuple[Program, ...]
    buffers: tuple[Buffer, ...]
    sources: Mapping[str, KernelSource]
    tile_rows: int
    products: Mapping[str, tuple[Product, int, bool]]
    """Key in `model.cache` → each product, the rows it was chosen for, and whether they are decode rows."""


def lower(spec: DecoderSpec, weights: Mapping[str, Shaped], settings: Settings, tactics: Chooses) -> Lowered:
    """`weights`: the engine file's tensors (see `pack`). Raises BuildError for what the kernels cannot do."""
    return _Walk(Emitter(spec, weights, settings, tactics)).lowered()


def lower_product(
    spec: DecoderSpec, product: Product, choice: Choice, rows: int, settings: Settings, *, decode: bool
) -> tuple[tuple[Step, ...], tuple[Buffer, ...], Mapping[str, KernelSource]]:
    """The steps of one product alone, for a sweep: from the buffer `x` and the weight `product` to `out`."""
    emit = Emitter(spec, product.tensors("product"), settings, _Fixed(choice))
    emit.buffer("x", "fp32" if product.normed else settings.activation, "#T", product.k)
    emit.buffer("out", product.out_type, "#T", product.columns)
    norm = "product_norm" if product.normed else None
    place = Rows("decode" if decode else "mixed", "#T", rows, 0)
    emit.product("product", "x", "out", product.epilogue, place, norm=norm, softcap=product.softcap)
    return emit.taken(), tuple(emit.buffers.values()), emit.sources


class _Fixed:
    def __init__(self, choice: Choice) -> None:
        self._choice = choice

    def choose(self, product: Product, rows: int, *, decode: bool) -> Choice:
        return self._choice


class _Walk:
    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        self._spec = emit.spec
        self._settings = emit.settings

    def lowered(self) -> Lowered:
        programs = [*self._decode_programs(), *self._mixed_programs(), *self._tails()]
        return Lowered(
            tuple(programs),
            tuple(self._emit.buffers.values()),
            self._emit.sources,
            self._tile_rows,
            self._emit.products,
        )

    # Programs

    def _decode_programs(self) -> list[Program]:
        if self._settings.deterministic:
            return []
        ceilings = self._settings.ceilings
        rows_list = [rows for rows in _DECODE_ROWS if rows < ceilings.max_batch_size]
        rows_list.append(next((r for r in _DECODE_ROWS if r >= ceilings.max_batch_size), ceilings.max_batch_size))
        programs = []
        for rows in rows_list:
            contexts = [c for c in _CONTEXTS if c < ceilings.max_seq_len] if rows <= _FEW_ROWS else []
            for context in (*contexts, ceilings.max_seq_len):
                self._forward(Rows("decode", "#T", rows, context))
                programs.append(Program("decode", rows, context, self._emit.taken()))
        return programs

    def _mixed_programs(self) -> list[Program]:
        most = self._settings.ceilings.max_num_tokens
        programs = []
        for rows in (*(rows for rows in _MIXED_ROWS if rows < most), most):
            self._forward(Rows("mixed", "#T", rows, self._settings.ceilings.max_seq_len))
            programs.append(Program("mixed", rows, self._settings.ceilings.max_seq_len, self._emit.taken()))
        return programs

    def _tails(self) -> list[Program]:
        """From logits to tokens. Greedy always runs; a row that is adjusted or drawn is overwritten after it."""
        vocab, most = self._spec.vocab_size, self._settings.ceilings.max_batch_size
        programs = []

        def add(kind: Literal["greedy", "sample", "masked", "logprobs"]) -> None:
            programs.append(Program(kind, most, 0, self._emit.taken()))

        pdl = self._settings.pdl
        greedy = Greedy(vocab, pdl=pdl)
        adjust = Adjust(vocab, pdl=pdl)
        self._emit.buffer("rank_partials", "i64", "#S", max(greedy.parts, adjust.parts))
        self._emit.buffer("rank_counters", "i32", "#S", 1)
        ranking = ("rank_partials", "rank_counters", "sampled")
        self._emit.launch(greedy, "#S", "logits", *ranking)
        add("greedy")
        self._emit.buffer("work", "fp32", "#S", padded_vocab(vocab))
        for kind in ("sample", "masked"):
            adjust = Adjust(vocab, masked=kind == "masked", pdl=pdl)
            masks = ("masks",) if adjust.masked else ()
            self._emit.launch(
                adjust, "#S", "logits", *masks, "bias_ids", "bias_values", "bias_starts", "history_ids",
                "history_starts", "output_starts", "repetition_penalty", "presence_penalty", "frequency_penalty",
                "work", *ranking,
            )  # fmt: skip
            draw = Draw(vocab, pdl=pdl)
            self._emit.launch(draw, "#S", "work", "temperature", "top_k", "top_p", "min_p", "draws", "sampled")
            add(kind)
        logprobs = Logprobs(vocab, pdl=pdl)
        self._emit.buffer("top_partials", "i64", "#S", logprobs.parts * 32)
        self._emit.buffer("exp_sums", "fp32", "#S", logprobs.parts * 2)
        self._emit.buffer("token_logprobs", "fp32", "#S", 1)
        self._emit.buffer("top_ids", "i32", "#S", MAX_LOGPROBS)
        self._emit.buffer("top_values", "fp32", "#S", MAX_LOGPROBS)
        self._emit.launch(
            logprobs, "#S", "logits", "num_logprobs", "sampled", "top_partials", "exp_sums", "rank_counters",
            "token_logprobs", "top_ids", "top_values",
        )  # fmt: skip
        add("logprobs")
        return programs

    # The model

    def _forward(self, rows: Rows) -> None:
        spec = self._spec
        table = self._emit.weights["embed.weight"]
        self._emit.buffer("residual", "fp32", "#T", spec.hidden_size)
        self._emit.buffer("sampled", "i32", "#S", 1)
        embedding = Embedding(
            vocab_size=table.shape[0],
            hidden=spec.hidden_size,
            table_type=_float_type(table),
            multiplier=spec.embedding_multiplier,
            pdl=self._settings.pdl,
        )
        self._emit.launch(embedding, rows.size, "token_ids", "sampled", "embed.weight", "residual")
        for index, layer in enumerate(spec.layers):
            self._attention(index, layer, rows)
            self._mlp(index, layer, rows)
        self._logits(rows)

    def _attention(self, index: int, layer: LayerSpec, rows: Rows) -> None:
        spec, p = self._spec, f"layers.{index}."
        columns = spec.q_size + 2 * spec.kv_size
        self._emit.buffer("qkv", self._settings.activation, "#T", columns)
        self._emit.buffer("attended", self._settings.activation, "#T", spec.q_size)
        self._emit.product(p + "qkv", "residual", "qkv", "store", rows, norm=p + "attn_norm.weight")
        rope = (f"rope.{layer.rope}.cos", f"rope.{layer.rope}.sin")
        norms = (f"{p}q_norm.weight", f"{p}k_norm.weight") if spec.qk_norm else ()
        caches = (f"key_cache.{index}", f"value_cache.{index}")
        blocks = ("block_ids", "block_starts")
        if rows.kind == "decode":
            variant = self._decode_variant(layer, rows)
            per_row = spec.num_heads * variant.splits
            self._emit.buffer("partial_out", "fp32", "#B", per_row * spec.head_dim)
            self._emit.buffer("partial_stats", "fp32", "#B", per_row * 2)
            self._emit.buffer("attention_counters", "i32", "#B", spec.num_kv_heads)
            partial = ("partial_out", "partial_stats", "attention_counters")
            self._emit.launch(
                variant, rows.size, "qkv", "context_lens", *blocks, *rope, *norms, *caches, *partial,
                "attended",
            )  # fmt: skip
        else:
            append = self._append_variant(layer)
            self._emit.buffer("q", self._settings.activation, "#T", spec.q_size)
            self._emit.launch(
                append, rows.size, "qkv", "positions", "slots", *rope, *norms, "q", *caches
            )  # fmt: skip
            prefill = self._prefill_variant(layer)
            self._emit.launch(
                prefill, "#tiles", "q", *caches, "tiles", "query_starts", "context_lens", *blocks,
                "attended",
            )  # fmt: skip
        self._joined(p + "o", "attended", p + "attn_post_norm.weight", rows)

    def _mlp(self, index: int, layer: LayerSpec, rows: Rows) -> None:
        p = f"layers.{index}."
        if layer.moe:
            lower_experts(self._emit, p, rows, self._joining())
            self._post_norm(p + "mlp_post_norm.weight", rows)
            return
        self._emit.buffer("hidden", self._settings.activation, "#T", self._spec.intermediate_size)
        self._emit.product(p + "gate_up", "residual", "hidden", "gated", rows, norm=p + "mlp_norm.weight")
        self._joined(p + "down", "hidden", p + "mlp_post_norm.weight", rows)

    def _joined(self, name: str, x: str, post_norm: str, rows: Rows) -> None:
        """residual += x @ weightᵀ, normalized on the way where the model does that."""
        out = self._joining()
        self._emit.product(name, x, out, "add" if out == "residual" else "store", rows)
        self._post_norm(post_norm, rows)

    def _joining(self) -> str:
        """Where what joins the residual goes: there, or, to be normalized first, into a buffer of its own."""
        if not self._spec.sandwich_norms:
            return "residual"
        self._emit.buffer("joining", "fp32", "#T", self._spec.hidden_size)
        return "joining"

    def _post_norm(self, name: str, rows: Rows) -> None:
        if self._spec.sandwich_norms:
            variant = PostNormAdd(self._spec.hidden_size, self._spec.norm_eps, pdl=self._settings.pdl)
            self._emit.launch(variant, rows.size, "joining", name, "residual")

    def _logits(self, rows: Rows) -> None:
        name = "lm_head" if "lm_head.weight" in self._emit.weights else "embed"
        self._emit.buffer("logits", "fp32", "#S", self._spec.vocab_size)
        x = "residual"
        if rows.kind == "mixed":
            rows = Rows("mixed", "#S", self._settings.ceilings.max_batch_size, rows.context, picked="sample_rows")
        self._emit.product(
            name, x, "logits", "store", rows, norm="final_norm.weight", softcap=self._spec.final_softcap
        )  # fmt: skip

    # Attention variants

    def _shape(self, layer: LayerSpec) -> AttentionShape:
        return AttentionShape(
            num_heads=self._spec.num_heads,
            num_kv_heads=self._spec.num_kv_heads,
            head_dim=self._spec.head_dim,
            scale=self._spec.attention_scale,
            window=layer.window,
            softcap=self._spec.attention_softcap,
            act_type=self._settings.activation,
            kv_type=self._settings.kv_type,
        )

    def _decode_variant(self, layer: LayerSpec, rows: Rows) -> DecodeAttention:
        return DecodeAttention(
            self._shape(layer),
            rotary_dim=self._spec.ropes[layer.rope].rotary_dim,
            qk_norm_eps=self._spec.norm_eps if self._spec.qk_norm else None,
            qkv_type=self._settings.activation,
            pdl=self._settings.pdl,
        ).default(rows.count, rows.context)

    def _append_variant(self, layer: LayerSpec) -> RopeAppend:
        return RopeAppend(
            num_heads=self._spec.num_heads,
            num_kv_heads=self._spec.num_kv_heads,
            head_dim=self._spec.head_dim,
            rotary_dim=self._spec.ropes[layer.rope].rotary_dim,
            qk_norm_eps=self._spec.norm_eps if self._spec.qk_norm else None,
            qkv_type=self._settings.activation,
            act_type=self._settings.activation,
            kv_type=self._settings.kv_type,
            pdl=self._settings.pdl,
        )

    def _prefill_variant(self, layer: LayerSpec) -> PrefillAttention:
        return PrefillAttention(self._shape(layer), pdl=self._settings.pdl).default(self._settings.capability)

    @property
    def _tile_rows(self) -> int:
        # Every layer has as many heads, so their tiles are alike.
        return self._prefill_variant(self._spec.layers[0]).block_q


def _float_type(tensor: Shaped) -> str:
    return {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}[tensor.dtype]
