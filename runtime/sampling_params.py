"""What a caller may ask of one request's sampling."""

from dataclasses import dataclass, field

from farrier.targets.errors import RequestError

MAX_LOGPROBS = 20
MAX_BIASES = 512
"""Tokens a request may weigh, and stop at: engines keep room for so many."""


@dataclass(frozen=True)
class GuidedDecoding:
    """Constrains the output; exactly one field is set. `grammar` is a Lark grammar, `json_schema` a JSON schema."""

    json_schema: dict[str, object] | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        given = [
            self.json_schema is not None,
            self.json_object,
            self.regex is not None,
            self.grammar is not None,
            self.choice is not None,
        ]
        if sum(given) != 1:
            raise RequestError(
                "Give exactly one of json_schema, json_object, regex, grammar or choice.", param="guided"
            )
        if self.choice is not None and not self.choice:
            raise RequestError("A choice needs at least one alternative.", param="guided_choice")


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request. Defaults are the OpenAI API's where it has the field.

    temperature: 0 is greedy. top_k: 0 means all. seed: equal seeds give equal outputs whatever else is in the
    batch; None draws one. max_tokens: None means up to the engine's `max_seq_len`. stop: strings that end the
    output and are left out of it. logprobs: None, or how many likeliest alternatives to report (0: only the
    sampled token). priority: lower runs earlier. Raises RequestError naming the field that is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    guided: GuidedDecoding | None = None
    priority: int = 0
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        self._check(1 <= self.n <= 128, "n", "between 1 and 128")
        self._check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        self._check(self.top_k >= 0, "top_k", "0 (all) or more")
        self._check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        self._check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        self._check(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0 and at most 100")
        self._check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        self._check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        self._check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "1 or more")
        self._check(self.min_tokens >= 0, "min_tokens", "0 or more")
        self._check(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens")
        self._check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            f"between 0 and {MAX_LOGPROBS}",
        )
        self._check(all(self.stop), "stop", "without empty strings")
        self._check(
            all(-100.0 <= bias <= 100.0 for bias in self.logit_bias.values()),
            "logit_bias",
            "between -100 and 100",
        )
        self._check(len(self.logit_bias) <= MAX_BIASES, "logit_bias", f"of {MAX_BIASES} tokens at most")
        self._check(len(self.stop_token_ids) <= MAX_BIASES, "stop_token_ids", f"at most {MAX_BIASES}")
        self._check(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "a 64-bit integer")

    @property
    def has_penalty(self) -> bool:
        """Whether the tokens so far weigh on the next one."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _check(self, ok: bool, name: str, must_be: str) -> None:
        if not ok:
            raise RequestError(f"{name} must be {must_be}, but it is {getattr(self, name)!r}.", param=name)
