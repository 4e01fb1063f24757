"""The sampling reference against a naive float64 implementation, and against statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from farrier.targets.engine import SamplingArrays
from farrier.targets.sampling import NO_TOKEN, sample, uniforms

Float32 = npt.NDArray[np.float32]


@dataclass
class Row:
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    step: int = 0
    num_logprobs: int = -1
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    bias: dict[int, float] = field(default_factory=dict)
    allowed: set[int] | None = None


def arrays(rows: Sequence[Row], vocab_size: int) -> SamplingArrays:
    def column(name: str, dtype: Any) -> npt.NDArray[Any]:
        return np.array([getattr(row, name) for row in rows], dtype)

    def starts(lengths: list[int]) -> npt.NDArray[np.int32]:
        return np.cumsum([0, *lengths]).astype(np.int32)

    masks = None
    if any(row.allowed is not None for row in rows):
        bits = np.zeros((len(rows), -(-vocab_size // 32) * 32), np.uint8)
        for index, row in enumerate(rows):
            bits[index, sorted(range(vocab_size) if row.allowed is None else row.allowed)] = 1
        masks = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
    history_starts = starts([len(row.prompt) + len(row.output) for row in rows])
    return SamplingArrays(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        presence_penalty=column("presence_penalty", np.float32),
        frequency_penalty=column("frequency_penalty", np.float32),
        seed=column("seed", np.uint64),
        step=column("step", np.uint64),
        num_logprobs=column("num_logprobs", np.int32),
        history_ids=np.array([token for row in rows for token in row.prompt + row.output], np.int32),
        history_starts=history_starts,
        output_starts=history_starts[:-1] + np.array([len(row.prompt) for row in rows], np.int32),
        bias_ids=np.array([token for row in rows for token in row.bias], np.int32),
        bias_values=np.array([value for row in rows for value in row.bias.values()], np.float32),
        bias_starts=starts([len(row.bias) for row in rows]),
        masks=masks,
    )


def draw(logits: Float32, rows: Sequence[Row]) -> list[int]:
    return sample(logits, arrays(rows, logits.shape[1])).token_ids.tolist()


def splitmix_uniform(seed: int, step: int) -> float:
    """In Python's integers."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    return (mix((mix(seed) + (step + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53


def naive_weights(logits: Float32, row: Row) -> dict[int, float] | None:
    """Token → weight of what may be drawn, one token at a time; None where float32 may decide otherwise."""
    x = {}
    for token, logit in enumerate(logits.tolist()):
        if row.allowed is not None and token not in row.allowed:
            continue
        value = logit + row.bias.get(token, 0.0)
        if token in row.prompt or token in row.output:
            value = value / row.repetition_penalty if value > 0 else value * row.repetition_penalty
        count = row.output.count(token)
        if count:
            value -= row.frequency_penalty * count + row.presence_penalty
        if value > -math.inf:
            x[token] = value
    ranked = sorted(x, key=lambda token: (-x[token], token))
    if row.temperature == 0:
        return {ranked[0]: 1.0}
    if row.top_k:
        ranked = ranked[: row.top_k]
    best = x[ranked[0]]
    weight = {token: math.exp((x[token] - best) / row.temperature) for token in ranked}
    kept = []
    mass, total = 0.0, sum(weight.values())
    for token in ranked:
        if row.top_p < 1 and abs(mass / total - row.top_p) < 1e-5:
            return None
        if row.min_p > 0 and abs(weight[token] - row.min_p) < 1e-5:
            return None
        if (row.top_p == 1 or mass / total < row.top_p) and weight[token] >= row.min_p:
            kept.append(token)
        mass += weight[token]
    return {token: weight[token] for token in sorted(kept)}


def naive_draw(weights: dict[int, float], uniform: float) -> int | None:
    cumulative, total = 0.0, sum(weights.values())
    for token, weight in weights.items():
        cumulative += weight
        if abs(cumulative / total - uniform) < 1e-5:
            return None
        if cumulative / total > uniform:
            return token
    return None


ALONE = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "low temperature": {"temperature": 0.3},
    "high temperature": {"temperature": 20.0},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-k of one": {"temperature": 1.0, "top_k": 1},
    "top-k beyond the vocabulary": {"temperature": 1.0, "top_k": 100_000},
    "top-p": {"temperature": 1.0, "top_p": 0.7},
    "high top-p": {"temperature": 5.0, "top_p": 0.99},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "repetition penalty": {"temperature": 1.0, "repetition_penalty": 1.5, "prompt": [0, 2, 2], "output": [3]},
    "reward for repetition": {"temperature": 1.0, "repetition_penalty": 0.5, "prompt": [0, 2, 2], "output": [3]},
    "greedy repetition penalty": {"repetition_penalty": 3.0, "prompt": [0, 2, 2], "output": [3]},
    "presence penalty": {"temperature": 1.0, "presence_penalty": 1.5, "prompt": [0], "output": [3, 3, 1]},
    "frequency penalty": {"temperature": 1.0, "frequency_penalty": 0.8, "prompt": [0], "output": [3, 3, 1]},
    "logit bias": {"temperature": 1.0, "bias": {1: 3.0, 2: -100.0, 0: 0.5}},
    "forbidden by bias": {"bias": {0: -math.inf, 2: -math.inf}},
    "mask": {"temperature": 1.0, "allowed": {1, 3, 4}},
    "greedy mask": {"allowed": {1, 3, 4}},
    "everything": {
        "temperature": 1.7,
        "top_k": 6,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "prompt": [0, 5, 6],
        "output": [3, 3, 1],
        "bias": {4: 1.0, 6: -2.0},
        "allowed": {0, 1, 2, 3, 4, 6},
    },
}


@pytest.mark.parametrize("vocab_size", [7, 64, 257, 1000])
@pytest.mark.parametrize("settings", ALONE.values(), ids=ALONE)
def test_agrees_with_the_naive_implementation(settings: dict[str, Any], vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = (2 * rng.standard_normal((60, vocab_size))).astype(np.float32)
    before = logits.copy()
    rows = [Row(**settings, seed=int(rng.integers(2**63)), step=step) for step in range(len(logits))]
    drawn = draw(logits, rows)
    compared = 0
    for token, values, row in zip(drawn, logits, rows, strict=True):
        weights = naive_weights(values, row)
        if weights is None:
            continue
        expected = naive_draw(weights, splitmix_uniform(row.seed, row.step))
        if expected is not None:
            assert token == expected
            compared += 1
    assert compared >= 40, "the comparison leaves out too much"
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.6, "top_k": 9, "top_p": 0.95, "min_p": 0.01},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    count, vocab_size = 20_000, 12
    values = np.random.default_rng(1).standard_normal(vocab_size).astype(np.float32)
    rows = [Row(**settings, seed=seed // 100, step=seed % 100) for seed in range(count)]
    observed = np.bincount(draw(np.tile(values, (count, 1)), rows), minlength=vocab_size)
    weights = naive_weights(values, rows[0])
    assert weights is not None
    expected = np.zeros(vocab_size)
    expected[list(weights)] = np.array(list(weights.values())) / sum(weights.values()) * count
    assert not observed[expected == 0].any()
    observed, expected = observed[expected > 0], expected[expected > 0]
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom)


def test_uniforms_are_those_of_the_definition_and_look_uniform() -> None:
    seeds = np.array([0, 1, 2**63, 2**64 - 1, 42], np.uint64)
    steps = np.array([0, 5, 1, 2**32, 0], np.uint64)
    expected = [splitmix_uniform(int(seed), int(step)) for seed, step in zip(seeds, steps, strict=True)]
    assert uniforms(seeds, steps).tolist() == expected
    for seed, step in ((np.arange(10_000), np.zeros(10_000)), (np.zeros(10_000), np.arange(10_000))):
        numbers = uniforms(seed.astype(np.uint64), step.astype(np.uint64))
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = np.bincount((numbers * 50).astype(int), minlength=50)
        assert ((counts - 200) ** 2 / 200).sum() < 49 + 6 * math.sqrt(98)
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.05


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((len(ALONE), 300)).astype(np.float32)
    rows = [Row(**settings, seed=index, step=index) for index, settings in enumerate(ALONE.values())]
    together = draw(logits, rows)
    alone = [draw(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)]
    assert together == alone
    order = rng.permutation(len(rows))
    assert draw(logits[order], [rows[index] for index in order]) == [together[index] for index in order]


def test_equal_logits_rank_by_token_id() -> None:
    logits = np.zeros((1, 200), np.float32)
    assert draw(logits, [Row()]) == [0]
    assert draw(logits, [Row(allowed={7, 9, 150})]) == [7]
    tied = np.repeat(logits, 500, axis=0)
    assert set(draw(tied, [Row(temperature=1, top_k=1, seed=s) for s in range(500)])) == {0}
    assert set(draw(tied, [Row(temperature=1, top_k=3, seed=s) for s in range(500)])) == {0, 1, 2}
    # The nucleus of 200 equal tokens that holds 2 % of the mass.
    assert set(draw(tied, [Row(temperature=1, top_p=0.0199, seed=s) for s in range(500)])) == {0, 1, 2, 3}
    assert len(set(draw(tied, [Row(temperature=1, min_p=1.0, seed=s) for s in range(500)]))) > 100
    result = sample(logits, arrays([Row(num_logprobs=3)], 200))
    assert result.logprobs[0].top_ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "row",
    [
        Row(temperature=1.0, top_p=1e-9),
        Row(temperature=1.0, top_k=1),
        Row(temperature=1.0, min_p=1.0),
        Row(temperature=1e-30),
        Row(temperature=1e-38, top_k=3, top_p=0.5),
        Row(temperature=100.0, allowed={17}),
    ],
    ids=str,
)
def test_extreme_settings_leave_only_the_likeliest_token(row: Row) -> None:
    logits = np.random.default_rng(0).standard_normal((1, 300)).astype(np.float32)
    logits[0, 17] = 9.0
    for seed in range(50):
        row.seed = seed
        assert draw(logits, [row]) == [17]


def test_extreme_logits() -> None:
    logits = np.full((1, 100), -3e38, np.float32)
    logits[0, 40:42] = 3e38
    drawn = {draw(logits, [Row(temperature=1.0, top_p=0.999, seed=seed)])[0] for seed in range(60)}
    assert drawn == {40, 41}


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.full((400, 600), -np.inf, np.float32)
    logits[:, [0, 299, 599]] = [1.0, -20.0, 1.0]
    for settings in ({}, {"top_k": 50}, {"top_p": 0.9999}, {"min_p": 1e-12}):
        drawn = set(draw(logits, [Row(temperature=2.0, seed=seed, **settings) for seed in range(400)]))
        assert {0, 599} <= drawn <= {0, 299, 599}
    uniform = uniforms(np.arange(400, dtype=np.uint64), np.zeros(400, np.uint64))
    assert uniform.min() < 0.01
    assert uniform.max() > 0.99


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_offer_no_token_say_so_and_spare_the_others(temperature: float) -> None:
    logits = np.zeros((5, 70), np.float32)
    logits[0] = -np.inf
    logits[1, 60] = np.nan
    logits[2, 3] = np.inf
    logits[4, 5] = 50.0
    rows = [Row(temperature=temperature, num_logprobs=2) for _ in range(5)]
    rows[3].allowed = set()
    result = sample(logits, arrays(rows, 70))
    assert result.token_ids.tolist() == [NO_TOKEN] * 4 + [5]
    assert set(result.logprobs) == {4}
    if temperature == 0:  # the path without masks
        rows[3].allowed = None
        assert draw(logits, rows) == [NO_TOKEN] * 3 + [0, 5]


def test_logprobs_are_the_models_own() -> None:
    rng = np.random.default_rng(5)
    logits = (3 * rng.standard_normal((3, 500))).astype(np.float32)
    rows = [
        Row(num_logprobs=0, temperature=2.0, seed=9),
        Row(num_logprobs=4, temperature=0.5, bias={7: 100.0}, allowed={7, 8}),
        Row(),
    ]
    result = sample(logits, arrays(rows, 500))
    assert set(result.logprobs) == {0, 1}
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for row in (0, 1):
        assert result.logprobs[row].sampled == pytest.approx(exact[row, result.token_ids[row]], abs=1e-5)
    assert len(result.logprobs[0].top_ids) == 0
    assert result.token_ids[1] == 7
    assert result.logprobs[1].top_ids.tolist() == np.argsort(-exact[1], kind="stable")[:4].tolist()
    assert result.logprobs[1].top_values == pytest.approx(np.sort(exact[1])[::-1][:4], abs=1e-5)


def test_more_logprobs_than_tokens() -> None:
    logits = np.array([[1.0, 3.0, 2.0]], np.float32)
    result = sample(logits, arrays([Row(num_logprobs=20)], 3))
    assert result.logprobs[0].top_ids.tolist() == [1, 2, 0]


def test_nothing_to_sample() -> None:
    result = sample(np.empty((0, 10), np.float32), arrays([], 10))
    assert result.token_ids.shape == (0,)
    assert result.token_ids.dtype == np.int32


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 255, 256, 513, 5000])
def test_every_token_of_any_vocabulary_can_be_drawn(vocab_size: int) -> None:
    """The whole range of the uniform maps onto all ids, in order."""
    logits = np.zeros((1, vocab_size), np.float32)
    settings = arrays([Row(temperature=1.0)], vocab_size)
    for step in range(300):
        settings.step[0] = step
        expected = int(splitmix_uniform(0, step) * vocab_size)
        assert abs(int(sample(logits, settings).token_ids[0]) - expected) <= (vocab_size > 1000)
