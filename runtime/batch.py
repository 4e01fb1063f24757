"""From a schedule to the engine's `Batch`. Runs once a step, so it makes few arrays and none a row."""

from array import array
from itertools import accumulate

import numpy as np

from farrier.runtime.outputs import TokenLogprobs
from farrier.runtime.request import Sequence
from farrier.runtime.scheduler import Schedule
from farrier.targets.engine import Batch, Float32, Int32, RowLogprobs, SamplingArrays

_ALL_ALLOWED = 0xFFFFFFFF
_NO_IDS: Int32 = np.empty(0, np.int32)


class BatchPacker:
    """Packs schedules for a model of `vocab_size` tokens and KV blocks of `block_size` tokens.

    Remembers the sampling arrays that stay the same while the same sequences are sampled step after step.
    """

    def __init__(self, vocab_size: int, block_size: int) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size
        self._last: _Constants | None = None

    def pack(self, plan: Schedule) -> tuple[Batch, list[Sequence]]:
        """The batch, and the sequences it samples in the order of `Batch.sample_rows`."""
        tokens, blocks, num_blocks, computed = [], [], [], []
        sampled, sample_rows = [], []
        row = -1
        for sequence, count in zip(plan.sequences, plan.num_tokens, strict=True):
            end = sequence.num_scheduled
            start = end - count
            held = sequence.block_ids[: -(-end // self.block_size)]
            tokens.append(sequence.tokens[start:end])
            blocks.append(held)
            num_blocks.append(len(held))
            computed.append(start)
            row += count
            if end == len(sequence.tokens):
                sampled.append(sequence)
                sample_rows.append(row)
        counts = np.array(plan.num_tokens, np.int32)
        context_lens = np.array(computed, np.int32)
        query_starts = _starts(plan.num_tokens)
        offsets = np.repeat(context_lens - query_starts[:-1], counts)
        batch = Batch(
            token_ids=_concatenate(tokens),
            positions=np.arange(row + 1, dtype=np.int32) + offsets,
            query_starts=query_starts,
            context_lens=context_lens,
            block_ids=_concatenate(blocks),
            block_starts=_starts(num_blocks),
            sample_rows=np.array(sample_rows, np.int32),
            sampling=self._sampling(sampled),
        )
        return batch, sampled

    def _sampling(self, sampled: list[Sequence]) -> SamplingArrays:
        constants = self._last
        if constants is None or constants.sampled != sampled or constants.bias_will_change:
            constants = self._last = _Constants(sampled)
        history_ids, history_starts, output_starts = _NO_IDS, constants.zeros, constants.zeros[:-1]
        if constants.any_penalty:
            histories = [
                sequence.tokens if sequence.params.has_penalty else sequence.tokens[:0] for sequence in sampled
            ]
            history_ids, history_starts = _concatenate(histories), _starts([len(history) for history in histories])
            output_starts = history_starts[:-1] + constants.prompt_lens
        masks = None
        if constants.any_guide:
            masks = np.full((len(sampled), -(-self.vocab_size // 32)), _ALL_ALLOWED, np.uint32)
            for row, sequence in enumerate(sampled):
                if sequence.mask is not None:
                    masks[row] = sequence.mask
        return SamplingArrays(
            temperature=constants.temperature,
            top_k=constants.top_k,
            top_p=constants.top_p,
            min_p=constants.min_p,
            repetition_penalty=constants.repetition_penalty,
            presence_penalty=constants.presence_penalty,
            frequency_penalty=constants.frequency_penalty,
            seed=constants.seed,
            step=np.array([len(sequence.tokens) - sequence.num_prompt_tokens for sequence in sampled], np.uint64),
            num_logprobs=constants.num_logprobs,
            history_ids=history_ids,
            history_starts=history_starts,
            output_starts=output_starts,
            bias_ids=constants.bias_ids,
            bias_values=constants.bias_values,
            bias_starts=constants.bias_starts,
            masks=masks,
        )


class _Constants:
    """What does not change from step to step while the same sequences are sampled."""

    def __init__(self, sampled: list[Sequence]) -> None:
        params = [sequence.params for sequence in sampled]
        self.sampled = sampled
        self.temperature = np.array([p.temperature for p in params], np.float32)
        self.top_k = np.array([p.top_k for p in params], np.int32)
        self.top_p = np.array([p.top_p for p in params], np.float32)
        self.min_p = np.array([p.min_p for p in params], np.float32)
        self.repetition_penalty = np.array([p.repetition_penalty for p in params], np.float32)
        self.presence_penalty = np.array([p.presence_penalty for p in params], np.float32)
        self.frequency_penalty = np.array([p.frequency_penalty for p in params], np.float32)
        self.seed = np.array([sequence.seed for sequence in sampled], np.uint64)
        self.num_logprobs = np.array([-1 if p.logprobs is None else p.logprobs for p in params], np.int32)
        self.zeros: Int32 = np.zeros(len(sampled) + 1, np.int32)
        self.any_guide = any(sequence.guide is not None for sequence in sampled)
        self.any_penalty = any(sequence.params.has_penalty for sequence in sampled)
        self.prompt_lens = np.array([s.num_prompt_tokens if s.params.has_penalty else 0 for s in sampled], np.int32)
        self.bias_will_change = any(_is_below_min_tokens(sequence) for sequence in sampled)
        self.bias_ids, self.bias_values, self.bias_starts = _biases(sampled)


def _biases(sampled: list[Sequence]) -> tuple[Int32, Float32, Int32]:
    """Logit biases, where stop tokens weigh -inf as long as the output is shorter than `min_tokens`."""
    ids: list[int] = []
    values: list[float] = []
    starts = [0]
    for sequence in sampled:
        ids += sequence.params.logit_bias.keys()
        values += sequence.params.logit_bias.values()
        if _is_below_min_tokens(sequence):
            ids += sequence.stop_ids
            values += [-np.inf] * len(sequence.stop_ids)
        starts.append(len(ids))
    return np.array(ids, np.int32), np.array(values, np.float32), np.array(starts, np.int32)


def _is_below_min_tokens(sequence: Sequence) -> bool:
    return sequence.num_output_tokens < sequence.params.min_tokens


def _starts(lengths: list[int]) -> Int32:
    return np.array([0, *accumulate(lengths)], np.int32)


def _concatenate(arrays: "list[array[int]]") -> Int32:
    return np.frombuffer(bytearray().join(arrays), np.int32)


def token_logprobs(token_id: int, row: RowLogprobs) -> TokenLogprobs:
    return TokenLogprobs(token_id, row.sampled, list(zip(row.top_ids.tolist(), row.top_values.tolist(), strict=True)))
