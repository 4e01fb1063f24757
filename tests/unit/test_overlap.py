"""The overlapped loop: what runs ahead, what waits, and what becomes of a step that was enqueued in vain."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from farrier.runtime.core import CoreOptions, EngineCore
from farrier.runtime.intake import Intake
from farrier.runtime.outputs import Delta
from farrier.runtime.request import Sequence
from farrier.runtime.sampling_params import SamplingParams
from farrier.targets.engine import Batch, StepResult
from farrier.targets.errors import EngineError
from tests.reference_engine import ReferenceEngine, ReferenceHandle, logits_after, reference_config

NUM_BLOCKS = 40


class Device(ReferenceEngine):
    """Notes when a step is enqueued, with how many sequences, and when it ends. Fails in the step that it is told."""

    overlaps = True
    fails_at: int | None = None

    def __init__(self) -> None:
        super().__init__(reference_config(max_seq_len=100))
        self.allocate(NUM_BLOCKS)
        self.log: list[str] = []
        self.num_ended = 0

    def step(self, batch: Batch) -> ReferenceHandle:
        self.log.append(f"enqueue {batch.num_sequences}")
        return super().step(batch)

    def run(self, batch: Batch, token_ids: npt.NDArray[np.int32]) -> StepResult:
        self.log.append("end")
        self.num_ended += 1
        if self.num_ended == self.fails_at:
            raise OSError("the cable is out")
        return super().run(batch, token_ids)


class Open:
    """A guide that allows everything."""

    is_finished = False

    def fill_mask(self, row: npt.NDArray[np.uint32]) -> None:
        row[:] = 0xFFFFFFFF

    def accept(self, token_id: int) -> None: ...


class Fixture:
    def __init__(self) -> None:
        self.engine = Device()
        self.core = EngineCore(self.engine, CoreOptions(NUM_BLOCKS))
        self.intake = Intake(self.engine.config, None, NUM_BLOCKS)

    def add(self, name: str, prompt: list[int], *, guided: bool = False, **params: Any) -> list[Sequence]:
        asked = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, **params})
        sequences = self.intake.sequences(name, {"prompt_token_ids": prompt}, asked)
        for sequence in sequences if guided else ():
            sequence.guide = Open()
            sequence.update_mask(self.engine.config.spec.vocab_size)
        self.core.add(sequences)
        return sequences

    def step(self) -> list[tuple[str, list[int]]]:
        return [(delta.request_id, delta.token_ids) for delta in self.core.step()]

    def finish(self) -> list[Delta]:
        deltas = []
        while self.core.has_work:
            deltas += self.core.step()
        self.core.check_idle()
        return deltas

    @property
    def blocks_in_use(self) -> int:
        return NUM_BLOCKS - self.core.scheduler.pool.num_free


def greedy(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(logits_after(np.array(tokens, np.int32), 50))))
    return tokens[len(prompt) :]


def test_the_next_step_is_enqueued_before_the_one_under_way_ends() -> None:
    core = Fixture()
    core.add("r", [3, 4], max_tokens=3)
    expected = greedy([3, 4], 3)
    assert [core.step() for _ in range(4)] == [[], *([("r", [token])] for token in expected)]
    assert core.engine.log == ["enqueue 1", "enqueue 1", "end", "enqueue 1", "end", "end"]
    assert core.engine.num_references == 2
    assert not core.core.has_work, "the last token is not followed by a step, nor held back by one"
    core.core.check_idle()


def test_what_arrives_during_a_step_goes_into_the_next_schedule() -> None:
    core = Fixture()
    core.add("a", [3, 4], max_tokens=4)
    core.step()
    core.add("b", [5, 6], max_tokens=2)
    core.step()
    assert core.engine.log == ["enqueue 1", "enqueue 2", "end"]
    deltas = core.finish()
    assert [token for delta in deltas if delta.request_id == "b" for token in delta.token_ids] == greedy([5, 6], 2)


@pytest.mark.parametrize("way", [{"guided": True}, {"presence_penalty": 0.1}, {"repetition_penalty": 1.1}])
def test_whoever_must_know_its_last_token_waits_for_it(way: dict[str, Any]) -> None:
    core = Fixture()
    core.add("waits", [3, 4], max_tokens=3, **way)
    core.finish()
    assert core.engine.log == ["enqueue 1", "end"] * 3
    assert core.engine.num_references == 0


def test_one_that_waits_does_not_slow_the_others() -> None:
    core = Fixture()
    core.add("waits", [3, 4], max_tokens=3, guided=True)
    core.add("free", [5, 6], max_tokens=5)
    deltas = core.finish()
    assert core.engine.log == [
        *("enqueue 2", "enqueue 1", "end", "enqueue 2", "end", "enqueue 1", "end", "enqueue 2", "end", "end")
    ]
    assert [token for delta in deltas if delta.request_id == "free" for token in delta.token_ids] == greedy([5, 6], 5)
    assert core.engine.num_references == 4


def test_one_that_could_run_ahead_does_not_slow_many_that_wait() -> None:
    core = Fixture()
    for name in ("a", "b"):
        core.add(name, [3, 4], max_tokens=3, guided=True)
    core.add("free", [5, 6], max_tokens=3)
    core.finish()
    assert core.engine.log == ["enqueue 3", "end"] * 3


def test_a_step_enqueued_for_an_output_that_ended_is_thrown_away() -> None:
    core = Fixture()
    expected = greedy([3, 4, 5], 2)
    core.add("r", [3, 4, 5], max_tokens=9, stop_token_ids=(expected[1],))
    core.step()
    core.step()
    (end,) = core.core.step()
    assert (end.token_ids, end.finish_reason) == ([expected[1]], "stop")
    assert core.core.has_work, "the third step is under way"
    assert core.blocks_in_use == 2, "which writes a second block"
    # What comes now must not get those blocks: the engine checks it.
    core.add("next", [6, 7, 8], max_tokens=2)
    assert core.step() == []
    assert core.blocks_in_use == 1
    assert [token for delta in core.finish() for token in delta.token_ids] == greedy([6, 7, 8], 2)
    stats = core.core.stats()
    assert (stats.generation_tokens, stats.steps) == (4, 5)


def test_an_abort_takes_effect_before_the_next_schedule() -> None:
    core = Fixture()
    core.add("kept", [3, 4], max_tokens=6)
    core.add("gone", [5, 6], n=2, max_tokens=6)
    core.step()
    core.step()
    assert [delta.finish_reason for delta in core.core.abort("gone")] == ["abort", "abort"]
    core.add("gone", [7, 8], max_tokens=2)
    deltas = core.finish()
    assert core.engine.log[3] == "enqueue 2", "the one kept, and the new one of the same name"
    assert [token for delta in deltas if delta.request_id == "gone" for token in delta.token_ids] == greedy([7, 8], 2)
    assert sum(len(delta.token_ids) for delta in deltas if delta.request_id == "kept") == 5


def test_abort_all_waits_for_the_step_under_way() -> None:
    core = Fixture()
    core.add("r", [3, 4], max_tokens=6)
    core.step()
    core.step()
    assert [delta.finish_reason for delta in core.core.abort_all()] == ["abort"]
    assert core.engine.num_ended == core.engine.num_steps == 2
    assert not core.core.has_work
    core.core.check_idle()


def test_a_prompt_in_chunks_runs_ahead_of_itself() -> None:
    core = Fixture()
    prompt = [3 + index % 40 for index in range(70)]  # a step holds 64 tokens
    core.add("r", prompt, max_tokens=2)
    deltas = core.finish()
    assert core.engine.log == ["enqueue 1", "enqueue 1", "end", "enqueue 1", "end", "end"]
    assert [token for delta in deltas for token in delta.token_ids] == greedy(prompt, 2)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_step_that_fails_with_the_next_enqueued_ends_everything_once(fails_at: int) -> None:
    core = Fixture()
    core.engine.fails_at = fails_at
    core.add("a", [3, 4], max_tokens=6)
    core.add("b", [5, 6], n=2, max_tokens=6)
    core.step()
    core.add("c", [7, 8], max_tokens=6)
    deltas = core.finish()
    ends = [delta for delta in deltas if delta.finish_reason is not None]
    assert [(end.request_id, end.index) for end in ends] == [("a", 0), ("b", 0), ("b", 1), ("c", 0)]
    assert {end.finish_reason for end in ends} == {"error"}
    assert isinstance(core.core.failure, EngineError)
    assert core.engine.num_steps == fails_at + 1
    assert core.core.abort_all() == []
