"""The table of goals: what counts as reached, and how much work stands behind a figure."""

from typing import Any

import pytest

from farrier.targets.decoder import DecoderSpec, LayerSpec, RopeSpec
from farrier.targets.engine import ENGINE_ABI, Ceilings, EngineConfig, Fingerprint
from tests.device.accuracy import CARD, ON_CARD, tasks_in
from tests.device.results import COLUMNS, FIGURES, MACHINES, PAGE, markdown, page_text, table
from tests.device.work import floating_point_operations

PEER = {"engines": {"llama-8b-bf16": {"decode_tok_s": 199.4, "ttft_128_ms": 10.0, "load_64x128+256_tok_s": 1000.0}}}


def reached(engine: str, **measured: float) -> dict[str, str]:
    rows = table({"engines": {engine: measured}}, PEER)
    titles = {figure.title: figure.name for figure in FIGURES}
    return {titles[row[1]]: row[COLUMNS.index("reached")] for row in rows}


@pytest.mark.parametrize(("value", "verdict"), [(254.9, "no"), (255.0, "must"), (274.9, "must"), (275.0, "aim")])
def test_more_tokens_are_better(value: float, verdict: str) -> None:
    assert reached("llama-8b-bf16", decode_tok_s=value) == {"decode_tok_s": verdict}


@pytest.mark.parametrize(("value", "verdict"), [(10.1, "no"), (10.0, "must"), (5.1, "must"), (5.0, "aim")])
def test_fewer_milliseconds_are_better(value: float, verdict: str) -> None:
    assert reached("llama-8b-bf16", ttft_128_ms=value) == {"ttft_128_ms": verdict}


def test_factors_are_of_what_the_peer_reaches() -> None:
    [row] = table({"engines": {"llama-8b-bf16": {"load_64x128+256_tok_s": 1200}}}, PEER)
    assert row[2:7] == ("1,000", "1,200", "1,100", "1,300", "must")


def test_without_a_peer_there_is_no_verdict_but_on_absolute_goals() -> None:
    assert reached("llama-8b-int4", **{"decode_tok_s": 1.0, "ttft_128_ms": 1.0, "rss_bytes": 0.7e9}) == {
        "decode_tok_s": "–",
        "ttft_128_ms": "–",
        "rss_bytes": "must",
    }


def test_rates_stand_beside_the_ceilings_of_the_same_run() -> None:
    measured = {"load_64x128+256_tok_s": 1, "load_64x128+256_bytes_per_s": 1e12, "load_64x128+256_flop_per_s": 2e14}
    ceilings = {"read_bytes_per_s": 4e12, "bf16_flop_per_s": 8e14}
    [row] = table({"engines": {"llama-8b-bf16": measured}, "ceilings": ceilings}, PEER)
    assert row[7:] == ("1.00 TB/s, 200 TFLOP/s", "25%, 25%")


def test_the_table_is_markdown() -> None:
    text = markdown(table({"engines": {"llama-8b-bf16": {"decode_tok_s": 1.0}}}, PEER))
    header, rule, row = text.splitlines()
    assert set(rule) <= set("|- ")
    assert header.count("|") == rule.count("|") == row.count("|") == len(COLUMNS) + 1


def test_the_page_has_what_the_json_files_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert any(machine.upper() in page for machine in MACHINES)
    assert page_text(page) == page, "run: python tests/device/results.py page"


def test_every_task_is_on_the_card() -> None:
    assert set(ON_CARD.values()) == set(tasks_in(CARD.read_text(encoding="utf-8")))


def config(**changes: Any) -> EngineConfig:
    spec = DecoderSpec(
        **{
            "architecture": "LlamaForCausalLM",
            "vocab_size": 10,
            "hidden_size": 8,
            "num_heads": 2,
            "num_kv_heads": 1,
            "head_dim": 4,
            "intermediate_size": 6,
            "layers": (LayerSpec(None, 0, False),),
            "ropes": (RopeSpec(4, (1.0, 0.1)),),
            "max_positions": 32,
            "norm_eps": 1e-5,
            "attention_scale": 0.5,
            **changes,
        }
    )
    return EngineConfig(
        model="m", target="h100", fingerprint=Fingerprint(ENGINE_ABI, "cuda", "sm_90", (), ()), spec=spec,
        precision="bf16", overrides={}, kv_dtype="bf16", block_size=32, ceilings=Ceilings(1, 1, 32), eos_token_ids=(),
        has_tokenizer=False, source_digest="", files={}, weight_bytes=1, kv_bytes_per_block=1, farrier_version="0",
    )  # fmt: skip


def test_operations_are_counted() -> None:
    # q 8×8, k and v 4×8, o 8×8, gate and up 6×8, down 8×6: 336 weights; 3 tokens see 1 + 2 + 3, over 8 columns of q.
    alone = 2 * 336 * 3 + 4 * 8 * 6 + 2 * 10 * 8 * 2
    assert floating_point_operations(config(), 1, prompt=2, tokens=2) == alone
    assert floating_point_operations(config(), 5, prompt=2, tokens=2) == 5 * alone


def test_a_window_limits_what_is_seen() -> None:
    layers = (LayerSpec(2, 0, False),)
    full = floating_point_operations(config(), 1, prompt=4, tokens=1)
    # 1 + 2 + 2 + 2 instead of 1 + 2 + 3 + 4
    assert full - floating_point_operations(config(layers=layers), 1, prompt=4, tokens=1) == 4 * 8 * 3
