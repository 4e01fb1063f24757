"""What a schedule becomes for the engine."""

import numpy as np

from farrier.runtime.batch import BatchPacker, token_logprobs
from farrier.runtime.outputs import TokenLogprobs
from farrier.runtime.request import Sequence
from farrier.runtime.sampling_params import SamplingParams
from farrier.runtime.scheduler import Schedule
from farrier.targets.engine import RowLogprobs
from tests.reference_engine import check_sampling_shapes

BLOCK_SIZE = 4


def sequence(
    prompt: list[int], output: list[int], computed: int, blocks: list[int], params: SamplingParams
) -> Sequence:
    made = Sequence("r", 0, prompt, params, max_len=100, seed=7, eos_token_ids=(1, 2))
    made.tokens.extend(output)
    made.num_computed = computed
    made.block_ids.extend(blocks)
    return made


def schedule(sequences: list[Sequence], num_tokens: list[int]) -> Schedule:
    for each, count in zip(sequences, num_tokens, strict=True):
        each.num_scheduled = each.num_computed + count
    return Schedule(sequences, num_tokens)


def test_prefill_chunks_and_decodes_mix() -> None:
    plain = SamplingParams()
    decode = sequence([10, 11, 12], [13, 14], 4, [5, 6], plain)
    first_chunk = sequence(list(range(20, 32)), [], 0, [1, 2, 3], plain)
    last_chunk = sequence(list(range(40, 49)), [], 6, [9, 8, 7], plain)
    plan = schedule([decode, first_chunk, last_chunk], [1, 6, 3])
    batch, sampled = BatchPacker(50, BLOCK_SIZE).pack(plan)
    assert batch.token_ids.tolist() == [14, 20, 21, 22, 23, 24, 25, 46, 47, 48]
    assert batch.positions.tolist() == [4, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.query_starts.tolist() == [0, 1, 7, 10]
    assert batch.context_lens.tolist() == [4, 0, 6]
    assert batch.block_ids.tolist() == [5, 6, 1, 2, 9, 8, 7], "as many blocks as context and new tokens fill"
    assert batch.block_starts.tolist() == [0, 2, 4, 7]
    assert batch.sample_rows.tolist() == [0, 9]
    assert sampled == [decode, last_chunk]
    assert batch.sampling.step.tolist() == [2, 0]
    for name in ("token_ids", "positions", "query_starts", "context_lens", "block_ids", "block_starts", "sample_rows"):
        assert getattr(batch, name).dtype == np.int32, name
    check_sampling_shapes(batch.sampling, 2)


def test_a_token_that_is_not_known_yet_is_a_reference_to_its_sample() -> None:
    patient = SamplingParams(min_tokens=3, stop_token_ids=(9,))
    ahead, other = sequence([10, 11], [12], 2, [5], patient), sequence([20], [], 0, [6], SamplingParams())
    packer = BatchPacker(50, BLOCK_SIZE)
    _, sampled = packer.pack(schedule([other, ahead], [1, 1]))
    for row, each in enumerate(sampled):
        each.expect_token(row)
    ahead.num_scheduled += 1  # while the first step is under way
    batch, sampled = packer.pack(Schedule([ahead], [1]))
    assert (batch.token_ids.tolist(), batch.positions.tolist(), batch.context_lens.tolist()) == ([-2], [3], [3])
    assert sampled == [ahead]
    assert batch.sampling.step.tolist() == [2], "counted as if the token were known"
    assert sorted(batch.sampling.bias_ids.tolist()) == [1, 2, 9]


def test_a_step_may_sample_nothing() -> None:
    chunk = sequence(list(range(12)), [], 0, [1, 2, 3], SamplingParams())
    batch, sampled = BatchPacker(50, BLOCK_SIZE).pack(schedule([chunk], [5]))
    assert sampled == []
    assert batch.sample_rows.shape == (0,)
    check_sampling_shapes(batch.sampling, 0)


def test_sampling_arrays_say_what_was_asked() -> None:
    params = SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.05,
        presence_penalty=0.5,
        logit_bias={4: 1.5, 9: -100.0},
        logprobs=2,
    )
    picky = sequence([3, 4], [5, 6, 7], 4, [0, 1], params)
    plain = sequence([8, 9], [], 1, [2], SamplingParams(temperature=0))
    batch, _ = BatchPacker(50, BLOCK_SIZE).pack(schedule([plain, picky], [1, 1]))
    arrays = batch.sampling
    assert arrays.temperature.tolist() == [0, 0.5]
    assert arrays.top_k.tolist() == [0, 3]
    assert arrays.top_p.tolist() == [1, np.float32(0.9)]
    assert arrays.min_p.tolist() == [0, np.float32(0.05)]
    assert arrays.num_logprobs.tolist() == [-1, 2]
    assert arrays.presence_penalty.tolist() == [0, 0.5]
    assert arrays.seed.tolist() == [7, 7]
    assert arrays.step.tolist() == [0, 3]
    assert arrays.history_ids.tolist() == [3, 4, 5, 6, 7], "only rows with a penalty need theirs"
    assert arrays.history_starts.tolist() == [0, 0, 5]
    assert arrays.output_starts.tolist() == [0, 2]
    assert arrays.bias_ids.tolist() == [4, 9]
    assert arrays.bias_values.tolist() == [1.5, -100]
    assert arrays.bias_starts.tolist() == [0, 0, 2]
    assert arrays.masks is None


def test_stop_tokens_are_forbidden_below_min_tokens() -> None:
    packer = BatchPacker(50, BLOCK_SIZE)
    patient = sequence([3], [5], 1, [0], SamplingParams(min_tokens=2, stop_token_ids=(9,), logit_bias={1: 3.0}))
    forbidding = packer.pack(schedule([patient], [1]))[0].sampling
    bias = list(zip(forbidding.bias_ids.tolist(), forbidding.bias_values.tolist(), strict=True))
    assert sorted(bias) == [(1, -np.inf), (1, 3.0), (2, -np.inf), (9, -np.inf)]
    patient.tokens.append(6)
    patient.num_computed = 2
    allowing = packer.pack(schedule([patient], [1]))[0].sampling
    assert allowing.bias_ids.tolist() == [1]


def test_constant_arrays_are_kept_while_the_same_sequences_are_sampled() -> None:
    packer = BatchPacker(50, BLOCK_SIZE)
    a, b = (sequence([3, 4], [], 1, [block], SamplingParams(temperature=block)) for block in (1, 2))
    first = packer.pack(schedule([a, b], [1, 1]))[0].sampling
    for each in (a, b):
        each.tokens.append(5)
        each.num_computed += 1
    second = packer.pack(schedule([a, b], [1, 1]))[0].sampling
    assert second.temperature is first.temperature
    assert (first.step.tolist(), second.step.tolist()) == ([0, 0], [1, 1])
    swapped = packer.pack(schedule([b, a], [1, 1]))[0].sampling
    assert swapped.temperature.tolist() == [2, 1]


def test_masks_let_unguided_rows_have_everything() -> None:
    class Everything:
        is_finished = False

        def fill_mask(self, row: np.ndarray) -> None:
            row[:] = [0xFFFFFFFF, 0b101]

        def accept(self, token_id: int) -> None: ...

    guided = sequence([3, 4], [], 1, [1], SamplingParams())
    guided.guide = Everything()
    guided.update_mask(40)
    plain = sequence([3, 4], [], 1, [2], SamplingParams())
    masks = BatchPacker(40, BLOCK_SIZE).pack(schedule([plain, guided], [1, 1]))[0].sampling.masks
    assert masks is not None
    assert masks.dtype == np.uint32
    assert masks.tolist() == [[0xFFFFFFFF, 0xFFFFFFFF], [0xFFFFFFFF, 0b101]]


def test_packed_arrays_do_not_alias_the_sequence() -> None:
    decode = sequence([10, 11, 12], [13], 3, [5], SamplingParams(repetition_penalty=2.0))
    batch, _ = BatchPacker(50, BLOCK_SIZE).pack(schedule([decode], [1]))
    decode.tokens.append(14)  # an array that still exports its buffer could not grow
    decode.block_ids.append(6)
    assert batch.sampling.history_ids.tolist() == [10, 11, 12, 13]
    assert batch.token_ids.flags.writeable


def test_token_logprobs() -> None:
    row = RowLogprobs(-1.5, np.array([4, 2], np.int32), np.array([-0.5, -1.5], np.float32))
    assert token_logprobs(2, row) == TokenLogprobs(2, -1.5, [(4, -0.5), (2, -1.5)])
