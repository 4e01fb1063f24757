"""A request inside the runtime: `Sequence`, the state of one of its outputs, and what it needs of text."""

from array import array
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt

from farrier.runtime.block_pool import ROOT
from farrier.runtime.sampling_params import SamplingParams
from farrier.targets.errors import RequestError


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

    There is no prefill or decode phase: `num_scheduled` catches up with `len(tokens)`, and a token is sampled
    whenever it does. Until the host knows that token, a negative one stands for it in `tokens`: the reference by
    which the next batch can already use it. Only the last token of a sequence can be unknown to a schedule.
    `tokens` and `block_ids` are int32 arrays so that packing a batch is a few memory copies.
    """

    __slots__ = (
        "block_ids",
        "detokenizer",
        "followers",
        "guide",
        "index",
        "is_finished",
        "is_running",
        "mask",
        "max_len",
        "num_cached_tokens",
        "num_computed",
        "num_prompt_tokens",
        "num_published",
        "num_scheduled",
        "order",
        "params",
        "prefix_id",
        "request_id",
        "root",
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
        """Tokens allowed next, as bits, when there is a guide."""

        self.order = (params.priority, 0, index)
        """Who goes first: priority, arrival, index. The scheduler fills in the arrival."""
        self.is_running = False
        """Holds blocks."""
        self.is_finished = False
        self.num_scheduled = 0
        """Leading tokens that are computed, or will be by the steps under way."""
        self.num_computed = 0
        """Leading tokens whose KV exists: the steps that compute them are over. All of them are known."""
        self.block_ids = array("i")
        self.num_published = 0
        """Leading blocks that other sequences may share."""
        self.root = self.prefix_id = ROOT
        """Prefix ids (see BlockPool) of the empty prefix and of what the published blocks hold."""
        self.num_cached_tokens = 0
        """Prompt tokens found in the prefix cache at its first start."""
        self.was_started = False
        self.followers: list[Sequence] = []
        """The request's other outputs, which start once this one has computed the prompt they share."""

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def is_under_way(self) -> bool:
        """A step that computes it is not over: its blocks are being read and written."""
        return self.num_scheduled != self.num_computed

    @property
    def must_know_last_token(self) -> bool:
        """Its last token is not known yet, and sampling the next one depends on the host knowing it: the guide has to
        see it, or penalties are due for it."""
        return self.tokens[-1] < 0 and (self.guide is not None or self.params.has_penalty)

    def expect_token(self, row: int) -> None:
        """A step samples its next token, in this row of its samples."""
        self.tokens.append(-1 - row)

    def set_token(self, token_id: int) -> None:
        """What the step that ended last sampled."""
        self.tokens[self.num_computed] = token_id

    def update_mask(self, vocab_size: int) -> None:
        """Asks the guide which tokens may come next. Raises RequestError when none may."""
        if self.guide is None:
            return
        if self.mask is None:
            self.mask = np.zeros(-(-vocab_size // 32), np.uint32)
        self.guide.fill_mask(self.mask)
        if self.num_output_tokens < self.params.min_tokens:
            for token_id in self.stop_ids:
                self.mask[token_id >> 5] &= np.uint32(0xFFFFFFFF ^ (1 << (token_id & 31)))
        if not self.mask.any():
            raise RequestError(
                "The guided output can go on with no token; check its grammar and min_tokens.", param="guided"
            )
