"""The OpenVINO engine beside a numpy decoder, and a batch's members beside the same requests alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from farrier import LLM, SamplingParams
from farrier.targets.build import BuildOptions, build
from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.convert import convert
from farrier.targets.detect import detect, select_target
from farrier.targets.engine import Batch, Engine, SamplingArrays, load_engine
from farrier.targets.errors import EngineError
from tests import reference
from tests.small_llama import CONFIG, save_small_llama

VOCAB_SIZE = CONFIG["vocab_size"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    save_small_llama(folder / "model")
    return convert(folder / "model", folder / "checkpoint").path


@pytest.fixture(scope="module")
def path(checkpoint: Path) -> Path:
    options = BuildOptions(max_num_tokens=64, max_batch_size=6)
    build(checkpoint, checkpoint.parent / "engine", select_target(detect(), "cpu"), options)
    return checkpoint.parent / "engine"


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    engine = load_engine(path)
    engine.allocate(32)
    yield engine
    engine.close()


def tokens(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, count).tolist()


def mixed(parts: list[tuple[list[int], int, list[int]]]) -> Batch:
    """A step over several sequences: (new tokens, tokens computed before, blocks) each; the last row is sampled."""
    lengths = [len(new) for new, _, _ in parts]
    arrays = SamplingArrays.greedy(len(parts))
    arrays.num_logprobs = np.full(len(parts), VOCAB_SIZE, np.int32)
    return Batch(
        token_ids=np.concatenate([new for new, _, _ in parts]).astype(np.int32),
        positions=np.concatenate([np.arange(past, past + len(new)) for new, past, _ in parts]).astype(np.int32),
        query_starts=np.cumsum([0, *lengths]).astype(np.int32),
        context_lens=np.array([past for _, past, _ in parts], np.int32),
        block_ids=np.concatenate([blocks for _, _, blocks in parts]).astype(np.int32),
        block_starts=np.cumsum([0, *(len(blocks) for _, _, blocks in parts)]).astype(np.int32),
        sample_rows=(np.cumsum(lengths) - 1).astype(np.int32),
        sampling=arrays,
    )


def last_logprobs(checkpoint: Path, token_ids: list[int]) -> np.ndarray:
    logits = reference.logits(CheckpointReader(checkpoint), token_ids)[-1].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def test_prefills_and_decodes_mix_in_a_step(engine: Engine, checkpoint: Path) -> None:
    a, b, c = tokens(1, 40), tokens(2, 33), tokens(3, 10)
    engine.step(mixed([(a[:39], 0, [4, 9]), (b[:20], 0, [7])])).wait()
    result = engine.step(mixed([(a[39:], 39, [4, 9]), (b[20:], 20, [7, 2]), (c, 0, [0])])).wait()
    for row, sequence in enumerate((a, b, c)):
        expected = last_logprobs(checkpoint, sequence)
        assert result.token_ids[row] == expected.argmax()
        got = np.empty(VOCAB_SIZE)
        got[result.logprobs[row].top_ids] = result.logprobs[row].top_values
        assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max()


def test_a_token_may_be_what_the_previous_step_sampled(engine: Engine) -> None:
    a, b = tokens(1, 12), tokens(2, 20)
    first = engine.step(mixed([(a, 0, [1]), (b, 0, [2])])).wait().token_ids.tolist()
    known = engine.step(mixed([([first[1]], 20, [2]), ([first[0]], 12, [1])])).wait().token_ids.tolist()
    handle = engine.step(mixed([(a, 0, [3]), (b, 0, [5])]))
    referred = engine.step(mixed([([-2], 20, [5]), ([-1], 12, [3])])).wait().token_ids.tolist()
    assert handle.wait().token_ids.tolist() == first
    assert referred == known


def test_the_first_step_has_no_previous_one_to_refer_to(engine: Engine) -> None:
    with pytest.raises(EngineError, match="first step"):
        engine.step(mixed([([-1], 0, [1])]))


def test_closing_waits_for_the_step_under_way(path: Path) -> None:
    """Or its inputs and weights would vanish while they are read."""
    expected = None
    for _ in range(5):
        engine = load_engine(path)
        engine.allocate(32)
        handle = engine.step(mixed([(tokens(1, 40), 0, [1, 2]), (tokens(2, 24), 0, [3])]))
        engine.close()
        others = [np.full(64, 2**30, np.int32) for _ in range(1000)]  # take the room that the inputs had
        got = handle.wait().token_ids.tolist()
        assert got == (expected or got)
        expected = got
        del others


def test_an_engine_that_did_nothing_closes(path: Path) -> None:
    engine = load_engine(path)
    engine.close()
    engine.close()


def test_the_pool_is_allocated_once(engine: Engine) -> None:
    with pytest.raises(EngineError, match="already allocated"):
        engine.allocate(4)


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
def test_outputs_do_not_depend_on_the_batch(path: Path, policy: str) -> None:
    """Greedy and seeded requests in a pool that makes them wait, or preempts them, equal themselves alone."""
    rng = np.random.default_rng(0)
    common = tokens(9, 70)
    prompts = [
        {"prompt_token_ids": common[: rng.integers(0, 70)] + tokens(100 + index, int(rng.integers(1, 60)))}
        for index in range(24)
    ]
    params = [
        SamplingParams(
            temperature=0.0 if index % 2 else 0.9, seed=index, max_tokens=int(rng.integers(1, 40)), ignore_eos=True
        )
        for index in range(24)
    ]
    with LLM(path, kv_blocks=14, capacity_policy=policy) as llm:
        together = llm.generate(prompts, params)
        if policy == "max_utilization":
            assert llm.stats().num_preemptions > 0
    with LLM(path, kv_blocks=14, enable_prefix_caching=False) as llm:
        alone = [llm.generate(prompt, each)[0] for prompt, each in zip(prompts, params, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
