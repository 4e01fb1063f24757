"""LLM and AsyncLLM on the reference engine."""

import asyncio
import gc
import signal
import threading
from collections.abc import Coroutine
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from farrier import LLM, AsyncLLM, SamplingParams
from farrier.runtime.llm import RequestStream
from farrier.runtime.outputs import CoreStats, Delta
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.engine import Batch, StepResult
from farrier.targets.errors import EngineError, InsufficientResourcesError, OverloadedError, RequestError
from tests.reference_engine import ReferenceEngine, ReferenceHandle, logits_after, reference_config


@pytest.fixture(autouse=True, params=[False, True], ids=["plain", "overlapped"])
def overlaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Everything is true of both loops."""
    monkeypatch.setattr(ReferenceEngine, "overlaps", request.param)
    return bool(request.param)


GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=50)


def engine(**config: Any) -> ReferenceEngine:
    return ReferenceEngine(reference_config(**config))


def ids(*token_ids: int) -> Any:
    return {"prompt_token_ids": list(token_ids)}


def greedy(prompt: list[int], count: int = 6) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(logits_after(np.array(tokens, np.int32), 50))))
    return tokens[len(prompt) :]


# --- LLM ---


def test_results_come_in_the_order_of_the_prompts() -> None:
    prompts = [[3 + index, 4, 5] for index in range(30)]
    with LLM(engine()) as llm:
        outputs = llm.generate([ids(*prompt) for prompt in prompts], GREEDY)
        assert [output.prompt_token_ids for output in outputs] == prompts
        assert [output.outputs[0].token_ids for output in outputs] == [greedy(prompt) for prompt in prompts]
        assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
        assert {output.prompt for output in outputs} == {None}
        assert llm.generate([], GREEDY) == []


def test_one_prompt_and_params_for_each() -> None:
    with LLM(engine()) as llm:
        (output,) = llm.generate(ids(3, 4), GREEDY)
        assert output.outputs[0].token_ids == greedy([3, 4])
        assert output.outputs[0].text == ""
        outputs = llm.generate([ids(3), ids(4)], [GREEDY, replace(GREEDY, max_tokens=2, n=3, logprobs=1)])
        assert [len(each.outputs) for each in outputs] == [1, 3]
        assert [len(each.token_ids) for each in outputs[1].outputs] == [2, 2, 2]
        assert [len(each.logprobs or []) for each in outputs[1].outputs] == [2, 2, 2]
        assert outputs[0].outputs[0].logprobs is None
        with pytest.raises(RequestError, match="2 prompts have 1 params"):
            llm.generate([ids(3), ids(4)], [GREEDY])


def test_text_in_text_out(byte_level: Tokenizer) -> None:
    loaded = engine(vocab_size=byte_level.vocab_size)
    with LLM(loaded, tokenizer=byte_level) as llm:
        (output,) = llm.generate("The quick", GREEDY)
        assert output.prompt == "The quick"
        assert output.prompt_token_ids == byte_level.encode("The quick")
        assert output.outputs[0].text == byte_level.decode(output.outputs[0].token_ids)
        with pytest.raises(RequestError, match="no chat template"):
            llm.chat([{"role": "user", "content": "Hello"}])


def test_chat(byte_level: Tokenizer) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% endfor %}{{ tools or '' }}"
    chatty = Tokenizer(byte_level._backend, byte_level.special_tokens, {"default": template})
    hello, bye = [{"role": "user", "content": "hello"}], [{"role": "user", "content": "bye"}]
    with LLM(engine(vocab_size=byte_level.vocab_size, max_seq_len=300), tokenizer=chatty) as llm:
        (one,) = llm.chat(hello, GREEDY)
        assert byte_level.decode(one.prompt_token_ids, skip_special_tokens=False) == "<|im_start|>user hello"
        two = llm.chat([hello, bye], GREEDY)
        assert two[0].outputs == one.outputs
        assert byte_level.decode(two[1].prompt_token_ids) == "user bye"
        (with_tools,) = llm.chat(hello, GREEDY, tools=[{"type": "function", "function": {"name": "look"}}])
        assert "look" in byte_level.decode(with_tools.prompt_token_ids)


def test_a_refused_request_starts_nothing() -> None:
    with LLM(engine()) as llm:
        with pytest.raises(RequestError, match="holds token id 99"):
            llm.generate([ids(3), ids(99)], GREEDY)
        assert llm.stats().prompt_tokens == 0
        with pytest.raises(RequestError, match="needs a tokenizer"):
            llm.generate("text", GREEDY)
        with pytest.raises(RequestError, match="Chat needs a tokenizer"):
            llm.chat([{"role": "user", "content": "Hello"}])


def test_llm_needs_a_start_and_frees_the_engine() -> None:
    loaded = engine()
    llm = LLM(loaded)
    with pytest.raises(EngineError, match="not started"):
        llm.generate(ids(3), GREEDY)
    with llm:
        llm.generate(ids(3), GREEDY)
    assert loaded.is_closed
    llm.stop()
    with pytest.raises(EngineError, match="not started"):
        llm.generate(ids(3), GREEDY)


class InterruptedEngine(ReferenceEngine):
    """Ctrl-C arrives in the middle of its third step."""

    def step(self, batch: Batch) -> ReferenceHandle:
        if self.num_steps == 2:
            signal.raise_signal(signal.SIGINT)
        return super().step(batch)


def test_ctrl_c_aborts_between_steps_and_leaves_the_engine_usable() -> None:
    with LLM(InterruptedEngine(reference_config())) as llm:
        with pytest.raises(KeyboardInterrupt):
            llm.generate([ids(3), ids(4)], LONG)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        stats = llm.stats()
        assert (stats.num_running, stats.num_waiting, stats.steps) == (0, 0, 3)
        assert llm.generate(ids(3, 4), GREEDY)[0].outputs[0].token_ids == greedy([3, 4])


def test_ctrl_c_in_the_last_step_is_not_lost() -> None:
    with LLM(InterruptedEngine(reference_config())) as llm, pytest.raises(KeyboardInterrupt):
        llm.generate(ids(3), replace(GREEDY, max_tokens=3))


class DyingEngine(ReferenceEngine):
    def step(self, batch: Batch) -> ReferenceHandle:
        if self.num_steps == 3:
            raise OSError("the cable is out")
        return super().step(batch)


def test_a_dead_engine_raises() -> None:
    with LLM(DyingEngine(reference_config())) as llm:
        for _ in range(2):
            with pytest.raises(EngineError, match="the cable is out"):
                llm.generate([ids(3), ids(4)], GREEDY)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kv_blocks": 30}, 30),
        ({}, 16),
        ({"kv_memory_fraction": 1.0}, 20),
        ({"kv_memory_fraction": 0.25}, 5),
    ],
)
def test_size_of_the_kv_pool(options: dict[str, Any], expected: int) -> None:
    loaded = ReferenceEngine(reference_config(), max_blocks=20 if expected != 30 else 30)
    with LLM(loaded, **options) as llm:
        assert llm.stats().num_kv_blocks == expected


def test_the_kv_pool_is_no_larger_than_can_be_used() -> None:
    with LLM(engine(max_batch_size=3, max_seq_len=30, block_size=4)) as llm:
        assert llm.stats().num_kv_blocks == 3 * 8


def test_a_kv_pool_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        InsufficientResourcesError, match="21 KV blocks of 32 bytes were asked for, but memory holds 20"
    ):
        LLM(ReferenceEngine(reference_config(), max_blocks=20), kv_blocks=21).start()
    with pytest.raises(InsufficientResourcesError, match="Not one KV block of 32 bytes fits"):
        LLM(ReferenceEngine(reference_config(), max_blocks=1)).start()


def test_an_engine_whose_pool_does_not_fit_is_closed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = ReferenceEngine(reference_config(), max_blocks=20)
    monkeypatch.setattr("farrier.runtime.assembly.load_engine", lambda path: loaded)
    with pytest.raises(InsufficientResourcesError):
        LLM("an engine", kv_blocks=21).start()
    assert loaded.is_closed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"capacity_policy": "best"}, "capacity_policy must be one of guaranteed_no_evict, max_utilization"),
        ({"kv_blocks": 0}, "kv_blocks must be 1 or more"),
        ({"kv_memory_fraction": 1.5}, "kv_memory_fraction must be above 0 and at most 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    for kind in (LLM, AsyncLLM):
        with pytest.raises(ValueError, match=sentence):
            kind(engine(), **options)


def test_a_directory_brings_its_own_tokenizer(byte_level: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="brings its own tokenizer"):
        LLM(tmp_path, tokenizer=byte_level).start()


# --- AsyncLLM ---


class GatedEngine(ReferenceEngine):
    """Ends a step only when it is let through."""

    def __init__(self, **config: Any) -> None:
        super().__init__(reference_config(**config))
        self.permits = threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)

    def run(self, batch: Batch, token_ids: npt.NDArray[np.int32]) -> StepResult:
        self.arrived.release()
        assert self.permits.acquire(timeout=60), "nobody let the step through"
        return super().run(batch, token_ids)

    async def in_step(self) -> None:
        """Returns when the engine is in a step, waiting to be let through. The next may be enqueued already."""
        assert await asyncio.to_thread(self.arrived.acquire, timeout=60)

    def open(self) -> None:
        self.permits.release(1_000_000)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def collect(stream: RequestStream) -> list[Delta]:
    return [delta async for delta in stream]


async def until(llm: AsyncLLM, reached: Any) -> CoreStats:
    """The stats once they are as they should become."""
    while not reached(llm.stats()):
        await asyncio.sleep(0.001)
    return llm.stats()


def is_empty(stats: CoreStats) -> bool:
    return stats.num_running == stats.num_waiting == 0 and stats.kv_cache_usage == 0


def test_many_streams_at_once() -> None:
    async def work() -> None:
        async with AsyncLLM(engine()) as llm:
            assert llm.healthy
            prompts = [[3 + index % 40, 4 + index // 40, 5] for index in range(100)]
            streams = [
                llm.generate(ids(*prompt), replace(GREEDY, n=1 + index % 2)) for index, prompt in enumerate(prompts)
            ]
            for prompt, deltas in zip(prompts, await asyncio.gather(*map(collect, streams)), strict=True):
                first = [delta for delta in deltas if delta.index == 0]
                assert [token for delta in first for token in delta.token_ids] == greedy(prompt)
                assert first[-1].finish_reason == "length"
            assert is_empty(llm.stats())
        assert not llm.healthy

    run(work())


def test_a_delta_comes_with_each_step() -> None:
    async def work() -> None:
        gated = GatedEngine()
        async with AsyncLLM(gated) as llm:
            stream = llm.generate(ids(3, 4), GREEDY, request_id="mine")
            for expected in greedy([3, 4]):
                await gated.in_step()
                gated.permits.release()
                delta = await anext(stream)
                assert (delta.request_id, delta.token_ids) == ("mine", [expected])
            assert delta.finish_reason == "length"
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(work())


def test_refusals_come_at_once() -> None:
    async def work() -> None:
        gated = GatedEngine()
        llm = AsyncLLM(gated)
        with pytest.raises(EngineError, match="not started"):
            llm.generate(ids(3), GREEDY)
        async with llm:
            with pytest.raises(RequestError, match="holds token id 99"):
                llm.generate(ids(99), GREEDY)
            stream = llm.generate(ids(3), GREEDY, request_id="same")
            with pytest.raises(RequestError, match="already under way"):
                llm.generate(ids(3), GREEDY, request_id="same")
            gated.open()
            assert len(await collect(stream)) == 6
            assert len(await collect(llm.generate(ids(3), GREEDY, request_id="same"))) == 6

    run(work())


@pytest.mark.parametrize("way", ["aclose", "cancel", "drop", "leave the loop"])
@pytest.mark.parametrize("state", ["running", "queued"])
def test_leaving_a_stream_aborts_its_request(way: str, state: str) -> None:
    async def leave(stream: RequestStream) -> None:
        if way == "aclose":
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        elif way == "cancel":
            task = asyncio.create_task(collect(stream))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "leave the loop" and state == "running":
            async with aclosing(stream):
                async for _ in stream:
                    break

    async def work() -> None:
        gated = GatedEngine(max_batch_size=1)
        async with AsyncLLM(gated) as llm:
            first = llm.generate(ids(3), LONG)
            await gated.in_step()
            gated.permits.release()
            await gated.in_step()
            if state == "queued":
                await leave(stream := llm.generate(ids(4), LONG))
                del stream
            else:
                await leave(first)
                del first
            gc.collect()
            if state == "queued":
                gated.permits.release()
                await until(llm, lambda stats: stats.num_waiting == 0 and stats.steps == 2)
                assert llm.stats().num_running == 1, "the other one goes on"
                await first.aclose()
            gated.permits.release(2)
            stats = await until(llm, is_empty)
            assert stats.steps <= 4
            gated.open()

    run(work())


def test_an_aborted_neighbour_changes_nothing() -> None:
    async def work() -> None:
        async with AsyncLLM(engine()) as llm:
            kept = asyncio.create_task(collect(llm.generate(ids(3, 4), LONG)))
            for index in range(20):
                stream = llm.generate(ids(5, index), LONG)
                await anext(stream)
                await stream.aclose()
            tokens = [token for delta in await kept for token in delta.token_ids]
            assert tokens == greedy([3, 4], 50)
            await until(llm, is_empty)

    run(work())


def test_the_queue_is_bounded() -> None:
    async def work() -> None:
        gated = GatedEngine(max_batch_size=1)
        async with AsyncLLM(gated, max_queue=2) as llm:
            streams = [llm.generate(ids(3), GREEDY)]
            await gated.in_step()
            streams += [llm.generate(ids(4), GREEDY), llm.generate(ids(5), GREEDY)]
            with pytest.raises(OverloadedError, match="2 outputs wait already") as caught:
                llm.generate(ids(6), GREEDY)
            assert caught.value.retryable
            assert caught.value.retry_after > 0
            await streams.pop().aclose()
            gated.open()
            await asyncio.gather(*map(collect, streams))
            await collect(llm.generate(ids(6), GREEDY))

    run(work())


def test_stop_drains_then_aborts() -> None:
    async def work() -> None:
        gated = GatedEngine()
        llm = AsyncLLM(gated)
        await llm.start()
        finishing = asyncio.create_task(collect(llm.generate(ids(3), GREEDY)))
        await gated.in_step()
        stopping = asyncio.create_task(llm.stop(drain_seconds=60))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="shutting down"):
            llm.generate(ids(4), GREEDY)
        gated.open()
        await stopping
        assert (await finishing)[-1].finish_reason == "length"
        assert gated.is_closed
        assert not llm.healthy
        await llm.stop()
        with pytest.raises(OverloadedError):
            llm.generate(ids(4), GREEDY)

    run(work())


def test_stop_without_drain_ends_every_stream() -> None:
    async def work() -> None:
        gated = GatedEngine(max_batch_size=1)
        llm = AsyncLLM(gated)
        await llm.start()
        streams = [llm.generate(ids(3 + index), replace(GREEDY, n=2)) for index in range(3)]
        tasks = [asyncio.create_task(collect(stream)) for stream in streams]
        await gated.in_step()
        late = asyncio.create_task(collect(llm.generate(ids(9), GREEDY)))
        stopping = asyncio.create_task(llm.stop())
        await asyncio.sleep(0.01)
        gated.open()
        await stopping
        for task in tasks:
            ends = [delta.finish_reason for delta in await task if delta.finish_reason]
            assert ends == ["abort", "abort"]
        assert [delta.finish_reason for delta in await late] == ["abort"]

    run(work())


def test_stop_before_start() -> None:
    run(AsyncLLM(engine()).stop())


def test_a_dead_engine_ends_every_stream_with_an_error() -> None:
    class DyingGatedEngine(GatedEngine, DyingEngine): ...

    async def work() -> None:
        dying = DyingGatedEngine(max_batch_size=2)
        async with AsyncLLM(dying) as llm:
            streams = [llm.generate(ids(3 + index), GREEDY) for index in range(5)]
            dying.open()
            for deltas in await asyncio.gather(*map(collect, streams)):
                assert deltas[-1].finish_reason == "error"
                assert isinstance(deltas[-1].error, EngineError)
                assert "the cable is out" in str(deltas[-1].error)
            assert not llm.healthy
            with pytest.raises(EngineError, match="the cable is out"):
                llm.generate(ids(3), GREEDY)

    run(work())


def test_an_engine_that_cannot_be_loaded_raises_at_the_start(tmp_path: Path) -> None:
    async def work() -> None:
        llm = AsyncLLM(tmp_path / "nowhere")
        with pytest.raises(EngineError):
            await llm.start()
        assert not llm.healthy
        await llm.stop()

    run(work())


def test_the_event_loop_stays_free_during_a_step() -> None:
    async def work() -> None:
        gated = GatedEngine()
        async with AsyncLLM(gated) as llm:
            task = asyncio.create_task(collect(llm.generate(ids(3), GREEDY)))
            await gated.in_step()
            for _ in range(100):
                await asyncio.sleep(0)
                assert llm.stats().num_running == 1
            gated.open()
            await task

    run(work())


def test_an_idle_engine_sleeps() -> None:
    async def work() -> None:
        idle = engine()
        async with AsyncLLM(idle) as llm:
            await collect(llm.generate(ids(3), GREEDY))
            steps = idle.num_steps
            await asyncio.sleep(0.02)
            assert idle.num_steps == steps == 6
            await collect(llm.generate(ids(4), GREEDY))

    run(work())
