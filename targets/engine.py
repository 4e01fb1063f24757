"""The engine contract: the only thing the runtime knows of a backend.

engine = load_engine(path)          # reads config.json, checks the fingerprint
engine.allocate(num_blocks)         # the paged KV pool
handle = engine.step(batch)         # enqueue one iteration
result = handle.wait()              # sampled tokens, logprobs
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from farrier.targets.decoder import DecoderSpec

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

KvDtype = Literal["f32", "bf16", "f16", "fp8", "u8"]

ENGINE_ABI = 2
"""Raised whenever an engine written by an older farrier would run differently, or not at all."""


@dataclass(frozen=True)
class Ceilings:
    """What an engine was built to hold. Hard: whatever exceeds them is refused, never truncated.

    `max_batch_size`: sequences in one step. `max_num_tokens`: tokens (rows) in one step.
    `max_seq_len`: prompt plus output of one sequence.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int


@dataclass(frozen=True)
class Fingerprint:
    """What must match for an engine to run here. Compared field by field, in order; see `first_mismatch`."""

    abi: int
    backend: str
    architecture: str
    """`x86_64`, `aarch64` for CPUs; `sm_90` and so on for GPUs."""
    features: tuple[str, ...]
    """Instruction sets or GPU features the engine's numerics or speed were decided for."""
    versions: tuple[tuple[str, str], ...]
    """(library, version) pairs, as far as they matter to this backend."""

    def first_mismatch(self, here: "Fingerprint") -> str | None:
        """The name of the first field in which an engine with this fingerprint does not fit `here`."""
        if self.abi != here.abi:
            return "abi"
        if self.backend != here.backend:
            return "backend"
        if self.architecture != here.architecture:
            return "architecture"
        if not set(self.features) <= set(here.features):
            return "features"
        for library, version in self.versions:
            if dict(here.versions).get(library) != version:
                return f"versions.{library}"
        return None


@dataclass(frozen=True)
class EngineConfig:
    """Everything that was decided at build time; `config.json` of an engine directory."""

    model: str
    """The name clients use for it."""
    target: str
    fingerprint: Fingerprint
    spec: DecoderSpec
    precision: str
    overrides: dict[str, str]
    kv_dtype: KvDtype
    block_size: int
    """Tokens in a KV block."""
    ceilings: Ceilings
    eos_token_ids: tuple[int, ...]
    has_tokenizer: bool
    source_digest: str
    """SHA-256 over the source model's files and the options of this build: equal means an identical engine."""
    files: dict[str, str]
    """File name → SHA-256 of every other file in the directory."""
    weight_bytes: int
    kv_bytes_per_block: int
    farrier_version: str
    deterministic: bool = False
    """Built so that a sequence's logits do not depend on what else is in the batch, to the bit."""
    default_sampling: dict[str, float | int | bool] = field(default_factory=dict)
    """The model's own `generation_config.json`; informative, applied only when asked."""


@dataclass(slots=True)
class SamplingArrays:
    """How to sample each of S rows; arrays are `[S]` unless said otherwise. Semantics: `farrier.targets.sampling`."""

    temperature: Float32
    """0 means greedy."""
    top_k: Int32
    """0 means all."""
    top_p: Float32
    min_p: Float32
    repetition_penalty: Float32
    presence_penalty: Float32
    frequency_penalty: Float32
    seed: npt.NDArray[np.uint64]
    step: npt.NDArray[np.uint64]
    """Index of the token being sampled in its sequence's output; with `seed` it alone decides the random draw."""
    num_logprobs: Int32
    """-1: none; n ≥ 0: the sampled token's and the n likeliest tokens' logprobs."""
    history_ids: Int32
    """Ragged `[sum]`: prompt tokens then output tokens of each row that has a penalty, else empty."""
    history_starts: Int32
    """`[S + 1]` into `history_ids`."""
    output_starts: Int32
    """`[S]` index into `history_ids` where the row's output tokens begin."""
    bias_ids: Int32
    """Ragged token ids of logit biases."""
    bias_values: Float32
    bias_starts: Int32
    """`[S + 1]` into `bias_ids`."""
    masks: npt.NDArray[np.uint32] | None
    """Allowed tokens as bits, `[S, ceil(vocab / 32)]`, little end first; None: everything is allowed."""

    @classmethod
    def greedy(cls, rows: int) -> "SamplingArrays":
        """The likeliest token of each of `rows` rows, nothing else."""
        zeros, ones = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        none, starts = np.zeros(0, np.int32), np.zeros(rows + 1, np.int32)
        counters = np.zeros(rows, np.uint64)
        return cls(
            temperature=zeros,
            top_k=starts[:-1],
            top_p=ones,
            min_p=zeros,
            repetition_penalty=ones,
            presence_penalty=zeros,
            frequency_penalty=zeros,
            seed=counters,
            step=counters,
            num_logprobs=np.full(rows, -1, np.int32),
            history_ids=none,
            history_starts=starts,
            output_starts=starts[:-1],
            bias_ids=none,
            bias_values=np.zeros(0, np.float32),
            bias_starts=starts,
            masks=None,
        )


@dataclass(slots=True)
class Batch:
    """One iteration, ragged and unpadded: T tokens of B sequences, S of whose rows are sampled.

    Prefill chunks and decodes mix freely. A negative token id `-1 - r` means "what row r of the previous
    step sampled", so that the host can schedule step n + 1 while the device runs n. The sequence is the one row r was
    sampled for, the position the next one. If that row offered no token, any may take its place: whatever is sampled
    after it is thrown away.
    """

    token_ids: Int32
    """`[T]`"""
    positions: Int32
    """`[T]`"""
    query_starts: Int32
    """`[B + 1]`: sequence b owns rows `query_starts[b] : query_starts[b + 1]`."""
    context_lens: Int32
    """`[B]`: tokens of the sequence that already are in the KV cache before this step."""
    block_ids: Int32
    """Ragged `[sum]`: KV blocks of each sequence in order, enough for context and new tokens."""
    block_starts: Int32
    """`[B + 1]` into `block_ids`."""
    sample_rows: Int32
    """`[S]`: rows (indices into T) whose next token is sampled; empty in a step of prefill chunks only."""
    sampling: SamplingArrays

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context_lens)


@dataclass(slots=True)
class RowLogprobs:
    """Natural logarithms of the model's own distribution (before bias, penalties and temperature)."""

    sampled: float
    top_ids: Int32
    """`[n]`, likeliest first."""
    top_values: Float32
    """`[n]`"""


@dataclass(slots=True)
class StepResult:
    """What one iteration produced, in the order of `Batch.sample_rows`."""

    token_ids: Int32
    """`[S]`; -1 for a row that offers no token: no finite logit, or everything masked."""
    logprobs: dict[int, RowLogprobs]
    """Row (index into S) → logprobs, for rows that asked."""


class StepHandle(Protocol):
    def wait(self) -> StepResult:
        """Blocks until the iteration is done. Call once, in the order of the steps."""
        ...


@dataclass(frozen=True)
class KvMemory:
    """How large a KV pool may be: bytes of one block, and how many blocks fit into the memory free now."""

    bytes_per_block: int
    max_blocks: int


class Engine(Protocol):
    """A loaded engine. Not thread-safe: one thread steps it."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def overlaps(self) -> bool:
        """Whether `step` returns while the device still computes, so that scheduling the next step meanwhile pays.

        Then a second step may be enqueued before the first one's handle was waited for, but never a third; it runs
        after the first. Otherwise each step is waited for before the next.
        """
        ...

    def memory(self) -> KvMemory: ...

    def allocate(self, num_blocks: int) -> None:
        """Creates the KV pool; must be called once, before the first step."""
        ...

    def step(self, batch: Batch) -> StepHandle:
        """Enqueues one iteration. Nobody changes the batch's arrays afterwards."""
        ...

    def close(self) -> None:
        """Frees the device; idempotent. After a failure, steps may still be under way."""
        ...


def load_engine(path: Path) -> Engine:
    """Loads the engine in directory `path`.

    Raises FingerprintMismatchError naming the first field that does not fit this machine, EngineError when the
    directory is not a whole engine.
    """
    from farrier.targets.loading import load  # a backend is imported only when one is needed

    return load(path)
