"""Every family against transformers, through convert, build and the runtime: small random models in f32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farrier import LLM, SamplingParams
from farrier.targets.build import BuildOptions, build
from farrier.targets.detect import detect, select_target
from farrier.targets.engine import Batch, Engine, SamplingArrays, load_engine
from tests.models import FAMILIES, VOCAB_SIZE, save_tiny

torch = pytest.importorskip("torch", reason="the reference implementation runs on torch")
transformers = pytest.importorskip("transformers", reason="the reference implementation")

PROMPT_LENGTH, NEW_TOKENS = 90, 32
MAX_NUM_TOKENS = 24  # smaller than the prompt, so that the runtime prefills in chunks

PROMPTS = ((1, PROMPT_LENGTH), (2, 50))
"""(seed, length)"""


@dataclass(frozen=True)
class Case:
    """The reference model, the engine built from its files, and the reference's greedy continuations of PROMPTS."""

    model: Any
    engine: Path
    continuations: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.set_num_threads(1)  # two pools of spinning threads on one machine slow each other down
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    options = BuildOptions(max_num_tokens=256, max_batch_size=4)
    build(folder / "model", folder / "engine", select_target(detect(), "cpu"), options)
    return Case(model, folder / "engine", [_generate(model, prompt(*described)) for described in PROMPTS])


def prompt(seed: int, length: int = PROMPT_LENGTH) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).tolist()


def one_sequence(token_ids: list[int], start: int, blocks: list[int]) -> Batch:
    """A step that computes `token_ids` from position `start` on and samples every row."""
    count = len(token_ids)
    arrays = SamplingArrays.greedy(count)
    arrays.num_logprobs = np.full(count, VOCAB_SIZE, np.int32)
    used = blocks[: -(-(start + count) // 32)]
    return Batch(
        token_ids=np.array(token_ids, np.int32),
        positions=np.arange(start, start + count, dtype=np.int32),
        query_starts=np.array([0, count], np.int32),
        context_lens=np.array([start], np.int32),
        block_ids=np.array(used, np.int32),
        block_starts=np.array([0, len(used)], np.int32),
        sample_rows=np.arange(count, dtype=np.int32),
        sampling=arrays,
    )


def logprobs(engine: Engine, token_ids: list[int], start: int, blocks: list[int]) -> np.ndarray:
    """[len(token_ids), vocab]"""
    result = engine.step(one_sequence(token_ids, start, blocks)).wait()
    rows = np.empty((len(token_ids), VOCAB_SIZE), np.float32)
    for row, logs in result.logprobs.items():
        rows[row, logs.top_ids] = logs.top_values
    return rows


def test_logits(case: Case) -> None:
    model = case.model
    tokens = prompt(1)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    expected = torch.log_softmax(logits, -1).numpy()
    scale = float(logits.abs().max())
    engine = load_engine(case.engine)
    engine.allocate(16)
    try:
        whole = logprobs(engine, tokens, 0, [3, 1, 5])
        assert np.abs(whole - expected).max() <= 1e-3 * scale
        chunks = [
            logprobs(engine, tokens[start:stop], start, [9, 2, 7])
            for start, stop in ((0, 7), (7, 40), (40, 41), (41, 90))
        ]
        assert np.abs(np.concatenate(chunks) - expected).max() <= 1e-3 * scale
        # The first two blocks of the first run serve another sequence that begins alike.
        other = tokens[:64] + prompt(2, 20)
        with torch.no_grad():
            expected_other = torch.log_softmax(model(torch.tensor([other])).logits[0], -1).numpy()
        reused = logprobs(engine, other[64:], 64, [3, 1, 11])
        assert np.abs(reused - expected_other[64:]).max() <= 1e-3 * scale
    finally:
        engine.close()


def test_greedy_tokens(case: Case) -> None:
    with LLM(case.engine, kv_blocks=32) as llm:
        assert _continue(llm) == case.continuations
        results = llm.generate(_requests(), GREEDY)
    assert [result.outputs[0].token_ids for result in results] == case.continuations
    assert results[0].num_cached_tokens >= 64


def test_greedy_tokens_prefilled_in_chunks(case: Case, tmp_path: Path) -> None:
    options = BuildOptions(max_num_tokens=MAX_NUM_TOKENS, max_batch_size=4)
    build(case.engine.parent / "model", tmp_path / "engine", select_target(detect(), "cpu"), options)
    with LLM(tmp_path / "engine", kv_blocks=32) as llm:
        assert _continue(llm) == case.continuations


GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)


def _requests() -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": prompt(*described)} for described in PROMPTS]


def _continue(llm: LLM) -> list[list[int]]:
    return [result.outputs[0].token_ids for result in llm.generate(_requests(), GREEDY)]


def _generate(model: Any, tokens: list[int]) -> list[int]:
    """The reference's greedy continuation, the whole sequence recomputed at every token: no cache to go wrong."""
    sequence = list(tokens)
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            sequence.append(int(model(torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()))
    return sequence[len(tokens) :]
