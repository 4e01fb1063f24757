"""The engine contract as a specification: small, slow, and unforgiving about the KV cache.

Each slot of each KV block holds the (token id, position) that was written there. Logits are a hash of the whole
context *read back through the block table*, so KV that leaked, was overwritten or is wrongly shared changes the
output, or is caught reading positions that are not 0, 1, 2, ...

Steps run as late as they may: when they are waited for. What changes a batch after it was enqueued is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from farrier.targets.decoder import DecoderSpec, LayerSpec, RopeSpec
from farrier.targets.engine import Batch, Ceilings, EngineConfig, Fingerprint, KvMemory, SamplingArrays, StepResult
from farrier.targets.sampling import sample

Float32 = npt.NDArray[np.float32]


def reference_config(
    *,
    vocab_size: int = 50,
    block_size: int = 4,
    max_batch_size: int = 8,
    max_num_tokens: int = 64,
    max_seq_len: int = 64,
    eos_token_ids: tuple[int, ...] = (1,),
) -> EngineConfig:
    spec = DecoderSpec(
        architecture="Reference",
        vocab_size=vocab_size,
        hidden_size=2,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=2,
        layers=(LayerSpec(window=None, rope=0, moe=False),),
        ropes=(RopeSpec(rotary_dim=2, inv_freq=(1.0,)),),
        max_positions=max_seq_len,
        norm_eps=1e-6,
        attention_scale=1.0,
    )
    return EngineConfig(
        model="reference",
        target="reference",
        fingerprint=Fingerprint(abi=1, backend="reference", architecture="any", features=(), versions=()),
        spec=spec,
        precision="f32",
        overrides={},
        kv_dtype="f32",
        block_size=block_size,
        ceilings=Ceilings(max_batch_size, max_num_tokens, max_seq_len),
        eos_token_ids=eos_token_ids,
        has_tokenizer=False,
        source_digest="0" * 64,
        files={},
        weight_bytes=0,
        kv_bytes_per_block=8 * block_size,
        farrier_version="0",
    )


def logits_after(tokens: npt.NDArray[np.int32], vocab_size: int) -> Float32:
    """`[vocab_size]` logits of what comes after `tokens`: any function of all of them, and of nothing else."""
    digest = blake2b(tokens.tobytes(), digest_size=8).digest()
    normal = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(vocab_size)
    return (2 * normal).astype(np.float32)


@dataclass
class ReferenceHandle:
    run: Callable[[], StepResult]

    def wait(self) -> StepResult:
        return self.run()


class _Step:
    """One enqueued step: the block table of each of its sequences, and whose token each of its samples is."""

    def __init__(self, batch: Batch, block_size: int) -> None:
        self.batch = batch
        self.result: StepResult | None = None
        self.tables = [
            batch.block_ids[start:end].tolist()
            for start, end in zip(batch.block_starts, batch.block_starts[1:], strict=False)
        ]
        self.lengths = (batch.context_lens + np.diff(batch.query_starts)).tolist()
        self.written = [
            set(table[context // block_size :])
            for table, context in zip(self.tables, batch.context_lens.tolist(), strict=True)
        ]
        self.sampled = [int(np.searchsorted(batch.query_starts, row, side="right")) - 1 for row in batch.sample_rows]


class ReferenceEngine:
    """Implements `farrier.targets.engine.Engine`. Raises AssertionError when a batch breaks the contract."""

    overlaps = False

    def __init__(self, config: EngineConfig, *, max_blocks: int = 10_000) -> None:
        self.config = config
        self.max_blocks = max_blocks
        self.is_closed = False
        self.num_steps = 0
        self.num_computed_tokens = 0
        self.num_references = 0
        self._tokens = self._positions = np.empty((0, 0), np.int32)
        self._steps: list[_Step] = []
        """The last one, and before it those that were not waited for."""

    def memory(self) -> KvMemory:
        return KvMemory(self.config.kv_bytes_per_block, self.max_blocks)

    def allocate(self, num_blocks: int) -> None:
        assert not len(self._tokens), "allocated twice"
        assert 0 < num_blocks <= self.max_blocks
        self._tokens = np.full((num_blocks, self.config.block_size), -1, np.int32)
        self._positions = np.full((num_blocks, self.config.block_size), -1, np.int32)

    def close(self) -> None:
        self.is_closed = True

    def step(self, batch: Batch) -> ReferenceHandle:
        assert not self.is_closed
        self._check_shapes(batch)
        step = _Step(batch, self.config.block_size)
        previous = self._steps[-1] if self._steps else None
        self._check_references(step, previous)
        if previous is not None and previous.result is None:
            assert self.overlaps, "enqueued before the step under way was waited for"
            assert len(self._steps) == 1 or self._steps[0].result is not None, "three steps at once"
            self._check_blocks_under_way(step, previous)
        self._steps = [*self._steps[-1:], step]
        self.num_steps += 1
        self.num_computed_tokens += batch.num_tokens
        self.num_references += int((batch.token_ids < 0).sum())
        return ReferenceHandle(lambda: self._wait(step, previous))

    def run(self, batch: Batch, token_ids: npt.NDArray[np.int32]) -> StepResult:
        """Computes a step whose tokens are these: every reference is replaced by what was sampled."""
        tables = [self._table(batch, sequence) for sequence in range(batch.num_sequences)]
        for sequence, table in enumerate(tables):
            others = {block for other, blocks in enumerate(tables) if other != sequence for block in blocks.tolist()}
            self._write(batch, token_ids, sequence, table, others)
        vocab_size = self.config.spec.vocab_size
        logits = np.empty((len(batch.sample_rows), vocab_size), np.float32)
        for index, row in enumerate(batch.sample_rows.tolist()):
            sequence = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            logits[index] = logits_after(self._read(tables[sequence], int(batch.positions[row]) + 1), vocab_size)
        return sample(logits, batch.sampling)

    def _wait(self, step: _Step, previous: _Step | None) -> StepResult:
        assert step.result is None, "waited for twice"
        token_ids = step.batch.token_ids.copy()
        if previous is not None:
            assert previous.result is not None, "waited for before the step before it"
            references = token_ids < 0
            token_ids[references] = previous.result.token_ids[-1 - token_ids[references]]
        step.result = self.run(step.batch, token_ids)
        return step.result

    def _check_references(self, step: _Step, previous: _Step | None) -> None:
        """A reference is to a sample of the previous step, as the next token of the sequence it was sampled for."""
        for row in np.flatnonzero(step.batch.token_ids < 0).tolist():
            assert previous is not None, "the first step refers to a previous one"
            assert -1 - step.batch.token_ids[row] < len(previous.sampled), "no such row was sampled"
            before = previous.sampled[-1 - step.batch.token_ids[row]]
            table = step.tables[int(np.searchsorted(step.batch.query_starts, row, side="right")) - 1]
            assert step.batch.positions[row] == previous.lengths[before], "a reference to another position"
            assert table[: len(previous.tables[before])] == previous.tables[before], "a reference to another sequence"
            assert previous.result is None, "the token is known"

    def _check_blocks_under_way(self, step: _Step, previous: _Step) -> None:
        """What one of the two steps writes is in the other only where the sequence is the same."""
        for sequence, table in enumerate(step.tables):
            for before, table_before in enumerate(previous.tables):
                if not _continues(step, sequence, previous, before):
                    assert not step.written[sequence] & set(table_before), "writes a block of the step under way"
                    assert not previous.written[before] & set(table), "uses a block that the step under way writes"

    def _check_shapes(self, batch: Batch) -> None:
        ceilings = self.config.ceilings
        assert 0 < batch.num_sequences <= ceilings.max_batch_size
        assert 0 < batch.num_tokens <= ceilings.max_num_tokens
        assert batch.token_ids.max() < self.config.spec.vocab_size
        for starts, total in ((batch.query_starts, batch.num_tokens), (batch.block_starts, len(batch.block_ids))):
            assert starts[0] == 0
            assert starts[-1] == total
            assert (np.diff(starts) > 0).all()
            assert len(starts) == batch.num_sequences + 1
        for name in ("token_ids", "positions", "query_starts", "context_lens", "block_ids", "block_starts"):
            assert getattr(batch, name).dtype == np.int32, name
        assert len(batch.positions) == batch.num_tokens
        assert set(batch.sample_rows.tolist()) <= set((batch.query_starts[1:] - 1).tolist())
        check_sampling_shapes(batch.sampling, len(batch.sample_rows))

    def _table(self, batch: Batch, sequence: int) -> npt.NDArray[np.int32]:
        table = batch.block_ids[batch.block_starts[sequence] : batch.block_starts[sequence + 1]]
        assert len(set(table.tolist())) == len(table), "a block twice in one table"
        assert table.min() >= 0
        assert table.max() < len(self._tokens)
        return table

    def _write(
        self,
        batch: Batch,
        token_ids: npt.NDArray[np.int32],
        sequence: int,
        table: npt.NDArray[np.int32],
        others: set[int],
    ) -> None:
        rows = slice(batch.query_starts[sequence], batch.query_starts[sequence + 1])
        context = int(batch.context_lens[sequence])
        positions = batch.positions[rows]
        assert positions.tolist() == list(range(context, context + len(positions)))
        assert positions[-1] < self.config.ceilings.max_seq_len
        assert len(table) == -(-(int(positions[-1]) + 1) // self.config.block_size)
        blocks, slots = table[positions // self.config.block_size], positions % self.config.block_size
        assert not others & set(blocks.tolist()), "writes into a block that another sequence of the batch holds"
        self._tokens[blocks, slots] = token_ids[rows]
        self._positions[blocks, slots] = positions

    def _read(self, table: npt.NDArray[np.int32], length: int) -> npt.NDArray[np.int32]:
        positions = self._positions[table].reshape(-1)[:length]
        assert positions.tolist() == list(range(length)), "the KV cache does not hold this sequence's context"
        return self._tokens[table].reshape(-1)[:length]


def _continues(step: _Step, sequence: int, previous: _Step, before: int) -> bool:
    """Whether this sequence of a step goes on where that one of the previous step ends."""
    if step.batch.context_lens[sequence] != previous.lengths[before]:
        return False
    if before in previous.sampled:
        first_token = step.batch.token_ids[step.batch.query_starts[sequence]]
        return bool(first_token == -1 - previous.sampled.index(before))
    return bool(step.tables[sequence][: len(previous.tables[before])] == previous.tables[before])


def check_sampling_shapes(arrays: SamplingArrays, rows: int) -> None:
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert getattr(arrays, name).dtype == np.float32, name
        assert getattr(arrays, name).shape == (rows,), name
    for name in ("top_k", "num_logprobs", "output_starts"):
        assert getattr(arrays, name).dtype == np.int32, name
        assert getattr(arrays, name).shape == (rows,), name
    for name in ("seed", "step"):
        assert getattr(arrays, name).dtype == np.uint64, name
        assert getattr(arrays, name).shape == (rows,), name
    for starts, values in ((arrays.history_starts, arrays.history_ids), (arrays.bias_starts, arrays.bias_ids)):
        assert starts.dtype == values.dtype == np.int32
        assert starts.shape == (rows + 1,)
        assert starts[-1] == len(values)
    assert arrays.bias_values.dtype == np.float32
    assert arrays.bias_values.shape == arrays.bias_ids.shape
