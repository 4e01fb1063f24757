"""From a prompt and its parameters to sequences, or a RequestError that names the field which cannot be honoured."""

from secrets import randbits
from typing import TYPE_CHECKING

from farrier.runtime.request import Prompt, Sequence
from farrier.runtime.sampling_params import SamplingParams
from farrier.targets.engine import EngineConfig
from farrier.targets.errors import RequestError

if TYPE_CHECKING:
    from farrier.runtime.tokenizer import Tokenizer

_MASK64 = 2**64 - 1


class Intake:
    """Knows what the engine, its tokenizer (None: token ids only) and a KV pool of `num_blocks` can honour."""

    def __init__(self, config: EngineConfig, tokenizer: "Tokenizer | None", num_blocks: int) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.num_pool_tokens = num_blocks * config.block_size

    def sequences(self, request_id: str, prompt: Prompt, params: SamplingParams) -> list[Sequence]:
        """The `n` outputs of a request, ready for the core. Nothing is started."""
        if self.tokenizer is None:
            self._check_needs_no_text(params)
        token_ids = self._token_ids(prompt)
        self._check_token_ids(params)
        max_len = self._max_len(len(token_ids), params)
        seed = randbits(64) if params.seed is None else params.seed
        sequences = []
        for index in range(params.n):
            sequence = Sequence(
                request_id,
                index,
                token_ids,
                params,
                max_len=max_len,
                seed=derive_seed(seed, index),
                eos_token_ids=self.config.eos_token_ids,
            )
            if self.tokenizer is not None:
                sequence.detokenizer = self.tokenizer.detokenizer(token_ids, params)
                if params.guided is not None:
                    sequence.guide = self.tokenizer.guide(
                        params.guided, self.config.eos_token_ids, self.config.spec.vocab_size
                    )
                    sequence.update_mask(self.config.spec.vocab_size)
            sequences.append(sequence)
        return sequences

    def _check_needs_no_text(self, params: SamplingParams) -> None:
        for name in ("stop", "guided"):
            if getattr(params, name):
                raise RequestError(
                    f"{name} needs a tokenizer, but this engine was built without one; use token ids.", param=name
                )

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "A text prompt needs a tokenizer, but this engine was built without one; give prompt_token_ids.",
                    param="prompt",
                )
            token_ids = self.tokenizer.encode(prompt)
        else:
            token_ids = prompt["prompt_token_ids"]
        if not token_ids:
            raise RequestError("The prompt is empty; it needs at least one token.", param="prompt")
        self._check_in_vocabulary(token_ids, "prompt")
        return token_ids

    def _check_token_ids(self, params: SamplingParams) -> None:
        self._check_in_vocabulary(list(params.logit_bias), "logit_bias")
        self._check_in_vocabulary(list(params.stop_token_ids), "stop_token_ids")

    def _check_in_vocabulary(self, token_ids: list[int], param: str) -> None:
        vocab_size = self.config.spec.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            unknown = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
            raise RequestError(
                f"{param} holds token id {unknown}, but the model's ids go from 0 to {vocab_size - 1}.", param=param
            )

    def _max_len(self, prompt_len: int, params: SamplingParams) -> int:
        """Prompt plus output tokens at which an output ends."""
        limit = self.config.ceilings.max_seq_len
        reason = f"the engine was built for max_seq_len {limit}"
        if self.num_pool_tokens < limit:
            limit = self.num_pool_tokens
            reason = f"the KV cache holds {limit} tokens"
        if prompt_len >= limit:
            raise RequestError(
                f"The prompt has {prompt_len} tokens, but may have at most {limit - 1} to leave room for an output: "
                f"{reason}; shorten it.",
                param="prompt",
                code="context_length_exceeded",
            )
        room = limit - prompt_len
        for name in ("max_tokens", "min_tokens"):
            asked = getattr(params, name)
            if asked is not None and asked > room:
                raise RequestError(
                    f"{name} is {asked}, but a prompt of {prompt_len} tokens leaves room for {room}: {reason}; "
                    f"lower {name} or shorten the prompt.",
                    param=name,
                    code="context_length_exceeded",
                )
        return limit if params.max_tokens is None else prompt_len + params.max_tokens


def derive_seed(seed: int, index: int) -> int:
    """The seed of a request's output `index`: output 0 has the request's own."""
    return (seed + index * 0x9E3779B97F4A7C15) & _MASK64
