"""An engine whose answers are known beforehand."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.decoder import DecoderSpec, LayerSpec, RopeSpec
from farrier.targets.engine import ENGINE_ABI, Batch, Ceilings, EngineConfig, Fingerprint, Int32, KvMemory, StepResult
from farrier.targets.errors import EngineError
from farrier.targets.sampling import sample

BLOCK_SIZE = 16
END, MESSAGE_START, MESSAGE_END = 0, 1, 2
CONTROL_TOKENS = ["</s>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 256 + len(CONTROL_TOKENS)


class Parrot:
    """An engine without weights. In a chat it repeats the last message; elsewhere it goes on with the alphabet,
    and ends after the z. It reads what it answers to out of its KV cache, which holds the tokens themselves.

    broken: the next step fails.
    """

    overlaps = False

    def __init__(self, tokenizer: Tokenizer, *, max_batch_size: int = 16, max_seq_len: int = 512) -> None:
        self.config = parrot_config(Ceilings(max_batch_size, 256, max_seq_len))
        self.broken = False
        self._steps_left: threading.Semaphore | None = None
        alphabet = tokenizer.encode("abcdefghijklmnopqrstuvwxyz")
        self._next_letter = dict(zip(alphabet, [*alphabet[1:], END], strict=True))
        self._first_letter, self._newline = alphabet[0], tokenizer.encode("\n")[0]
        self._cache = np.empty((0, BLOCK_SIZE), np.int32)

    @contextmanager
    def held(self, *, after: int = 0) -> Iterator[None]:
        """Inside, the engine makes `after` more steps and then hangs in the next one."""
        self._steps_left = steps_left = threading.Semaphore(after)
        try:
            yield
        finally:
            self._steps_left = None
            steps_left.release(1_000_000)

    def memory(self) -> KvMemory:
        return KvMemory(bytes_per_block=4 * BLOCK_SIZE, max_blocks=4096)

    def allocate(self, num_blocks: int) -> None:
        self._cache = np.full((num_blocks, BLOCK_SIZE), -1, np.int32)

    def step(self, batch: Batch) -> "Parrot":
        if self._steps_left is not None:
            self._steps_left.acquire()
        if self.broken:
            raise EngineError("The parrot is dead.", code="engine_failed")
        wanted = {}
        for row, (start, end) in enumerate(zip(batch.query_starts, batch.query_starts[1:], strict=False)):
            blocks = batch.block_ids[batch.block_starts[row] : batch.block_starts[row + 1]]
            positions = batch.positions[start:end]
            self._cache[blocks[positions // BLOCK_SIZE], positions % BLOCK_SIZE] = batch.token_ids[start:end]
            wanted[int(end) - 1] = self._cache[blocks].reshape(-1)[: positions[-1] + 1]
        logits = np.tile(np.arange(VOCAB_SIZE, dtype=np.float32) / -1000, (len(batch.sample_rows), 1))
        for index, row in enumerate(batch.sample_rows.tolist()):
            logits[index, self._answer(wanted[row])] = 30
        self._result = sample(logits, batch.sampling)
        return self

    def wait(self) -> StepResult:
        return self._result

    def close(self) -> None:
        pass

    def _answer(self, context: Int32) -> int:
        starts = np.flatnonzero(context == MESSAGE_START)
        if len(starts) < 2:
            return self._next_letter.get(int(context[-1]), self._first_letter)
        message, said = (self._content(part) for part in (context[starts[-2] : starts[-1]], context[starts[-1] :]))
        rest = message[: message.index(MESSAGE_END)][len(said) :]
        return rest[0] if rest else END

    def _content(self, message: Int32) -> list[int]:
        tokens: list[int] = message.tolist()
        return tokens[tokens.index(self._newline) + 1 :]


def parrot_config(ceilings: Ceilings) -> EngineConfig:
    spec = DecoderSpec(
        architecture="Parrot",
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        layers=(LayerSpec(window=None, rope=0, moe=False),),
        ropes=(RopeSpec(rotary_dim=8, inv_freq=(1.0, 0.1, 0.01, 0.001)),),
        max_positions=ceilings.max_seq_len,
        norm_eps=1e-5,
        attention_scale=1.0,
    )
    return EngineConfig(
        model="parrot",
        target="cpu",
        fingerprint=Fingerprint(ENGINE_ABI, "parrot", "any", (), ()),
        spec=spec,
        precision="f32",
        overrides={},
        kv_dtype="f32",
        block_size=BLOCK_SIZE,
        ceilings=ceilings,
        eos_token_ids=(END,),
        has_tokenizer=True,
        source_digest="0123456789abcdef",
        files={},
        weight_bytes=0,
        kv_bytes_per_block=4 * BLOCK_SIZE,
        farrier_version="0",
    )
