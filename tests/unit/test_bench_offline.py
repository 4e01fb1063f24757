"""What is made of an engine's steps, and how it is shown."""

import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from farrier.runtime.bench.chart import Panel, number, svg
from farrier.runtime.bench.conditions import cache_state
from farrier.runtime.bench.load import ClosedLoop, OpenLoop, ServeResult
from farrier.runtime.bench.offline import BatchLatency, CacheUse, Latency, TimedRun, decode_run
from farrier.runtime.bench.replay import Answer, Failure
from farrier.runtime.bench.report import latency_report, serve_report
from farrier.runtime.bench.statistics import Summary, summary
from farrier.runtime.bench.timed_engine import Step, TimedEngine
from farrier.runtime.bench.traffic import Traffic
from farrier.runtime.llm import LLM
from farrier.runtime.sampling_params import SamplingParams
from farrier.targets.decoder import DecoderSpec, ExpertSpec, LayerSpec, RopeSpec
from farrier.targets.engine import EngineConfig
from farrier.targets.errors import FarrierError
from tests.reference_engine import ReferenceEngine, reference_config


def step(end: float, num_tokens: int, lengths: list[int]) -> Step:
    return Step(end, num_tokens, np.array(lengths, np.int32))


def test_a_timed_engine_notes_every_step_and_changes_nothing() -> None:
    prompts = [{"prompt_token_ids": list(range(length))} for length in (3, 70)]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    config = reference_config(vocab_size=80, max_num_tokens=32, max_seq_len=128)
    timed = TimedEngine(ReferenceEngine(config))
    with LLM(ReferenceEngine(config), kv_blocks=100) as plain, LLM(timed, kv_blocks=100) as measured:
        assert measured.generate(prompts, params) == plain.generate(prompts, params)  # type: ignore[arg-type]
        assert len(timed.steps) == measured.stats().steps
    assert sum(one.num_tokens for one in timed.steps) == 3 + 70 + 2 * 3
    assert timed.steps[-1].lengths.tolist() == [73]
    ends = [one.end for one in timed.steps]
    assert ends == sorted(ends)


def test_first_tokens_end_where_pure_decoding_begins() -> None:
    run = TimedRun(
        start=10.0,
        steps=[
            step(11.0, 12, [8, 4]),  # the second prompt in part
            step(12.0, 5, [9, 8]),  # its rest, beside a decode
            step(12.5, 2, [10, 9]),
            step(13.5, 2, [11, 10]),
            step(14.0, 1, [11]),  # the first has ended
        ],
        cached_tokens=0,
    )
    decoded = decode_run(run, 2, 8)
    assert decoded.first_token == 2.0
    assert decoded.durations == [0.5, 1.0]
    assert decoded.steps == run.steps[2:4]
    assert run.seconds == 4.0


def test_a_prompt_whose_last_piece_is_one_token_is_not_taken_for_a_decode() -> None:
    run = TimedRun(0.0, [step(1.0, 8, [8]), step(2.0, 1, [9]), step(3.0, 1, [10])], 0)
    assert decode_run(run, 1, 9).durations == [1.0]


def test_a_batch_that_never_ran_as_a_whole_has_no_latency() -> None:
    run = TimedRun(0.0, [step(1.0, 8, [8]), step(2.0, 1, [9])], 0)
    with pytest.raises(FarrierError, match="never ran as a whole"):
        decode_run(run, 2, 8)


def a_config(**changes: object) -> EngineConfig:
    spec = DecoderSpec(
        architecture="Test",
        vocab_size=1000,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        layers=(LayerSpec(None, 0, False), LayerSpec(10, 0, False)),
        ropes=(RopeSpec(16, (1.0,) * 8),),
        max_positions=512,
        norm_eps=1e-5,
        attention_scale=0.25,
    )
    changed = {name: changes.pop(name) for name in list(changes) if hasattr(spec, name)}
    fixed = {"spec": replace(spec, **changed), "precision": "bf16", "kv_bytes_per_block": 3200, "block_size": 16}  # type: ignore[arg-type]
    return replace(reference_config(), **(fixed | {"weight_bytes": 10**9} | changes))  # type: ignore[arg-type]


LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
"""Weights of the products of one layer."""


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 2 * (2 * LAYER + 64_000)),
        ({"tied_embeddings": True}, 2 * (2 * LAYER + 64_000)),
        ({"precision": "f32"}, 4 * (2 * LAYER + 64_000)),
        ({"precision": "int8"}, 2 * LAYER + 64_000),
        ({"precision": "int4"}, LAYER + 64_000),
        ({"precision": "int4", "overrides": {"lm_head": "bf16", "layers.0.*": "int8"}}, 1.5 * LAYER + 2 * 64_000),
        ({"weight_bytes": 1000}, 1000),
    ],
)
def test_a_step_reads_the_products_weights_once_and_no_embedding_table(changes: dict[str, object], size: float) -> None:
    assert Traffic(a_config(**changes)).weight_bytes(1) == size


def test_a_step_reads_the_experts_that_its_tokens_reach() -> None:
    moe = {"layers": (LayerSpec(None, 0, True),), "experts": ExpertSpec(8, 2, 32, True), "tied_embeddings": True}
    traffic = Traffic(a_config(**moe))
    attention, one_expert = 64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 32
    assert traffic.weight_bytes(1) == pytest.approx(2 * (attention + 64_000 + 2 * one_expert))
    assert traffic.weight_bytes(1000) == pytest.approx(2 * (attention + 64_000 + 8 * one_expert))


def test_a_step_reads_the_cache_of_its_sequences_as_far_as_windows_reach() -> None:
    traffic = Traffic(a_config())
    per_token_and_layer = 3200 / 16 / 2
    read = traffic.bytes(step(0.0, 2, [100, 4])) - traffic.weight_bytes(2)
    assert read == pytest.approx((100 + 4 + 10 + 4) * per_token_and_layer)


def test_summaries() -> None:
    assert summary([]) is None
    assert summary(range(101)) == Summary(101, 50.0, 50.0, 90.0, 99.0, 100.0)


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (100, "100"), (99.94, "99.9"), (3.14159, "3.14"), (0, "0.00")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def bars_of(drawing: str) -> list[float]:
    root = ElementTree.fromstring(drawing)
    rects = root.findall("{http://www.w3.org/2000/svg}rect")
    return [float(rect.get("width", "")) for rect in rects if rect.get("fill") == "#2f6f9f"]


def test_a_chart_is_well_formed_and_its_bars_are_in_proportion() -> None:
    panels = [Panel("<speed> & more", "tok/s", [("a", 50.0), ("b", 100.0)]), Panel("zero", "ms", [("c", 0.0)])]
    drawing = svg("title < & >", "a headline", "small print " * 40, panels)
    first, second, nothing = bars_of(drawing)
    assert second == pytest.approx(2 * first, abs=0.2)
    assert nothing == 1.0
    texts = [element.text or "" for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text")]
    assert {"title < & >", "a headline", "<speed> & more", "50.0 tok/s", "100 tok/s"} <= set(texts)
    assert max(map(len, texts)) <= 112


def shown(render: Callable[[], object]) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(render())
    return console.export_text()


def some_latency(bytes_per_second: float) -> Latency:
    timing = Summary(2, 0.05, 0.05, 0.06, 0.07, 0.08)
    return Latency([BatchLatency(4, timing, timing, 80.0, bytes_per_second)], CacheUse(True, 512, 0))


def test_a_speed_above_the_memorys_is_called_out() -> None:
    assert "more than the 200 GB/s" in shown(latency_report(some_latency(300e9), {}, 200e9).render)
    assert "more than" not in shown(latency_report(some_latency(100e9), {}, 200e9).render)
    assert "more than" not in shown(latency_report(some_latency(300e9), {}, None).render)


def test_conditions_are_in_the_table_the_chart_and_the_json() -> None:
    report = latency_report(some_latency(1e9), {"power mode": "MAXN"}, None)
    assert re.search(r"power mode +MAXN", shown(report.render))
    assert "power mode: MAXN" in report.as_svg()
    assert report.as_json()["conditions"] == {"power mode": "MAXN"}


def test_failed_requests_are_counted_by_reason_and_are_in_no_average() -> None:
    answers = [Answer(0.0, [1.0, 1.5], 2.0, 10, 2, 0), Answer(1.0, [2.0, 2.5], 4.0, 10, 2, None)]
    failures = [Failure("HTTP 429", "17 wait"), Failure("HTTP 429", "18 wait"), Failure("HTTP 500", "oh")]
    one = summary([1.0])
    result = ServeResult(4.0, answers, failures, one, one, None, one)
    report = serve_report(result, ClosedLoop(3), {})
    assert report.results["failures"] == {"HTTP 429": 2, "HTTP 500": 1}
    assert report.results["output_tokens_per_second"] == 1.0
    assert report.results["cached_tokens"] is None
    assert "3 of 5 failed" in report.headline
    assert "2 × HTTP 429: 17 wait" in report.warnings
    assert "TPOT" in shown(report.render)


def test_an_infinite_rate_is_valid_json() -> None:
    one = summary([1.0])
    result = ServeResult(4.0, [Answer(0.0, [1.0], 2.0, 10, 1, 0)], [], one, None, None, one)
    assert serve_report(result, OpenLoop(float("inf")), {}).results["load"] == {"kind": "open", "rate": None}


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (CacheUse(False, 10, 0), "prefix caching off"),
        (CacheUse(True, 1000, 0), "prefix caching on, cold: 0 of 1,000 prompt tokens found"),
        (CacheUse(True, 1000, 32), "prefix caching on, partly warm: 32 of 1,000 prompt tokens found"),
    ],
)
def test_the_state_of_the_cache_is_told(use: CacheUse, text: str) -> None:
    assert cache_state(use) == text
