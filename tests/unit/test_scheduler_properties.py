"""Random traffic through both loops of the engine core, against each other and against generating each output alone.

The reference engine checks at every step that the KV cache, blocks of a step under way and references to samples are
used as the contract has it.
"""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from farrier.runtime.core import CoreOptions, EngineCore
from farrier.runtime.intake import Intake, derive_seed
from farrier.runtime.outputs import Delta
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.scheduler import CapacityPolicy
from farrier.targets.engine import EngineConfig, SamplingArrays
from farrier.targets.errors import RequestError
from farrier.targets.sampling import sample
from tests.reference_engine import ReferenceEngine, logits_after, reference_config

VOCAB_SIZE = 12
EOS = 1


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    params: SamplingParams
    aborted_at: int | None
    guided: bool


class ToyGuide:
    """Two tokens of three may come next, depending on every token before; ends when their sum is a multiple of 29."""

    def __init__(self) -> None:
        self.total = 1

    @property
    def is_finished(self) -> bool:
        return self.total % 29 == 0

    def fill_mask(self, row: npt.NDArray[np.uint32]) -> None:
        row[0] = sum(1 << token for token in range(VOCAB_SIZE) if (token + self.total) % 3)

    def accept(self, token_id: int) -> None:
        self.total += token_id


class OverlappingEngine(ReferenceEngine):
    overlaps = True


@dataclass(frozen=True)
class Scenario:
    config: EngineConfig
    num_blocks: int
    policy: CapacityPolicy
    enable_prefix_caching: bool
    arrivals: list[Arrival]


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.sampled_from([12, 8, 16, None, 1, 3]))
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        min_p=draw(st.sampled_from([0.0, 0.1])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.0, 1.0, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.5])),
        logit_bias=draw(st.sampled_from([{}, {}, {3: 2.5, 4: -100.0}])),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(4, max_tokens or 4))),
        stop_token_ids=draw(st.sampled_from([(), (), (5,)])),
        ignore_eos=draw(st.sampled_from([True, True, False])),
        logprobs=draw(st.sampled_from([None, None, 2])),
        priority=draw(st.integers(-1, 1)),
    )


@st.composite
def scenarios(draw: st.DrawFn, policy: CapacityPolicy) -> Scenario:
    block_size = draw(st.sampled_from([1, 2, 4]))
    config = reference_config(
        vocab_size=VOCAB_SIZE,
        block_size=block_size,
        max_batch_size=draw(st.sampled_from([4, 3, 2, 1, 6])),
        max_num_tokens=draw(st.sampled_from([16, 8, 4, 2, 1])),
        max_seq_len=draw(st.sampled_from([32, 24, 16])),
        eos_token_ids=(EOS,),
    )
    # Prompts begin alike, and few tokens repeat often: prefixes are found, and what is no prefix looks like one.
    prompt_token = st.integers(0, 2)
    stems = draw(st.lists(st.lists(prompt_token, min_size=3, max_size=12), min_size=1, max_size=2))
    arrivals = []
    step = 0
    for _ in range(draw(st.sampled_from([5, 3, 8]))):
        step += draw(st.sampled_from([0, 0, 1, 4]))
        prompt = draw(st.sampled_from(stems)) + draw(st.lists(prompt_token, max_size=4))
        aborted_at = draw(st.sampled_from([None, None, None, step, step + 2, step + 7]))
        guided = draw(st.sampled_from([False, False, False, True]))
        arrivals.append(Arrival(step, prompt, draw(sampling_params()), aborted_at, guided))
    return Scenario(
        config=config,
        num_blocks=draw(st.sampled_from([5, 4, 6, 10, 2])) * 4 // block_size,
        policy=policy,
        enable_prefix_caching=draw(st.sampled_from([True, True, False])),
        arrivals=arrivals,
    )


def generate_alone(arrival: Arrival, index: int, max_len: int) -> tuple[list[int], str]:
    """The output and why it ended, the naive way: no cache, no batch, no core."""
    prompt, params = arrival.prompt, arrival.params
    guide = ToyGuide() if arrival.guided else None
    mask = np.zeros((1, 1), np.uint32)
    tokens = list(prompt)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    assert params.seed is not None
    while True:
        output = tokens[len(prompt) :]
        bias = dict(params.logit_bias)
        if len(output) < params.min_tokens:
            bias |= dict.fromkeys(stops, -np.inf)
        if guide is not None:
            guide.fill_mask(mask[0])
        logits = logits_after(np.array(tokens, np.int32), VOCAB_SIZE)
        arrays = SamplingArrays(
            temperature=np.array([params.temperature], np.float32),
            top_k=np.array([params.top_k], np.int32),
            top_p=np.array([params.top_p], np.float32),
            min_p=np.array([params.min_p], np.float32),
            repetition_penalty=np.array([params.repetition_penalty], np.float32),
            presence_penalty=np.array([params.presence_penalty], np.float32),
            frequency_penalty=np.array([params.frequency_penalty], np.float32),
            seed=np.array([derive_seed(params.seed, index)], np.uint64),
            step=np.array([len(output)], np.uint64),
            num_logprobs=np.array([-1], np.int32),
            history_ids=np.array(tokens, np.int32),
            history_starts=np.array([0, len(tokens)], np.int32),
            output_starts=np.array([len(prompt)], np.int32),
            bias_ids=np.array(list(bias), np.int32),
            bias_values=np.array(list(bias.values()), np.float32),
            bias_starts=np.array([0, len(bias)], np.int32),
            masks=None if guide is None else mask,
        )
        token = int(sample(logits[None], arrays).token_ids[0])
        tokens.append(token)
        if token in stops:
            return tokens[len(prompt) :], "stop"
        if guide is not None:
            guide.accept(token)
            if guide.is_finished:
                return tokens[len(prompt) :], "stop"
        if len(tokens) == max_len:
            return tokens[len(prompt) :], "length"


def check_blocks(core: EngineCore) -> None:
    """References are exactly what block tables hold, and what is promised is there."""
    scheduler = core.scheduler
    pool = scheduler.pool
    under_way = [] if core._under_way is None else core._under_way.plan.sequences
    holders = [*scheduler.running, *(sequence for sequence in under_way if sequence.is_finished)]
    held = Counter(block for sequence in holders for block in sequence.block_ids)
    for sequence in under_way:
        assert len(sequence.block_ids) * pool.block_size >= sequence.num_scheduled > sequence.num_computed
    assert all(np.frombuffer(tokens, np.int32).min() >= 0 for _, tokens in pool._published), "an unknown token"
    for block in range(pool.num_blocks):
        assert pool._references[block] == held[block]
    free = [*pool._empty, *pool._idle]
    assert len(free) == len(set(free)) == pool.num_blocks - len(held)
    assert not set(free) & set(held)
    assert 0 <= scheduler._promised <= pool.num_free
    for sequence in holders:
        # What may still be written is nobody else's.
        assert all(held[block] == 1 for block in sequence.block_ids[sequence.num_published :])
    assert scheduler.running == sorted(scheduler.running, key=lambda sequence: sequence.order)
    assert scheduler.waiting == sorted(scheduler.waiting, key=lambda sequence: sequence.order)
    assert all(not sequence.block_ids for sequence in scheduler.waiting)


def run(scenario: Scenario, kind: type[ReferenceEngine]) -> tuple[EngineCore, dict[int, list[list[Delta]]]]:
    """Arrival → deltas of each of its outputs."""
    engine = kind(scenario.config)
    engine.allocate(scenario.num_blocks)
    core = EngineCore(engine, CoreOptions(scenario.num_blocks, scenario.policy, scenario.enable_prefix_caching))
    intake = Intake(scenario.config, None, scenario.num_blocks)
    deltas: dict[int, list[list[Delta]]] = {}
    pending = list(enumerate(scenario.arrivals))
    step = 0
    while pending or core.has_work:
        while pending and pending[0][1].step <= step:
            index, arrival = pending.pop(0)
            with suppress(RequestError):  # it never fits; test_intake.py says when and how that is said
                sequences = intake.sequences(str(index), {"prompt_token_ids": arrival.prompt}, arrival.params)
                for sequence in sequences if arrival.guided else ():
                    sequence.guide = ToyGuide()
                    sequence.update_mask(VOCAB_SIZE)
                core.add(sequences)
                deltas[index] = [[] for _ in range(arrival.params.n)]
        new = [
            d for i, arrival in enumerate(scenario.arrivals) if arrival.aborted_at == step for d in core.abort(str(i))
        ]
        if core.has_work:
            new += core.step()
        assert core.failure is None, core.failure.__cause__
        for delta in new:
            assert delta.error is None
            deltas[int(delta.request_id)][delta.index].append(delta)
        check_blocks(core)
        step += 1
        assert step < 5000, "requests do not end"
    core.check_idle()
    return core, deltas


@pytest.mark.parametrize("policy", get_args(CapacityPolicy))
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_traffic(policy: CapacityPolicy, data: st.DataObject) -> None:
    scenario = data.draw(scenarios(policy))
    plain, overlapped = (check(scenario, kind) for kind in (ReferenceEngine, OverlappingEngine))
    for name, outputs in plain.items():
        others = overlapped[name]
        if "abort" not in (outputs[-1].finish_reason, others[-1].finish_reason):
            assert [replace(delta, num_cached_tokens=0) for delta in others] == [
                replace(delta, num_cached_tokens=0) for delta in outputs
            ]


def check(scenario: Scenario, kind: type[ReferenceEngine]) -> dict[tuple[int, int], list[Delta]]:
    """Runs the scenario and compares it with generating alone. (arrival, output) → its deltas."""
    core, deltas = run(scenario, kind)
    limit = min(scenario.config.ceilings.max_seq_len, scenario.num_blocks * scenario.config.block_size)
    for index, outputs in deltas.items():
        arrival = scenario.arrivals[index]
        params = arrival.params
        max_len = limit if params.max_tokens is None else len(arrival.prompt) + params.max_tokens
        for output, parts in enumerate(outputs):
            reasons = [part.finish_reason for part in parts]
            assert reasons.count(None) == len(reasons) - 1, "an output ends exactly once"
            assert reasons[-1] is not None
            tokens = [token for part in parts for token in part.token_ids]
            expected, reason = generate_alone(arrival, output, max_len)
            if reasons[-1] == "abort":
                assert arrival.aborted_at is not None
                assert tokens == expected[: len(tokens)]
            else:
                assert (tokens, reasons[-1]) == (expected, reason)
    stats = core.stats()
    if scenario.policy == "guaranteed_no_evict":
        assert stats.num_preemptions == 0
    assert stats.kv_cache_usage == 0
    assert stats.generation_tokens == sum(len(d.token_ids) for outputs in deltas.values() for o in outputs for d in o)
    event(f"{kind.__name__}: preempted: {stats.num_preemptions > 0}")
    event(f"{kind.__name__}: prefix hits: {stats.prefix_cache_hits > 0}")
    event(f"{kind.__name__}: evicted or reused idle blocks: {len(core.scheduler.pool._keys) > 0}")
    event(f"{kind.__name__}: references: {core.engine.num_references > 0}")
    return {(index, output): parts for index, outputs in deltas.items() for output, parts in enumerate(outputs)}
