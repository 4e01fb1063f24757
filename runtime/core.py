"""The engine core: schedule, step, append, finish. One thread calls it; it knows neither clock nor network.

Two loops do the same with the same parts, and every output is the same. The plain one waits for a step before it
schedules the next. The overlapped one is for engines whose `step` returns while a device computes: it schedules and
enqueues step n + 1 first, and only then waits for step n, whose tokens it appends while n + 1 runs.
"""

from dataclasses import dataclass

from farrier.runtime.batch import BatchPacker, token_logprobs
from farrier.runtime.block_pool import BlockPool
from farrier.runtime.outputs import CoreStats, Delta, FinishReason
from farrier.runtime.request import Sequence
from farrier.runtime.scheduler import CapacityPolicy, Schedule, Scheduler
from farrier.targets.engine import Engine, StepHandle, StepResult
from farrier.targets.errors import EngineError, FarrierError, RequestError
from farrier.targets.sampling import NO_TOKEN


@dataclass(frozen=True)
class CoreOptions:
    """num_blocks: how many KV blocks the engine was told to allocate."""

    num_blocks: int
    capacity_policy: CapacityPolicy = "guaranteed_no_evict"
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class _StepUnderWay:
    plan: Schedule
    sampled: list[Sequence]
    handle: StepHandle


class EngineCore:
    """Runs sequences on an engine whose KV pool is allocated. `failure` is set once the engine has failed: every
    request has ended by then, and no other is taken."""

    def __init__(self, engine: Engine, options: CoreOptions) -> None:
        self.engine = engine
        config = engine.config
        pool = BlockPool(options.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            pool, config.ceilings, options.capacity_policy, enable_prefix_caching=options.enable_prefix_caching
        )
        self.failure: EngineError | None = None
        self._packer = BatchPacker(config.spec.vocab_size, config.block_size)
        self._vocab_size = config.spec.vocab_size
        self._requests: dict[str, list[Sequence]] = {}
        self._iterate = self._overlapped if engine.overlaps else self._plain
        self._under_way: _StepUnderWay | None = None
        self._num_steps = 0
        self._generation_tokens = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._under_way is not None

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    def add(self, sequences: list[Sequence]) -> None:
        """Enqueues the outputs of one request. RequestError if its id is taken, EngineError after a failure."""
        self.check_alive()
        request_id = sequences[0].request_id
        if request_id in self._requests:
            raise RequestError(f"A request {request_id!r} is already under way; ids must differ.", param="request_id")
        self.scheduler.add(sequences)
        self._requests[request_id] = sequences

    def check_alive(self) -> None:
        """Raises EngineError if the engine has failed."""
        if self.failure is not None:
            # A new one each time: raising the same one again and again would make its traceback grow.
            raise EngineError(str(self.failure), code=self.failure.code) from self.failure

    def abort(self, request_id: str) -> list[Delta]:
        """Ends what is left of a request, in whatever state it is. Nothing happens if it is over or unknown."""
        return self._end(request_id, "abort", None)

    def abort_all(self) -> list[Delta]:
        """Ends every request, and waits for the step under way: then there is no work left."""
        deltas = [delta for request_id in list(self._requests) for delta in self.abort(request_id)]
        return deltas + self.step() if self.has_work else deltas

    def step(self) -> list[Delta]:
        """Runs one iteration; returns what the step that it ended, if any, added to the outputs.

        A failing engine ends every request with an error; it never raises.
        """
        try:
            return self._iterate()
        except Exception as error:
            return self.fail(error)

    def _plain(self) -> list[Delta]:
        return self._complete(self._enqueue())

    def _overlapped(self) -> list[Delta]:
        previous = self._under_way
        self._under_way = self._enqueue()
        return self._complete(previous)

    def _enqueue(self) -> _StepUnderWay | None:
        """Enqueues the next step, if there is one to be had now."""
        plan = self.scheduler.schedule()
        if not plan.sequences:
            return None
        batch, sampled = self._packer.pack(plan)
        handle = self.engine.step(batch)
        for row, sequence in enumerate(sampled):
            sequence.expect_token(row)
        return _StepUnderWay(plan, sampled, handle)

    def _complete(self, step: _StepUnderWay | None) -> list[Delta]:
        """Waits for a step and appends its tokens."""
        if step is None:
            return []
        result = step.handle.wait()
        self.scheduler.commit(step.plan)
        self._num_steps += 1
        return self._unpack(step.sampled, result)

    def fail(self, error: Exception) -> list[Delta]:
        """Declares the engine dead because of `error` and ends every request."""
        if not isinstance(error, EngineError):
            cause = error
            reason = f"{type(cause).__name__}: {cause}"
            error = EngineError(f"The engine failed while running ({reason}); start it again.", code="engine_failed")
            error.__cause__ = cause
        self.failure = error
        unfinished = [s for sequences in self._requests.values() for s in sequences if not s.is_finished]
        self._requests.clear()
        self.scheduler.clear()
        self._under_way = None
        return last_deltas(unfinished, "error", error)

    def check_idle(self) -> None:
        """Raises RuntimeError if KV blocks leaked; to be called when there is no work."""
        if self.failure is None:
            self.scheduler.check_idle()

    def stats(self) -> CoreStats:
        """May be called from any thread: it only reads numbers."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        return CoreStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_kv_blocks=pool.num_blocks,
            kv_cache_usage=1 - pool.num_free / pool.num_blocks,
            steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
        )

    def _unpack(self, sampled: list[Sequence], result: StepResult) -> list[Delta]:
        deltas: list[Delta] = []
        for row, (sequence, token_id) in enumerate(zip(sampled, result.token_ids.tolist(), strict=True)):
            # It ended before this step did, or with its request by an error of another output earlier in this loop.
            if sequence.is_finished:
                continue
            self._generation_tokens += 1
            try:
                delta = self._advance(sequence, token_id)
            except Exception as error:
                deltas += self._end(sequence.request_id, "error", _as_farrier_error(error))
                continue
            if row in result.logprobs:
                delta.logprobs = [token_logprobs(token_id, result.logprobs[row])]
            deltas.append(delta)
        return deltas

    def _advance(self, sequence: Sequence, token_id: int) -> Delta:
        """Takes in a sampled token. Whatever the guide or the detokenizer raises is the caller's to handle."""
        if token_id == NO_TOKEN:
            raise EngineError("No token could be sampled: the logits are not finite, or none is allowed.")
        sequence.set_token(token_id)
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        text = ""
        is_stop_token = token_id in sequence.stop_ids
        if is_stop_token:
            reason = "stop"
            stop_reason = token_id if token_id in sequence.params.stop_token_ids else None
        elif sequence.guide is not None:
            sequence.guide.accept(token_id)
            reason = "stop" if sequence.guide.is_finished else None
        detokenizer = sequence.detokenizer
        if detokenizer is not None and (not is_stop_token or sequence.params.include_stop_str_in_output):
            text = detokenizer.append([token_id])
            if detokenizer.stopped_by is not None:
                reason, stop_reason = "stop", detokenizer.stopped_by
        if reason is None and sequence.num_computed + 1 >= sequence.max_len:
            reason = "length"
        if reason is None:
            sequence.update_mask(self._vocab_size)
        else:
            if detokenizer is not None and detokenizer.stopped_by is None:
                text += detokenizer.finish()
            self._finish(sequence)
        return _delta(sequence, text, [token_id], reason, stop_reason)

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if all(other.is_finished for other in self._requests[sequence.request_id]):
            del self._requests[sequence.request_id]

    def _end(self, request_id: str, reason: FinishReason, error: FarrierError | None) -> list[Delta]:
        unfinished = [sequence for sequence in self._requests.pop(request_id, ()) if not sequence.is_finished]
        for sequence in unfinished:
            self.scheduler.remove(sequence)
        return last_deltas(unfinished, reason, error)


def last_deltas(sequences: list[Sequence], reason: FinishReason, error: FarrierError | None) -> list[Delta]:
    """What tells that these sequences have ended without another token."""
    return [_delta(sequence, "", [], reason, None, error) for sequence in sequences]


def _delta(
    sequence: Sequence,
    text: str,
    token_ids: list[int],
    reason: FinishReason | None,
    stop_reason: int | str | None,
    error: FarrierError | None = None,
) -> Delta:
    return Delta(
        sequence.request_id,
        sequence.index,
        text,
        token_ids,
        None if sequence.params.logprobs is None else [],
        reason,
        stop_reason,
        sequence.num_prompt_tokens,
        sequence.num_cached_tokens,
        error,
    )


def _as_farrier_error(error: Exception) -> FarrierError:
    if isinstance(error, FarrierError):
        return error
    wrapped = FarrierError(f"The request failed inside the runtime ({type(error).__name__}: {error}).")
    wrapped.__cause__ = error
    return wrapped
