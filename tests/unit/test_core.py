"""The engine core: how outputs end, and whom an error takes along."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from farrier.runtime.core import CoreOptions, EngineCore
from farrier.runtime.intake import Intake
from farrier.runtime.outputs import Delta
from farrier.runtime.request import Sequence
from farrier.runtime.sampling_params import GuidedDecoding, SamplingParams
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.engine import Batch, EngineConfig, StepResult
from farrier.targets.errors import EngineError, FarrierError, RequestError
from tests.reference_engine import ReferenceEngine, ReferenceHandle, logits_after, reference_config

VOCAB_SIZE = 50
NUM_BLOCKS = 200


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "overlapped"])
def overlaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Everything is true of both loops."""
    monkeypatch.setattr(ReferenceEngine, "overlaps", request.param)
    return bool(request.param)


class Fixture:
    """A core on the reference engine, and what is needed to talk to it."""

    def __init__(self, tokenizer: Tokenizer | None = None, engine: type[ReferenceEngine] = ReferenceEngine) -> None:
        vocab_size = VOCAB_SIZE if tokenizer is None else tokenizer.vocab_size
        self.config: EngineConfig = reference_config(vocab_size=vocab_size, max_seq_len=200, eos_token_ids=(2,))
        self.engine = engine(self.config)
        self.engine.allocate(NUM_BLOCKS)
        self.core = EngineCore(self.engine, CoreOptions(NUM_BLOCKS))
        self.intake = Intake(self.config, tokenizer, NUM_BLOCKS)

    def add(self, name: str = "r", prompt: str | list[int] = [3, 4, 5], **params: Any) -> list[Sequence]:  # noqa: B006
        asked = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        sequences = self.intake.sequences(name, asked, SamplingParams(**{"temperature": 0.0, **params}))
        self.core.add(sequences)
        return sequences

    def finish(self) -> list[Delta]:
        deltas = []
        while self.core.has_work:
            deltas += self.core.step()
        self.core.check_idle()
        return deltas


def greedy(prompt: list[int], count: int, vocab_size: int = VOCAB_SIZE, banned: tuple[int, ...] = ()) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits = logits_after(np.array(tokens, np.int32), vocab_size)
        logits[list(banned)] = -np.inf
        tokens.append(int(np.argmax(logits)))
    return tokens[len(prompt) :]


def token_ids(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def prompt_with(*, output: dict[int, int]) -> list[int]:
    """A prompt after which greedy output has these tokens at these positions, found by trying."""
    for first in range(3, VOCAB_SIZE):
        for second in range(3, VOCAB_SIZE):
            tokens = greedy([first, second], max(output) + 1)
            if all(tokens[position] == token for position, token in output.items()):
                return [first, second]
    raise AssertionError("no such prompt")


def test_length() -> None:
    core = Fixture()
    core.add(max_tokens=6, ignore_eos=True)
    deltas = core.finish()
    assert token_ids(deltas) == greedy([3, 4, 5], 6)
    assert [delta.finish_reason for delta in deltas] == [None] * 5 + ["length"]
    assert [delta.text for delta in deltas] == [""] * 6
    assert {(delta.request_id, delta.index, delta.num_prompt_tokens) for delta in deltas} == {("r", 0, 3)}
    assert all(delta.logprobs is None for delta in deltas)


def test_end_of_sequence_token() -> None:
    prompt = prompt_with(output={1: 2})
    core = Fixture()
    core.add(prompt=prompt, max_tokens=6)
    deltas = core.finish()
    assert token_ids(deltas) == greedy(prompt, 2)
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", None)
    core.add(prompt=prompt, max_tokens=6, ignore_eos=True)
    deltas = core.finish()
    assert token_ids(deltas) == greedy(prompt, 6)
    assert deltas[-1].finish_reason == "length"


def test_the_last_token_allowed_may_be_the_end() -> None:
    prompt = prompt_with(output={1: 2})
    core = Fixture()
    core.add(prompt=prompt, max_tokens=2)
    assert core.finish()[-1].finish_reason == "stop"


def test_stop_token() -> None:
    core = Fixture()
    stop = greedy([3, 4, 5], 3)[2]
    core.add(max_tokens=6, stop_token_ids=(stop,))
    deltas = core.finish()
    assert token_ids(deltas) == greedy([3, 4, 5], 3)
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)


def test_min_tokens_forbids_what_would_end_the_output() -> None:
    prompt = prompt_with(output={1: 2})
    core = Fixture()
    core.add(prompt=prompt, max_tokens=6, min_tokens=3)
    deltas = core.finish()
    assert token_ids(deltas)[:3] == greedy(prompt, 3, banned=(2,))


def test_logprobs() -> None:
    core = Fixture()
    core.add(max_tokens=3, ignore_eos=True, logprobs=2)
    deltas = core.finish()
    tokens = [3, 4, 5]
    for delta in deltas:
        logits = logits_after(np.array(tokens, np.int32), VOCAB_SIZE).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        assert delta.logprobs is not None
        (logprobs,) = delta.logprobs
        assert logprobs.token_id == delta.token_ids[0]
        assert logprobs.logprob == pytest.approx(expected.max(), abs=1e-5)
        assert [token for token, _ in logprobs.top] == np.argsort(-expected)[:2].tolist()
        assert logprobs.top[1][1] == pytest.approx(np.sort(expected)[-2], abs=1e-5)
        tokens += delta.token_ids


def test_several_outputs_compute_the_prompt_once() -> None:
    prompt = list(range(3, 23))
    core = Fixture()
    core.add(prompt=prompt, n=4, max_tokens=5, temperature=1.0, seed=1, ignore_eos=True)
    deltas = core.finish()
    outputs = [token_ids([delta for delta in deltas if delta.index == index]) for index in range(4)]
    assert len({tuple(output) for output in outputs}) == 4
    assert core.engine.num_computed_tokens == 20 + 3 * 4 + 4 * 4, "the prompt, its last block thrice, four outputs"
    assert {delta.num_cached_tokens for delta in deltas if delta.index > 0} == {16}


def test_seeds_reproduce_and_differ() -> None:
    core = Fixture()
    for name, seed in (("a", 1), ("b", 1), ("c", 2), ("d", None), ("e", None)):
        core.add(name, temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True)
    deltas = core.finish()
    a, b, c, d, e = (tuple(token_ids([delta for delta in deltas if delta.request_id == name])) for name in "abcde")
    assert a == b
    assert len({a, c, d, e}) == 4


def test_the_prefix_cache_shows_in_deltas_and_stats() -> None:
    core = Fixture()
    prompt = list(range(3, 13))
    core.add("first", prompt, max_tokens=2, ignore_eos=True)
    assert core.finish()[-1].num_cached_tokens == 0
    core.add("second", prompt, max_tokens=2, ignore_eos=True)
    assert core.finish()[-1].num_cached_tokens == 8
    stats = core.core.stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (20, 4)
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (20, 8)
    assert (stats.num_running, stats.num_waiting, stats.steps, stats.kv_cache_usage) == (0, 0, 4, 0)


def test_stats_while_running() -> None:
    core = Fixture()
    core.add("running", list(range(3, 11)), max_tokens=5, ignore_eos=True)
    core.core.step()
    core.add("waiting", n=2)
    stats = core.core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_kv_blocks) == (1, 2, NUM_BLOCKS)
    assert stats.kv_cache_usage == pytest.approx(2 / NUM_BLOCKS)
    core.finish()


def test_abort() -> None:
    core = Fixture()
    core.add("running", n=2, max_tokens=5, ignore_eos=True)
    core.core.step()
    core.add("waiting")
    assert [(d.index, d.finish_reason) for d in core.core.abort("running")] == [(0, "abort"), (1, "abort")]
    assert [d.finish_reason for d in core.core.abort("waiting")] == ["abort"]
    assert core.core.abort("running") == []
    assert core.core.abort("unknown") == []
    assert core.finish() == []


def test_an_id_is_free_again_once_its_request_is_over() -> None:
    core = Fixture()
    core.add("same", max_tokens=1)
    with pytest.raises(RequestError, match="already under way") as caught:
        core.add("same", max_tokens=1)
    assert caught.value.param == "request_id"
    core.finish()
    core.add("same", max_tokens=1)
    assert len(core.finish()) == 1


# --- text ---


def run_text(tokenizer: Tokenizer, **params: Any) -> tuple[list[Delta], str]:
    core = Fixture(tokenizer)
    core.add(prompt="The quick", **{"max_tokens": 30, "temperature": 1.0, "seed": 3, "ignore_eos": True, **params})
    deltas = core.finish()
    return deltas, "".join(delta.text for delta in deltas)


def test_text_is_that_of_the_tokens(byte_level: Tokenizer) -> None:
    deltas, text = run_text(byte_level)
    assert text == byte_level.decode(token_ids(deltas))
    assert text


def test_stop_string(byte_level: Tokenizer) -> None:
    _, whole = run_text(byte_level)
    stop = whole[8:11]
    deltas, text = run_text(byte_level, stop=stop)
    assert text == whole[: whole.index(stop)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    assert len(deltas) < 30
    _, text = run_text(byte_level, stop=stop, include_stop_str_in_output=True)
    assert text == whole[: whole.index(stop)] + stop


def test_a_stop_string_with_the_last_token_is_a_stop(byte_level: Tokenizer) -> None:
    deltas, whole = run_text(byte_level)
    stop = whole[8:11]
    needed = len(run_text(byte_level, stop=stop)[0])
    deltas, _ = run_text(byte_level, stop=stop, max_tokens=needed)
    assert deltas[-1].finish_reason == "stop"


def test_no_stop_string_below_min_tokens(byte_level: Tokenizer) -> None:
    deltas, whole = run_text(byte_level)
    stop = whole[2:4]
    deltas, text = run_text(byte_level, stop=stop, min_tokens=25)
    assert len(deltas) >= 25
    assert text.startswith(whole[:5])


def test_held_back_text_is_flushed_at_the_end(byte_level: Tokenizer) -> None:
    _, whole = run_text(byte_level)
    _, text = run_text(byte_level, stop=whole[-1] + "no such thing follows")
    assert text == whole


def test_a_stop_token_stays_out_of_the_text(byte_level: Tokenizer) -> None:
    deltas, _ = run_text(byte_level)
    tokens = token_ids(deltas)
    position = next(i for i, token in enumerate(tokens) if i > 3 and byte_level.token_text(token).isalpha())
    stop = tokens[position]
    before = tokens[: tokens.index(stop)]
    deltas, text = run_text(byte_level, stop_token_ids=(stop,))
    assert token_ids(deltas) == [*before, stop]
    assert text == byte_level.decode(before)
    _, text = run_text(byte_level, stop_token_ids=(stop,), include_stop_str_in_output=True)
    assert text == byte_level.decode([*before, stop])


def test_guided_output_follows_its_grammar_and_ends_with_it(byte_level: Tokenizer) -> None:
    for seed in range(10):
        deltas, text = run_text(
            byte_level, seed=seed, guided=GuidedDecoding(choice=("left", "right")), ignore_eos=False
        )
        assert text in ("left", "right")
        assert deltas[-1].finish_reason == "stop"


def test_guided_beside_unguided(byte_level: Tokenizer) -> None:
    alone, _ = run_text(byte_level)
    core = Fixture(byte_level)
    core.add("guided", "x", guided=GuidedDecoding(regex="[0-9]{12}"), max_tokens=30)
    core.add("free", "The quick", max_tokens=30, temperature=1.0, seed=3, ignore_eos=True)
    deltas = core.finish()
    assert token_ids([delta for delta in deltas if delta.request_id == "free"]) == token_ids(alone)
    guided = "".join(delta.text for delta in deltas if delta.request_id == "guided")
    assert guided.isdecimal()
    assert len(guided) == 12


# --- errors ---


class Faulty:
    """A guide and detokenizer that raises when it sees its n-th token."""

    stopped_by = None
    is_finished = False

    def __init__(self, at: int) -> None:
        self.left = at

    def append(self, token_ids: list[int]) -> str:
        self.left -= 1
        if self.left == 0:
            raise LookupError("no such token")
        return "x"

    def finish(self) -> str:
        return ""

    def accept(self, token_id: int) -> None:
        self.append([token_id])

    def fill_mask(self, row: npt.NDArray[np.uint32]) -> None:
        row[:] = 0xFFFFFFFF


@pytest.mark.parametrize("part", ["detokenizer", "guide"])
def test_a_failing_detokenizer_or_guide_ends_its_own_request_only(part: str) -> None:
    core = Fixture()
    core.add("good", max_tokens=8, ignore_eos=True)
    bad = core.intake.sequences("bad", {"prompt_token_ids": [7, 8]}, SamplingParams(n=2, max_tokens=8, ignore_eos=True))
    setattr(bad[0], part, Faulty(at=3))
    core.core.add(bad)
    deltas = core.finish()
    assert token_ids([delta for delta in deltas if delta.request_id == "good"]) == greedy([3, 4, 5], 8)
    ends = [delta for delta in deltas if delta.request_id == "bad" and delta.finish_reason]
    assert [(delta.index, delta.finish_reason) for delta in ends] == [(0, "error"), (1, "error")]
    assert type(ends[0].error) is FarrierError
    assert "LookupError: no such token" in str(ends[0].error)
    assert core.core.failure is None


def test_a_guide_that_allows_nothing_ends_its_own_request() -> None:
    class Closed(Faulty):
        def fill_mask(self, row: npt.NDArray[np.uint32]) -> None:
            row[:] = 0

    core = Fixture()
    (sequence,) = core.intake.sequences("r", {"prompt_token_ids": [7]}, SamplingParams(max_tokens=8, ignore_eos=True))
    sequence.guide = Closed(at=-1)
    core.core.add([sequence])
    (delta,) = core.finish()
    assert isinstance(delta.error, RequestError)
    assert "can go on with no token" in str(delta.error)


def test_logits_that_offer_no_token_end_their_own_request() -> None:
    class Sick(ReferenceEngine):
        def run(self, batch: Batch, token_ids: npt.NDArray[np.int32]) -> StepResult:
            result = super().run(batch, token_ids)
            result.token_ids[token_ids[batch.sample_rows] == 9] = -1
            return result

    core = Fixture(engine=Sick)
    core.add("good", max_tokens=4, ignore_eos=True, logit_bias={9: -100.0})
    core.add("bad", [8, 9], max_tokens=4)
    deltas = core.finish()
    assert len(token_ids([delta for delta in deltas if delta.request_id == "good"])) == 4
    (bad,) = (delta for delta in deltas if delta.request_id == "bad")
    assert isinstance(bad.error, EngineError)
    assert "No token could be sampled" in str(bad.error)
    assert core.core.failure is None


def test_a_failing_engine_ends_everything_and_takes_no_more() -> None:
    class Dying(ReferenceEngine):
        def step(self, batch: Batch) -> ReferenceHandle:
            if self.num_steps == 2:
                raise OSError("the cable is out")
            return super().step(batch)

    core = Fixture(engine=Dying)
    core.add("a", max_tokens=8, ignore_eos=True)
    core.add("b", n=2, max_tokens=8, ignore_eos=True)
    deltas = core.core.step() + core.core.step()
    assert all(delta.finish_reason is None for delta in deltas)
    core.add("c", max_tokens=8)
    ends = core.core.step()
    assert [(delta.request_id, delta.index) for delta in ends] == [("a", 0), ("b", 0), ("b", 1), ("c", 0)]
    for delta in ends:
        assert delta.finish_reason == "error"
        assert delta.error is core.core.failure
    assert isinstance(core.core.failure, EngineError)
    assert "The engine failed while running (OSError: the cable is out)" in str(core.core.failure)
    assert not core.core.has_work
    with pytest.raises(EngineError, match="the cable is out"):
        core.add("d")
    assert core.core.stats().num_running == 0
