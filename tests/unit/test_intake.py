"""What is refused before anything runs, and how the refusal names the field."""

from typing import Any

import pytest

from farrier.runtime.intake import Intake, derive_seed
from farrier.runtime.request import Prompt
from farrier.runtime.sampling_params import GuidedDecoding, SamplingParams
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.errors import RequestError
from tests.reference_engine import reference_config

TOKENS: Prompt = {"prompt_token_ids": [1, 2, 3, 4]}


def refused(prompt: Prompt, num_blocks: int = 100, **params: Any) -> RequestError:
    intake = Intake(reference_config(vocab_size=50, block_size=4, max_seq_len=20), None, num_blocks)
    with pytest.raises(RequestError) as caught:
        intake.sequences("r", prompt, SamplingParams(**params))
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "params", "param", "sentence"),
    [
        ("text", {}, "prompt", "A text prompt needs a tokenizer, but this engine was built without one"),
        ({"prompt_token_ids": []}, {}, "prompt", "The prompt is empty"),
        ({"prompt_token_ids": [3, 50]}, {}, "prompt", "prompt holds token id 50, but the model's ids go from 0 to 49"),
        ({"prompt_token_ids": [-1]}, {}, "prompt", "prompt holds token id -1"),
        (TOKENS, {"logit_bias": {77: 1.0}}, "logit_bias", "logit_bias holds token id 77"),
        (TOKENS, {"stop_token_ids": (99,)}, "stop_token_ids", "stop_token_ids holds token id 99"),
        (TOKENS, {"stop": "x"}, "stop", "stop needs a tokenizer"),
        (TOKENS, {"guided": GuidedDecoding(json_object=True)}, "guided", "guided needs a tokenizer"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    prompt: Prompt, params: dict[str, Any], param: str, sentence: str
) -> None:
    error = refused(prompt, **params)
    assert error.param == param
    assert sentence in str(error)


def test_what_is_too_long_is_refused_by_name() -> None:
    error = refused({"prompt_token_ids": [1] * 20}, max_tokens=1)
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert "has 20 tokens" in str(error)
    assert "max_seq_len 20" in str(error)
    error = refused(TOKENS, max_tokens=17)
    assert (error.param, error.code) == ("max_tokens", "context_length_exceeded")
    assert "leaves room for 16: the engine was built for max_seq_len 20" in str(error)
    error = refused(TOKENS, max_tokens=None, min_tokens=17)
    assert error.param == "min_tokens"
    error = refused(TOKENS, num_blocks=3, max_tokens=9)
    assert error.param == "max_tokens"
    assert "leaves room for 8: the KV cache holds 12 tokens" in str(error)


def test_max_len() -> None:
    config = reference_config(block_size=4, max_seq_len=20)
    sequences = Intake(config, None, 100).sequences("r", TOKENS, SamplingParams(max_tokens=16))
    assert sequences[0].max_len == 20
    assert Intake(config, None, 100).sequences("r", TOKENS, SamplingParams(max_tokens=None))[0].max_len == 20
    assert Intake(config, None, 4).sequences("r", TOKENS, SamplingParams(max_tokens=None))[0].max_len == 16


def test_each_output_has_its_own_seed() -> None:
    intake = Intake(reference_config(), None, 100)
    seeds = [sequence.seed for sequence in intake.sequences("r", TOKENS, SamplingParams(n=3, seed=-5))]
    assert seeds == [derive_seed(-5, index) for index in range(3)]
    assert len(set(seeds)) == 3
    assert seeds[0] == 2**64 - 5
    drawn = {intake.sequences("r", TOKENS, SamplingParams())[0].seed for _ in range(10)}
    assert len(drawn) == 10


def test_text_becomes_tokens_and_guides_know_their_first_mask(byte_level: Tokenizer) -> None:
    eos = byte_level.eos_token_id
    assert eos is not None
    config = reference_config(vocab_size=byte_level.vocab_size, max_seq_len=200, eos_token_ids=(eos,))
    intake = Intake(config, byte_level, 100)
    guided = SamplingParams(n=2, guided=GuidedDecoding(choice=("yes", "no")))
    sequences = intake.sequences("r", "hello", guided)
    assert sequences[0].tokens.tolist() == byte_level.encode("hello")
    assert sequences[0].guide is not sequences[1].guide
    assert sequences[0].detokenizer is not sequences[1].detokenizer
    mask = sequences[0].mask
    assert mask is not None
    allowed = [token for token in range(byte_level.vocab_size) if mask[token >> 5] >> (token & 31) & 1]
    assert {byte_level.token_text(token)[0] for token in allowed} == {"y", "n"}
    with pytest.raises(RequestError, match="guided_regex"):
        intake.sequences("r", "hello", SamplingParams(guided=GuidedDecoding(regex="(")))
    with pytest.raises(RequestError, match="can go on with no token"):
        # Only the end may follow, and min_tokens forbids it.
        intake.sequences("r", "hello", SamplingParams(min_tokens=1, guided=GuidedDecoding(regex="")))
