"""The device sampler against the sampling reference."""

import math

import numpy as np
import pytest

from farrier.plugins.draw import Draw
from farrier.plugins.sampling import Adjust, Greedy, padded_vocab
from farrier.targets.sampling import NO_TOKEN, sample, uniforms
from tests.kernels.conftest import ON_DEVICE
from tests.unit.test_sampling import ALONE, Row, arrays, naive_weights


def greedy(run, logits):
    rows, vocab_size = logits.shape
    variant = Greedy(vocab_size)
    partials, counters = np.zeros((rows, variant.parts), np.int64), np.zeros(rows, np.int32)
    sampled = np.full(rows, 12345, np.int32)
    run(variant.source(), variant.grid(rows), logits, partials, counters, sampled)
    assert not counters.any()
    return sampled


def draw(run, logits, settings):
    rows, vocab_size = logits.shape
    adjust, draw = Adjust(vocab_size, settings.masks is not None), Draw(vocab_size)
    before = logits.copy()
    work = np.full((rows, padded_vocab(vocab_size)), np.nan, np.float32)
    partials, counters = np.zeros((rows, adjust.parts), np.int64), np.zeros(rows, np.int32)
    sampled = np.full(rows, 12345, np.int32)

    def at_least_one(array):  # nothing cannot be copied to a device
        return array if len(array) else np.zeros(1, array.dtype)

    run(
        adjust.source(),
        adjust.grid(rows),
        logits,
        *([settings.masks] if settings.masks is not None else []),
        at_least_one(settings.bias_ids),
        at_least_one(settings.bias_values),
        settings.bias_starts,
        at_least_one(settings.history_ids),
        settings.history_starts,
        settings.output_starts,
        settings.repetition_penalty,
        settings.presence_penalty,
        settings.frequency_penalty,
        work,
        partials,
        counters,
        sampled,
    )
    assert not counters.any()
    assert logits.tobytes() == before.tobytes()
    run(
        draw.source(),
        draw.grid(rows),
        work,
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.min_p,
        uniforms(settings.seed, settings.step),
        sampled,
    )
    return sampled


@pytest.mark.parametrize("vocab_size", [7, 257, 1000, 32003])
def test_greedy(run, vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = rng.standard_normal((9, vocab_size)).astype(np.float32)
    logits[1] = np.round(logits[1])  # ties
    logits[2] = -np.inf
    logits[3, vocab_size // 2] = np.nan
    logits[4, vocab_size // 2] = np.inf
    logits[5] = -0.0
    logits[5, 3:5] = 0.0
    logits[6] = -np.inf
    logits[6, vocab_size - 1] = -3e38
    logits[7] = -np.abs(logits[7])
    logits[8, 5] = -np.float32(np.nan)
    expected = sample(logits, arrays([Row()] * 9, vocab_size)).token_ids
    assert expected.tolist().count(NO_TOKEN) == 4
    assert greedy(run, logits).tolist() == expected.tolist()


@pytest.mark.parametrize("vocab_size", [7, 1057])
@pytest.mark.parametrize("settings", ALONE.values(), ids=ALONE)
def test_agrees_with_the_reference(run, settings, vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = (2 * rng.standard_normal((6, vocab_size))).astype(np.float32)
    logits[3:] = np.round(logits[3:])  # ties
    rows = [Row(**settings, seed=int(rng.integers(2**63)), step=step) for step in range(len(logits))]
    given = arrays(rows, vocab_size)
    assert draw(run, logits, given).tolist() == sample(logits, given).token_ids.tolist()


def random_row(rng, vocab_size):
    def sometimes(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    tokens = rng.integers(vocab_size, size=40).tolist()
    return Row(
        temperature=sometimes(float(rng.choice([0.1, 0.7, 1.0, 3.0])), 1.0),
        top_k=sometimes(int(rng.integers(1, vocab_size + 2)), 0),
        top_p=sometimes(float(rng.uniform(0.01, 1)), 1.0),
        min_p=sometimes(float(rng.uniform(0, 0.2)), 0.0),
        repetition_penalty=sometimes(float(rng.uniform(0.8, 1.5)), 1.0),
        presence_penalty=sometimes(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=sometimes(float(rng.uniform(-2, 2)), 0.0),
        seed=int(rng.integers(2**63)),
        step=int(rng.integers(5000)),
        prompt=sometimes(tokens[:10], []),
        output=sometimes(tokens[10:] + tokens[20:], []),
        bias=sometimes({token: float(rng.uniform(-5, 5)) for token in tokens[:12]}, {}),
        allowed=sometimes(set(rng.integers(vocab_size, size=vocab_size // 2).tolist()), None),
    )


@pytest.mark.parametrize(("vocab_size", "rows"), [(7, 20), (257, 20), (1000, 20), (32003, 6)])
def test_everything_together_agrees_with_the_reference(run, vocab_size, rows):
    rng = np.random.default_rng(vocab_size)
    logits = (rng.uniform(0.5, 5, (rows, 1)) * rng.standard_normal((rows, vocab_size))).astype(np.float32)
    logits[::4] = np.round(logits[::4])
    logits[1::4, : vocab_size // 2] = -np.inf
    given = arrays([random_row(rng, vocab_size) for _ in range(rows)], vocab_size)
    assert draw(run, logits, given).tolist() == sample(logits, given).token_ids.tolist()


def test_long_histories(run):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 3000)).astype(np.float32)
    rows = [
        Row(
            temperature=temperature,
            frequency_penalty=0.01,
            repetition_penalty=1.1,
            prompt=rng.integers(3000, size=2500).tolist(),
            output=rng.integers(30, size=2500).tolist(),
            seed=1,
        )
        for temperature in (0.0, 1.0)
    ]
    given = arrays(rows, 3000)
    assert draw(run, logits, given).tolist() == sample(logits, given).token_ids.tolist()


EXTREMES = [
    Row(temperature=1.0, top_p=1e-9),
    Row(temperature=1.0, top_k=1),
    Row(temperature=1.0, min_p=1.0),
    Row(temperature=1e-30),
    Row(temperature=1e-38, top_k=3, top_p=0.5),
    Row(temperature=100.0, allowed={17}),
]


def test_extreme_settings_leave_only_the_likeliest_token(run):
    logits = np.random.default_rng(0).standard_normal((1, 300)).astype(np.float32).repeat(6 * 3, 0)
    logits[:, 17] = 9.0
    rows = [Row(**{**vars(row), "seed": seed}) for row in EXTREMES for seed in range(3)]
    assert set(draw(run, logits, arrays(rows, 300)).tolist()) == {17}


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ({}, None),
        ({"allowed": {7, 9, 150}, "temperature": 0.0}, {7}),
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"top_p": 0.0199}, {0, 1, 2, 3}),
        ({"min_p": 1.0}, None),
        ({"top_k": 150, "top_p": 0.0199}, {0, 1, 2}),
    ],
)
def test_equal_logits_rank_by_token_id(run, settings, drawn):
    logits = np.zeros((6, 200), np.float32)
    given = arrays([Row(**{"temperature": 1.0, "seed": seed, **settings}) for seed in range(6)], 200)
    sampled = draw(run, logits, given)
    assert sampled.tolist() == sample(logits, given).token_ids.tolist()
    assert set(sampled.tolist()) <= drawn if drawn else len(set(sampled.tolist())) > 3


def test_extreme_logits(run):
    logits = np.full((10, 100), -3e38, np.float32)
    logits[:, 40:42] = 3e38
    rows = [Row(temperature=1.0, top_p=0.999, seed=seed) for seed in range(10)]
    assert set(draw(run, logits, arrays(rows, 100)).tolist()) == {40, 41}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_offer_no_token_say_so_and_spare_the_others(run, temperature):
    logits = np.zeros((6, 70), np.float32)
    logits[0] = -np.inf
    logits[1, 60] = np.nan
    logits[2, 3] = np.inf
    logits[4, 5] = 50.0
    logits[5, 8] = np.nan  # masked: as good as absent
    rows = [Row(temperature=temperature) for _ in range(6)]
    rows[3].allowed = set()
    rows[5].allowed = {9}
    assert draw(run, logits, arrays(rows, 70)).tolist() == [NO_TOKEN] * 4 + [5, 9]


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 1024, 1025])
def test_every_token_of_any_vocabulary_can_be_drawn(run, vocab_size):
    """The whole range of the uniform maps onto all ids, in order."""
    logits = np.zeros((40, vocab_size), np.float32)
    given = arrays([Row(temperature=1.0, step=step) for step in range(40)], vocab_size)
    assert draw(run, logits, given).tolist() == sample(logits, given).token_ids.tolist()


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 200),
        pytest.param({"top_k": 30, "top_p": 0.9}, 20_000, marks=pytest.mark.skipif(not ON_DEVICE, reason="slow")),
    ],
)
def test_draws_follow_the_distribution(run, settings, count):
    values = np.random.default_rng(11).standard_normal(40).astype(np.float32)
    rows = [Row(temperature=0.8, seed=seed, **settings) for seed in range(count)]
    sampled = draw(run, np.repeat(values[None], count, axis=0), arrays(rows, 40))
    observed = np.bincount(sampled, minlength=40)
    weights = naive_weights(values, rows[0])
    expected = np.zeros(40)
    expected[list(weights)] = np.array(list(weights.values())) / sum(weights.values()) * count
    assert not observed[expected == 0].any()
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.skipif(not ON_DEVICE, reason="slow")
@pytest.mark.parametrize("vocab_size", [128256, 151936])
def test_real_vocabularies(run, vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = (rng.uniform(0.5, 4, (64, 1)) * rng.standard_normal((64, vocab_size))).astype(np.float32)
    assert greedy(run, logits).tolist() == logits.argmax(axis=1).tolist()
    given = arrays([random_row(rng, vocab_size) for _ in range(64)], vocab_size)
    # exp rounds differently here, which hardly ever decides a draw.
    assert np.count_nonzero(draw(run, logits, given) != sample(logits, given).token_ids) <= 1
