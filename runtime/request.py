"""A request inside the runtime: `Sequence`, the state of one of its outputs, and what it needs of text."""

from array import array
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from farrier.runtime.sampling_params import SamplingParams


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


Prompt = str | TokensPrompt


class Detokenizer(Protocol):
    """Turns one output's tokens into text as they arrive."""

    @property
    def stopped_by(self) -> str | None:
        """The stop string that matched, else None. Text after it, and itself unless
        `include_stop_str_in_output`, is dropped."""
        ...

    def append(self, token_ids: list[int]) -> str:
        """The text these tokens complete. Holds back half characters, and what may become a stop string.
        A stop string only counts when it ends after the first `min_tokens` tokens."""
        ...

    def finish(self) -> str:
        """The text that was held back. Called once, and not after a stop string matched."""
        ...


class Guide(Protocol):
    """Constrains one output to a grammar."""

    @property
    def is_finished(self) -> bool:
        """The grammar is complete and nothing may follow."""
        ...

    def fill_mask(self, row: npt.NDArray[np.uint32]) -> None:
        """Writes the tokens allowed next as bits, little end first, `[ceil(vocab / 32)]`."""
        ...

    def accept(self, token_id: int) -> None:
        """`token_id` was sampled."""
        ...


class Sequence:
    """One output of a request: its tokens, how far their KV is computed, and which blocks hold it.

    There is no prefill or decode phase: `num_computed` catches up with `len(tokens)`, and a token is sampled
    whenever it does. `tokens` and `block_ids` are int32 arrays so that packing a batch is a few memory copies.
    """

    __slots__ = (
        "block_ids",
        "detokenizer",
        "followers",
        "guide",
        "index",
        "is_finished",
        "mask",
        "max_len",
        "num_cached_tokens",
        "num_computed",
        "num_prompt_tokens",
        "num_published",
        "order",
        "params",
        "prefix_id",
        "request_id",
        "seed",
        "stop_ids",
        "tokens",
        "was_started",
    )

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_len: int,
        seed: int,
        eos_token_ids: tuple[int, ...] = (),
        detokenizer: Detokenizer | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.tokens = array("i", prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_len = max_len
        """Prompt plus output tokens at which it ends."""
        self.seed = seed
        eos = () if params.ignore_eos else eos_token_ids
        self.stop_ids = frozenset(eos) | frozenset(params.stop_token_ids)
        self.detokenizer = detokenizer
        self.guide = guide
        self.mask: npt.NDArray[np.uint32] | None = None
        """Tokens allowed next, when there is a guide."""

        self.order = (params.priority, 0, index)
        """Who goes first: priority, arrival, index. The scheduler fills in the arrival."""
        self.num_computed = 0
        self.block_ids = array("i")
        self.num_published = 0
        """Leading blocks that other sequences may share."""
        self.prefix_id = 0
        """Stands for everything in the first `num_published` blocks; see BlockPool."""
        self.num_cached_tokens = 0
        self.was_started = False
        self.is_finished = False
        self.followers: list[Sequence] = []
        """The request's other outputs, which start once this one has computed the prompt they share."""

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens
