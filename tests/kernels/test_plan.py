"""Whole launch plans under the interpreter: every family against the numpy decoder, mixed and decode steps."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from farrier.plugins.gemv import GemvTile
from farrier.targets.checkpoint import WEIGHTS_FILE, CheckpointReader
from farrier.targets.convert import convert
from farrier.targets.cuda.backend import BLOCK_SIZE
from farrier.targets.cuda.emitter import Settings
from farrier.targets.cuda.lower import lower
from farrier.targets.cuda.pack import item_values, items
from farrier.targets.cuda.products import Choice, Product, Tactics
from farrier.targets.engine import Ceilings
from farrier.targets.tensorfile import TensorFile
from tests import reference
from tests.kernels.conftest import ON_DEVICE
from tests.kernels.plan_runner import PlanRunner
from tests.models import FAMILIES, save_tiny
from tests.steps import BLOCKS, batch, prompt

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="on a GPU the executor itself is tested")

CEILINGS = Ceilings(max_batch_size=6, max_num_tokens=64, max_seq_len=128)


class WideTiles(Tactics):
    """The interpreter's time goes by programs: few, of many columns."""

    def choose(self, product: Product, rows: int, *, decode: bool) -> Choice:
        choice = super().choose(product, rows, decode=decode)
        return GemvTile(32, 4, 1, 1) if isinstance(choice, GemvTile) else choice


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "checkpoint", precision="f16")
    checkpoint = CheckpointReader(tmp_path / "checkpoint")
    first, second = prompt(1, 38), prompt(2, 22)
    expected = [reference.logits(checkpoint, tokens) for tokens in (first, second)]
    settings = Settings(80, "fp16", "fp16", BLOCK_SIZE, CEILINGS, deterministic=False)
    with closing(TensorFile.open(checkpoint.path / WEIGHTS_FILE)) as file:
        weights = items(checkpoint.spec, file.tensors, "fp16", CEILINGS.max_seq_len)
        lowered = lower(
            checkpoint.spec, {item.name: item for item in weights}, settings, WideTiles(80, "fp16", deterministic=False)
        )
        arrays = {item.name: item_values(item, file.tensors) for item in weights}
        runner = PlanRunner(checkpoint.spec, arrays, lowered, settings, num_blocks=12)

    def near(logits: np.ndarray, wanted: np.ndarray) -> None:
        assert np.abs(logits - wanted).max() <= 6e-3 * np.abs(wanted).max()  # fp16 activations

    # A chunk of each; then the rest of one beside a single token of the other; then both decode, then one alone.
    logits = runner.step(batch([(first[:33], 0, BLOCKS[0], 3), (second[:20], 0, BLOCKS[1], 2)]), kind="mixed")
    near(logits, np.concatenate([expected[0][30:33], expected[1][18:20]]))
    logits = runner.step(batch([(first[33:36], 33, BLOCKS[0], 1), (second[20:21], 20, BLOCKS[1], 1)]), kind="mixed")
    near(logits, np.stack([expected[0][35], expected[1][20]]))
    both = batch([(first[36:37], 36, BLOCKS[0], 1), (second[21:22], 21, BLOCKS[1], 1)])
    near(runner.step(both, kind="decode"), np.stack([expected[0][36], expected[1][21]]))
    near(runner.step(batch([(first[37:38], 37, BLOCKS[0], 1)]), kind="decode"), expected[0][37:38])
