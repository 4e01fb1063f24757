"""Mixtures of experts in a launch plan."""

from dataclasses import replace
from typing import Literal

from farrier.plugins.gemm_tiles import gemm_tiles
from farrier.plugins.grouped_gemm import GroupedGemm
from farrier.plugins.routing import Align, Combine, TopK
from farrier.plugins.weight_form import GemmTile, WeightForm
from farrier.targets.cuda.emitter import Emitter, Rows

_DIRECT_PAIRS = 64
"""Up to so many pairs of a token and an expert, sorting them by expert does not pay."""


def lower_experts(emit: Emitter, p: str, rows: Rows, out: str) -> None:
    """Router, the chosen experts' products over pairs of a token and an expert, and their sum: added to the buffer
    `out` where that is the residual, else stored there. `p`: the layer's prefix."""
    spec, settings, act = emit.spec, emit.settings, emit.settings.activation
    experts = spec.experts
    assert experts is not None
    k, num, width = experts.top_k, experts.num_experts, experts.intermediate_size
    x = emit.normalized("residual", p + "mlp_norm.weight", rows, quantized=False)
    emit.buffer("router_logits", "fp32", "#T", num)
    emit.buffer("expert_ids", "i32", "#T", k)
    emit.buffer("routing", "fp32", "#T", k)
    emit.product(p + "router", x, "router_logits", "store", rows)
    top = TopK(num, k, experts.normalize_top_k, settings.pdl)
    # What is negative marks padding: of a decode step, the context length.
    padding = "context_lens" if rows.kind == "decode" else "slots"
    emit.launch(top, rows.size, "router_logits", padding, "expert_ids", "routing", rows.size)

    emit.buffer("expert_hidden", act, "#T", k * width)
    emit.buffer("expert_out", act, "#T", k * spec.hidden_size)
    forms = [_form(emit, p + name) for name in ("experts.gate_up", "experts.down")]
    tiles, direct = _tiles(emit, forms, rows)
    pairs = ["expert_ids"]
    if not direct:
        align = Align(num, k, tiles[0].block_m, settings.pdl)
        blocks = align.blocks.count(max(settings.ceilings.max_num_tokens, rows.count))
        emit.buffer("pairs", "i32", blocks * align.block, 1)
        emit.buffer("block_experts", "i32", blocks, 1)
        emit.launch(align, rows.size, "expert_ids", "pairs", "block_experts", rows.size)
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
        operands = emit.operands(f"{p}experts.{name}")
        emit.launch(variant, rows.size, ins, *operands, *pairs, *routing, outs, rows.size)
    epilogue: Literal["add", "store"] = "add" if out == "residual" else "store"
    combine = Combine(k, spec.hidden_size, act, "fp32", epilogue, settings.pdl)
    emit.launch(combine, rows.size, "expert_out", out, rows.size)


def _form(emit: Emitter, name: str) -> WeightForm:
    format_, _, group_size = emit.stored(name)
    return WeightForm(format_, emit.settings.activation, group_size or 0, name + ".zero" in emit.weights)


def _tiles(emit: Emitter, forms: list[WeightForm], rows: Rows) -> tuple[list[GemmTile], bool]:
    """A tile for each of both products, with blocks of as many pairs, and whether pairs need no sorting."""
    experts, capability = emit.spec.experts, emit.settings.capability
    assert experts is not None
    pairs = rows.count * experts.top_k
    direct = rows.kind == "decode" and pairs <= _DIRECT_PAIRS
    # Deterministic: the same blocks for any number of tokens.
    each = _DIRECT_PAIRS if emit.settings.deterministic else max(1, pairs // experts.num_experts)
    wanted = gemm_tiles(forms[0], True, pairs if direct else each, capability)
    first = next((tile for tile in wanted if not direct or tile.block_m >= pairs), None)
    if first is None:
        first = replace(wanted[0], block_m=_DIRECT_PAIRS)
    second = gemm_tiles(forms[1], False, first.block_m, capability)
    alike = next((tile for tile in second if tile.block_m == first.block_m), None)
    return [first, alike or replace(second[0], block_m=first.block_m)], direct
