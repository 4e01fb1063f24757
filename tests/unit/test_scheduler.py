"""Who goes first, who waits, who gives way."""

import pytest

from farrier.runtime.block_pool import BlockPool
from farrier.runtime.request import Sequence
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.scheduler import CapacityPolicy, Schedule, Scheduler
from farrier.targets.engine import Ceilings


def make(
    num_blocks: int = 100,
    block_size: int = 4,
    policy: CapacityPolicy = "guaranteed_no_evict",
    *,
    max_batch_size: int = 8,
    max_num_tokens: int = 16,
    enable_prefix_caching: bool = True,
) -> Scheduler:
    ceilings = Ceilings(max_batch_size, max_num_tokens, max_seq_len=1000)
    return Scheduler(BlockPool(num_blocks, block_size), ceilings, policy, enable_prefix_caching=enable_prefix_caching)


def outputs(
    name: str, prompt: int | list[int], max_tokens: int = 8, *, n: int = 1, priority: int = 0
) -> list[Sequence]:
    ids = [sum(name.encode()), *range(1, prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(n=n, max_tokens=max_tokens, priority=priority)
    return [Sequence(name, index, ids, params, max_len=len(ids) + max_tokens, seed=0) for index in range(n)]


def add(scheduler: Scheduler, name: str, prompt: int | list[int], max_tokens: int = 8, **more: int) -> list[Sequence]:
    made = outputs(name, prompt, max_tokens, **more)
    scheduler.add(made)
    return made


def names(plan: Schedule) -> list[tuple[str, int]]:
    return [
        (sequence.request_id + ("" if sequence.index == 0 else f".{sequence.index}"), count)
        for sequence, count in zip(plan.sequences, plan.num_tokens, strict=True)
    ]


def step(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Runs one step; everything that catches up gets token 1, and ends at its max_len."""
    plan = scheduler.schedule()
    scheduler.commit(plan)
    for sequence in plan.sequences:
        if sequence.num_computed == len(sequence.tokens):
            sequence.tokens.append(1)
            if len(sequence.tokens) == sequence.max_len:
                scheduler.remove(sequence)
    return names(plan)


def test_decodes_go_first_then_prompts_under_way_then_new_requests() -> None:
    scheduler = make(max_num_tokens=8)
    add(scheduler, "long", 14)
    assert step(scheduler) == [("long", 8)]
    add(scheduler, "short", 3)
    assert step(scheduler) == [("long", 6), ("short", 2)]
    add(scheduler, "new", 20)
    assert step(scheduler) == [("long", 1), ("short", 1), ("new", 6)]
    add(scheduler, "newer", 5)
    assert step(scheduler) == [("long", 1), ("short", 1), ("new", 6)]
    assert step(scheduler) == [("long", 1), ("short", 1), ("new", 6)]
    assert step(scheduler) == [("long", 1), ("short", 1), ("new", 2), ("newer", 4)]
    assert step(scheduler) == [("long", 1), ("short", 1), ("new", 1), ("newer", 1)]


def test_a_long_prompt_does_not_stop_running_decodes() -> None:
    scheduler = make(max_num_tokens=8)
    add(scheduler, "chat", 3, max_tokens=100)
    step(scheduler)
    add(scheduler, "book", 60)
    for _ in range(8):
        assert step(scheduler)[0] == ("chat", 1)


def test_priority_first_then_arrival() -> None:
    scheduler = make(max_batch_size=1)
    for name, priority in (("b", 0), ("c", 0), ("d", 5), ("a", -1)):
        add(scheduler, name, 2, max_tokens=1, priority=priority)
    assert [step(scheduler) for _ in range(5)] == [[("a", 2)], [("b", 2)], [("c", 2)], [("d", 2)], []]
    scheduler.check_idle()


def test_nobody_overtakes_the_first_in_the_queue() -> None:
    scheduler = make(num_blocks=10)
    add(scheduler, "running", 16, max_tokens=8)
    step(scheduler)
    add(scheduler, "large", 24, max_tokens=8)
    add(scheduler, "small", 2, max_tokens=2)
    for _ in range(7):
        assert step(scheduler) == [("running", 1)]
    assert step(scheduler) == [("large", 16)]


def test_the_next_in_the_queue_goes_when_the_first_leaves() -> None:
    scheduler = make(num_blocks=10)
    add(scheduler, "running", 16, max_tokens=8)
    step(scheduler)
    (large,) = add(scheduler, "large", 24, max_tokens=8)
    add(scheduler, "small", 2, max_tokens=2)
    assert step(scheduler) == [("running", 1)]
    scheduler.remove(large)
    assert step(scheduler) == [("running", 1), ("small", 2)]


def test_batch_size_is_a_ceiling() -> None:
    scheduler = make(max_batch_size=2)
    for name in "abc":
        add(scheduler, name, 2, max_tokens=2)
    assert step(scheduler) == [("a", 2), ("b", 2)]
    assert step(scheduler) == [("a", 1), ("b", 1)]
    assert step(scheduler) == [("c", 2)]


def test_more_decodes_than_tokens_in_a_step() -> None:
    scheduler = make(max_num_tokens=2)
    for name in "abc":
        add(scheduler, name, 1, max_tokens=2)
    assert [step(scheduler) for _ in range(4)] == [[("a", 1), ("b", 1)], [("a", 1), ("b", 1)], [("c", 1)], [("c", 1)]]


def test_guaranteed_admits_only_what_can_finish() -> None:
    # Each sequence computes at most 4 + 9 - 1 tokens: 3 blocks.
    scheduler = make(num_blocks=8)
    for name in "abc":
        add(scheduler, name, 4, max_tokens=9)
    assert step(scheduler) == [("a", 4), ("b", 4)]
    assert scheduler.pool.num_free == 6
    for _ in range(8):
        assert step(scheduler) == [("a", 1), ("b", 1)]
    assert step(scheduler) == [("c", 4)]
    assert scheduler.num_preemptions == 0


def test_the_last_token_needs_no_room() -> None:
    scheduler = make(num_blocks=2)
    add(scheduler, "exact", 4, max_tokens=5)
    for _ in range(5):
        assert step(scheduler)
    scheduler.check_idle()
    with pytest.raises(ValueError, match="10 tokens never fit into 2 KV blocks"):
        scheduler.add(outputs("too large", 4, max_tokens=6))


def test_guaranteed_counts_a_shared_prefix_once() -> None:
    prompt = list(range(16))
    scheduler = make(num_blocks=9)
    add(scheduler, "first", [*prompt, 1], max_tokens=4)  # 5 blocks
    step(scheduler)
    add(scheduler, "second", [*prompt, 2], max_tokens=4)  # 4 of them, and one of its own
    assert step(scheduler) == [("first", 1), ("second", 1)]
    assert scheduler.pool.num_free == 9 - 6
    assert scheduler.prefix_hits == 16
    add(scheduler, "third", [*prompt, 3], max_tokens=8)  # 4 of them, and two of its own
    assert step(scheduler) == [("first", 1), ("second", 1), ("third", 1)]
    add(scheduler, "fourth", [*prompt, 4], max_tokens=8)
    assert ("fourth", 1) not in step(scheduler)


def test_an_idle_prefix_is_not_counted_as_free_and_shared_at_once() -> None:
    prompt = list(range(16))
    scheduler = make(num_blocks=5)
    add(scheduler, "first", [*prompt, 1], max_tokens=1)
    assert step(scheduler) == [("first", 16)]
    assert step(scheduler) == [("first", 1)]
    assert scheduler.pool.num_free == 5
    add(scheduler, "other", [99], max_tokens=4)  # takes the one block that holds no prefix
    assert step(scheduler) == [("other", 1)]
    add(scheduler, "second", [*prompt, 2], max_tokens=4)  # finds 4, and needs one more: there is none
    assert step(scheduler) == [("other", 1)]
    assert step(scheduler) == [("other", 1)]
    assert step(scheduler) == [("other", 1)]
    assert step(scheduler) == [("second", 1)]


def test_max_utilization_preempts_the_last_and_computes_it_again() -> None:
    scheduler = make(num_blocks=4, policy="max_utilization")
    first, second = add(scheduler, "a", 7, max_tokens=6), add(scheduler, "b", 6, max_tokens=6)
    assert step(scheduler) == [("a", 7), ("b", 6)]
    assert step(scheduler) == [("a", 1), ("b", 1)]
    assert step(scheduler) == [("a", 1)]
    assert scheduler.num_preemptions == 1
    assert scheduler.waiting == second
    assert len(second[0].tokens) == 8, "its output so far is kept"
    assert len(first[0].block_ids) == 3
    for _ in range(3):
        assert step(scheduler) == [("a", 1)]
    # Its first block is still there: four tokens and the next one's block are not computed again.
    assert step(scheduler) == [("b", 4)]


def test_what_was_preempted_does_not_come_back_in_the_same_step() -> None:
    scheduler = make(num_blocks=5, block_size=1, policy="max_utilization")
    add(scheduler, "a", 1, max_tokens=5)
    add(scheduler, "b", 1, max_tokens=5)
    add(scheduler, "c", 1, max_tokens=5)
    assert step(scheduler) == [("a", 1), ("b", 1), ("c", 1)]
    assert step(scheduler) == [("a", 1), ("b", 1)]
    assert scheduler.num_preemptions == 1


def test_preemption_takes_the_lowest_priority_first() -> None:
    scheduler = make(num_blocks=4, block_size=2, policy="max_utilization")
    low = add(scheduler, "low", 2, max_tokens=4, priority=1)
    step(scheduler)
    add(scheduler, "high", 4, max_tokens=4, priority=0)
    assert step(scheduler) == [("low", 1), ("high", 4)]
    assert step(scheduler) == [("high", 1)]
    assert scheduler.waiting == low


def test_other_outputs_start_when_the_first_has_computed_the_prompt() -> None:
    scheduler = make(max_num_tokens=6)
    add(scheduler, "r", 10, n=3)
    assert scheduler.num_waiting == 3
    assert step(scheduler) == [("r", 6)]
    assert scheduler.num_waiting == 2
    assert step(scheduler) == [("r", 4)]
    # They share two blocks, and compute the rest of the prompt.
    assert step(scheduler) == [("r", 1), ("r.1", 2), ("r.2", 2)]
    assert scheduler.num_waiting == 0


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_prefix_caching_off_shares_within_a_request_only(enable_prefix_caching: bool) -> None:
    prompt = list(range(8))
    scheduler = make(enable_prefix_caching=enable_prefix_caching)
    add(scheduler, "a", prompt, n=2)
    assert step(scheduler) == [("a", 8)]
    assert step(scheduler) == [("a", 1), ("a.1", 4)]
    add(scheduler, "b", prompt)
    assert step(scheduler)[2:] == [("b", 4 if enable_prefix_caching else 8)]


def test_the_prefix_cache_needs_computed_blocks() -> None:
    prompt = list(range(12))
    scheduler = make(max_num_tokens=8)
    add(scheduler, "a", prompt)
    step(scheduler)
    add(scheduler, "b", prompt)
    assert step(scheduler) == [("a", 4), ("b", 4)]
    assert scheduler.prefix_hits == 8, "two of the three blocks were computed when b started"


def test_remove_in_every_state() -> None:
    scheduler = make(num_blocks=6, max_batch_size=2, max_num_tokens=4)
    (running,) = add(scheduler, "running", 2)
    many = add(scheduler, "many", 8, max_tokens=1, n=3)
    (waiting,) = add(scheduler, "waiting", 2)
    assert step(scheduler) == [("running", 2), ("many", 2)]
    assert scheduler.num_waiting == 3
    for sequence in (waiting, *many, running):
        scheduler.remove(sequence)
        assert sequence.is_finished
    assert not scheduler.has_work
    assert scheduler.schedule().sequences == []
    scheduler.check_idle()
    with pytest.raises(ValueError, match="'running' is not where it should be"):
        scheduler.remove(running)


def test_a_preempted_sequence_can_be_removed() -> None:
    scheduler = make(num_blocks=4, policy="max_utilization")
    add(scheduler, "a", 7, max_tokens=6)
    (preempted,) = add(scheduler, "b", 6, max_tokens=6)
    for _ in range(3):
        step(scheduler)
    assert scheduler.waiting == [preempted]
    scheduler.remove(preempted)
    while scheduler.has_work:
        step(scheduler)
    scheduler.check_idle()


def test_check_idle_reports_what_was_lost() -> None:
    scheduler = make()
    add(scheduler, "a", 2)
    step(scheduler)
    scheduler.running.clear()
    with pytest.raises(RuntimeError, match="are referenced although nothing runs"):
        scheduler.check_idle()


# --- a step scheduled while the one before is under way ---


def schedule(scheduler: Scheduler) -> Schedule:
    """A step whose samples stay unknown."""
    plan = scheduler.schedule()
    for row, sequence in enumerate(plan.sequences):
        if sequence.num_scheduled == len(sequence.tokens):
            sequence.expect_token(row)
    return plan


def end(scheduler: Scheduler, plan: Schedule) -> None:
    """Ends a step; every sample is token 1."""
    scheduler.commit(plan)
    for sequence in plan.sequences:
        if not sequence.is_finished and sequence.tokens[sequence.num_computed] < 0:
            sequence.set_token(1)


def test_nobody_is_scheduled_beyond_its_last_token() -> None:
    scheduler = make()
    add(scheduler, "a", 3, max_tokens=2)
    add(scheduler, "b", 3, max_tokens=3)
    plans = [schedule(scheduler)]
    for expected in ([("a", 1), ("b", 1)], [("b", 1)], []):
        plans.append(schedule(scheduler))
        assert names(plans[-1]) == expected
        end(scheduler, plans.pop(0))
    assert [len(sequence.tokens) for sequence in scheduler.running] == [5, 6]


def test_a_block_is_shared_only_once_the_step_that_fills_it_is_over() -> None:
    scheduler = make()
    add(scheduler, "a", prompt := list(range(8)))
    first = schedule(scheduler)
    add(scheduler, "b", [*prompt, 9])
    second = schedule(scheduler)
    assert names(second) == [("a", 1), ("b", 9)]
    end(scheduler, first)
    add(scheduler, "c", [*prompt, 9])
    assert names(schedule(scheduler)) == [("a", 1), ("b", 1), ("c", 1)]


def test_a_block_is_found_by_the_tokens_that_came_not_by_those_unknown() -> None:
    scheduler = make()
    add(scheduler, "a", [5, 6, 7])
    plans = [schedule(scheduler) for _ in range(2)]
    assert plans[1].sequences[0].tokens.tolist() == [5, 6, 7, -1, -1]
    for plan in plans:
        end(scheduler, plan)
    add(scheduler, "b", [5, 6, 7, 1, 9])
    assert names(scheduler.schedule()) == [("a", 1), ("b", 1)]


def test_blocks_of_whoever_leaves_during_a_step_are_free_when_it_is_over() -> None:
    scheduler = make(num_blocks=3, max_num_tokens=8)
    (gone,) = add(scheduler, "gone", 8, max_tokens=4)
    first = schedule(scheduler)
    second = schedule(scheduler)
    add(scheduler, "next", 12, max_tokens=1)
    scheduler.remove(gone)
    assert scheduler.pool.num_free == 0
    assert schedule(scheduler).sequences == []
    scheduler.commit(first)
    assert scheduler.pool.num_free == 0, "the second step still writes"
    scheduler.commit(second)
    assert scheduler.pool.num_free == 3
    assert names(schedule(scheduler)) == [("next", 8)]


def test_nobody_gives_way_during_a_step() -> None:
    scheduler = make(num_blocks=4, policy="max_utilization")
    add(scheduler, "a", 7, max_tokens=6)
    (last,) = add(scheduler, "b", 5, max_tokens=6)
    plans = [schedule(scheduler) for _ in range(2)]
    assert names(plans[1]) == [("a", 1), ("b", 1)]
    for plan in plans:
        # "a" needs a third block, but "b" is being computed: even "b", which has room, waits until that is over.
        assert schedule(scheduler).sequences == []
        assert scheduler.num_preemptions == 0
        end(scheduler, plan)
    assert names(schedule(scheduler)) == [("a", 1)]
    assert scheduler.waiting == [last]
    assert last.tokens.tolist()[-2:] == [1, 1]


def test_other_outputs_start_when_the_step_with_the_end_of_the_prompt_is_over() -> None:
    scheduler = make()
    add(scheduler, "r", 10, n=3)
    plan = schedule(scheduler)
    assert names(schedule(scheduler)) == [("r", 1)]
    end(scheduler, plan)
    assert names(schedule(scheduler)) == [("r", 1), ("r.1", 2), ("r.2", 2)]
