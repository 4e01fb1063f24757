"""Who runs in the next step, and how many of its tokens. Pure: no clock, no I/O, no threads."""

from bisect import bisect_left, insort
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from farrier.runtime.block_pool import ROOT, BlockPool
from farrier.runtime.request import Sequence
from farrier.targets.engine import Ceilings

CapacityPolicy = Literal["guaranteed_no_evict", "max_utilization"]

_by_order = attrgetter("order")


@dataclass(slots=True)
class Schedule:
    """One step: each sequence computes its next `num_tokens`. It is sampled if that reaches its last token."""

    sequences: list[Sequence]
    num_tokens: list[int]

    def add(self, sequence: Sequence, num_tokens: int) -> None:
        self.sequences.append(sequence)
        self.num_tokens.append(num_tokens)


class Scheduler:
    """In-flight batching with a token budget: decodes first, then prompts under way, then new requests.

    `schedule` says what to compute, `commit` that it was computed, `remove` that a sequence is over. Whoever
    cannot go first by (priority, arrival, index) waits; nobody overtakes.

    One step may be scheduled while the one before is under way, its samples unknown. Blocks of a step under way are
    nobody else's until it is committed, and only then are they shared.

    guaranteed_no_evict admits a sequence only if the blocks that everything running may still need are there.
    max_utilization admits what fits now; when blocks run out, the last in order gives up its own and recomputes.
    """

    def __init__(
        self, pool: BlockPool, ceilings: Ceilings, policy: CapacityPolicy, *, enable_prefix_caching: bool = True
    ) -> None:
        self.pool = pool
        self.ceilings = ceilings
        self.guaranteed = policy == "guaranteed_no_evict"
        self.enable_prefix_caching = enable_prefix_caching
        # Both sorted by order.
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_parked = 0
        """Followers whose leader has not computed the prompt yet."""
        self._num_arrivals = 0
        self._promised = 0
        """Blocks that running sequences may still need, when that is guaranteed."""
        self._is_full = False
        """The first in the queue did not fit, and neither the queue nor what is free has changed since."""
        self._num_under_way = 0
        """Sequences in steps that are not committed."""
        self.num_preemptions = 0
        self.prompt_tokens = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self.num_parked

    def add(self, sequences: list[Sequence]) -> None:
        """Enqueues the outputs of one request; all but the first wait until that one has computed the prompt.

        ValueError if one could never run, whatever else does.
        """
        leader, *followers = sequences
        if self._blocks_for(leader.max_len - 1) > self.pool.num_blocks:
            raise ValueError(f"{leader.max_len} tokens never fit into {self.pool.num_blocks} KV blocks.")
        self._num_arrivals += 1
        # Under a root of its own, a request finds only what its own outputs published.
        root = ROOT if self.enable_prefix_caching else self.pool.new_root()
        for sequence in sequences:
            sequence.order = (sequence.params.priority, self._num_arrivals, sequence.index)
            sequence.root = root
        leader.followers = followers
        self.num_parked += len(followers)
        self._enqueue(leader)

    def schedule(self) -> Schedule:
        """The next step; empty only when there is no work, or the step under way has to end first."""
        plan = Schedule([], [])
        budget = self.ceilings.max_num_tokens
        prompts = []
        num_held = 0
        position = 0
        # Preemption shortens `running` from its end, never before `position`.
        while position < len(self.running) and budget:
            sequence = self.running[position]
            position += 1
            length = len(sequence.tokens)
            if length - sequence.num_scheduled > 1:
                prompts.append(sequence)
            elif length == sequence.max_len:  # the step under way samples its last token
                continue
            elif sequence.must_know_last_token:
                num_held += 1
            elif length <= len(sequence.block_ids) * self.pool.block_size or self._has_room(sequence):
                plan.add(sequence, 1)
                budget -= 1
            elif self._num_under_way:
                return Schedule([], [])
        for sequence in prompts:
            budget -= self._compute(sequence, budget, plan)
        while budget and self.waiting and self._admit(self.waiting[0]):
            budget -= self._compute(self.waiting.pop(0), budget, plan)
        # Who is held misses this step, which the others need not feel. But where most are held they would run in
        # every second step only, so there the step under way ends first and everybody goes together.
        if num_held > len(plan.sequences):
            return Schedule([], [])
        for sequence, count in zip(plan.sequences, plan.num_tokens, strict=True):
            sequence.num_scheduled += count
        self._num_under_way += len(plan.sequences)
        return plan

    def commit(self, plan: Schedule) -> None:
        """The step ran: the KV of its tokens exists, and whole blocks of it can be shared. Steps end in the order in
        which they were scheduled."""
        size = self.pool.block_size
        self._num_under_way -= len(plan.sequences)
        for sequence, count in zip(plan.sequences, plan.num_tokens, strict=True):
            sequence.num_computed += count
            if sequence.is_finished:  # removed while the step ran
                self._release_blocks(sequence)
                continue
            for index in range(sequence.num_published, sequence.num_computed // size):
                tokens = sequence.tokens[index * size : (index + 1) * size]
                sequence.prefix_id = self.pool.publish(sequence.prefix_id, tokens, sequence.block_ids[index])
                sequence.num_published += 1
            if sequence.followers and sequence.num_computed >= sequence.num_prompt_tokens:
                self._release_followers(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence is over, in whatever state it is. A request's first output goes before its others."""
        sequence.is_finished = True
        if sequence.is_running:
            _take(self.running, sequence)
            self._give_up_blocks(sequence)
        else:
            _take(self.waiting, sequence)
            self._is_full = False
        self._release_followers(sequence)

    def clear(self) -> None:
        """Forgets every sequence without giving back its blocks: for an engine that is dead."""
        self.running.clear()
        self.waiting.clear()
        self.num_parked = 0

    def _compute(self, sequence: Sequence, budget: int, plan: Schedule) -> int:
        count = min(budget, len(sequence.tokens) - sequence.num_scheduled)
        if count:
            plan.add(sequence, count)
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence blocks for all its tokens, as far as possible those that hold them already."""
        if self._is_full or len(self.running) == self.ceilings.max_batch_size:
            return False
        tokens = len(sequence.tokens)
        shared, prefix_id = self.pool.lookup(sequence.root, sequence.tokens)
        own = self._blocks_for(tokens) - len(shared)
        later = self._blocks_for(sequence.max_len - 1) - self._blocks_for(tokens) if self.guaranteed else 0
        # Sharing a block takes it out of the free ones only if nobody else holds it.
        if own + later > self.pool.num_free - self._promised - self.pool.count_idle(shared):
            self._is_full = True
            return False
        self.pool.share(shared)
        sequence.block_ids.extend(shared)
        sequence.block_ids.extend(self.pool.allocate(own))
        self._promised += later
        sequence.num_published, sequence.prefix_id = len(shared), prefix_id
        sequence.num_scheduled = sequence.num_computed = len(shared) * self.pool.block_size
        sequence.is_running = True
        insort(self.running, sequence, key=_by_order)
        if not sequence.was_started:
            sequence.was_started = True
            sequence.num_cached_tokens = sequence.num_computed
            self.prompt_tokens += tokens
            self.prefix_queries += tokens
            self.prefix_hits += sequence.num_computed
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        """Gets the sequence another block. False if it had to give way itself, or a step is under way: that one's
        blocks are not to be had, so it must be over before anybody gives way."""
        while not self.pool.num_free:
            if self._num_under_way:
                return False
            last = self.running.pop()
            self._give_up_blocks(last)
            self._enqueue(last)
            self.num_preemptions += 1
            if last is sequence:
                return False
        sequence.block_ids.extend(self.pool.allocate(1))
        if self.guaranteed:
            self._promised -= 1
        return True

    def _give_up_blocks(self, sequence: Sequence) -> None:
        if self.guaranteed:
            self._promised -= self._blocks_for(sequence.max_len - 1) - len(sequence.block_ids)
        sequence.is_running = False
        self._release_blocks(sequence)

    def _release_blocks(self, sequence: Sequence) -> None:
        """Once no step under way uses them; `commit` comes back to it."""
        if not sequence.is_under_way:
            self.pool.release(sequence.block_ids)
            del sequence.block_ids[:]
            self._is_full = False

    def _release_followers(self, leader: Sequence) -> None:
        for follower in leader.followers:
            self._enqueue(follower)
        self.num_parked -= len(leader.followers)
        leader.followers = []

    def _enqueue(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_by_order)
        self._is_full = False

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.pool.block_size)

    def check_idle(self) -> None:
        """Raises RuntimeError if blocks leaked although nothing runs or waits."""
        self.pool.check()
        if self._promised or self.num_parked:
            raise RuntimeError(f"{self._promised} KV blocks are promised to nobody, {self.num_parked} outputs parked.")


def _take(sequences: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(sequences, sequence.order, key=_by_order)
    if index == len(sequences) or sequences[index] is not sequence:
        raise ValueError(f"Output {sequence.index} of request {sequence.request_id!r} is not where it should be.")
    del sequences[index]
