"""Every family on the GPU: logits against the numpy decoder, and many mixed requests against each alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farrier import LLM, SamplingParams
from farrier.targets.build import BuildOptions, build
from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.convert import convert
from farrier.targets.detect import detect, select_target
from farrier.targets.engine import Batch, load_engine
from tests import reference
from tests.models import FAMILIES, VOCAB_SIZE, save_tiny
from tests.steps import BLOCKS, batch, prompt

TOLERANCE = {"f16": 6e-3, "bf16": 4e-2}
"""Of the largest logit: activations keep eleven or eight bits."""


def logits_of(engine: Any, given: Batch) -> np.ndarray:
    from cuda.bindings import driver

    from farrier.targets.cuda.device import check

    engine.step(given).wait()
    array = engine._programs.arrays["logits"]
    rows = np.empty((len(given.sample_rows), array.shape[1]), np.float32)
    check(driver.cuMemcpyDtoH(rows.ctypes.data, array.address, rows.nbytes))
    return rows


@pytest.mark.parametrize(
    ("family", "precision"), [*((family, "f16") for family in FAMILIES), ("llama31", "bf16"), ("qwen3_moe", "bf16")]
)
def test_logits(family: str, precision: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "checkpoint", precision=precision)
    first, second = prompt(1, 120), prompt(2, 90)
    checkpoint = CheckpointReader(tmp_path / "checkpoint")
    expected = [reference.logits(checkpoint, tokens) for tokens in (first, second)]
    options = BuildOptions(max_batch_size=6, max_num_tokens=256, max_seq_len=200)
    # Without the sweep, which takes far longer than the test: what it may choose is tested kernel by kernel.
    build(tmp_path / "checkpoint", tmp_path / "engine", select_target(detect(), "auto"), options, runs_here=False)
    engine = load_engine(tmp_path / "engine")
    engine.allocate(32)
    blocks = ([*BLOCKS[0], 20, 21], [*BLOCKS[1], 22, 23])
    try:

        def near(logits: np.ndarray, wanted: np.ndarray) -> None:
            assert np.abs(logits - wanted).max() <= TOLERANCE[precision] * np.abs(wanted).max()

        near(
            logits_of(engine, batch([(first[:100], 0, blocks[0], 3), (second[:37], 0, blocks[1], 2)])),
            np.concatenate([expected[0][97:100], expected[1][35:37]]),
        )
        near(
            logits_of(engine, batch([(first[100:118], 100, blocks[0], 1), (second[37:38], 37, blocks[1], 1)])),
            np.stack([expected[0][117], expected[1][37]]),
        )
        for step in range(2):
            parts = [(first[118 + step : 119 + step], 118 + step, blocks[0], 1)]
            parts += [(second[38 + step : 39 + step], 38 + step, blocks[1], 1)]
            near(logits_of(engine, batch(parts)), np.stack([expected[0][118 + step], expected[1][38 + step]]))
    finally:
        engine.close()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_mixed_requests_equal_each_alone(family: str, tmp_path: Path) -> None:
    """64 requests with chunks, shared prefixes and preemptions, token by token against each alone."""
    save_tiny(family, tmp_path / "model")
    options = BuildOptions(precision="bf16", max_batch_size=16, max_num_tokens=64, max_seq_len=256, deterministic=True)
    build(tmp_path / "model", tmp_path / "engine", select_target(detect(), "auto"), options)
    rng = np.random.default_rng(5)
    shared = prompt(9, 70)
    prompts = [
        {
            "prompt_token_ids": (shared[: int(rng.integers(0, 70))] if i % 3 else [])
            + prompt(i, int(rng.integers(1, 90)))
        }
        for i in range(64)
    ]
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=int(rng.integers(1, 40)), ignore_eos=True)
        for i in range(64)
    ]
    with LLM(tmp_path / "engine", kv_blocks=40, capacity_policy="max_utilization") as llm:
        together = llm.generate(prompts, params)
        preemptions = llm.stats().num_preemptions
    with LLM(tmp_path / "engine", kv_blocks=40, enable_prefix_caching=False) as llm:
        alone = [llm.generate([p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    assert [r.outputs[0].token_ids for r in together] == [r.outputs[0].token_ids for r in alone]
    assert preemptions > 0
    assert all(0 <= token < VOCAB_SIZE for r in alone for token in r.outputs[0].token_ids)
