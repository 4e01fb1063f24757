"""Rotary scaling: from the parameters in a Hugging Face config to a `RopeSpec` with all scaling applied."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from farrier.targets.decoder import RopeKind, RopeSpec
from farrier.targets.hf_settings import Settings

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RopeParameters:
    """The rope settings of one config. `max_positions` is its `max_position_embeddings`."""

    settings: Settings
    kind: RopeKind
    rotary_dim: int
    max_positions: int

    @property
    def base(self) -> float:
        base = self.settings.number("rope_theta")
        if base <= 1:
            raise self.settings.bad("rope_theta", "greater than 1")
        return base

    @property
    def original_positions(self) -> int:
        """Context length of the training before the scaling."""
        positions = self.settings.integer("original_max_position_embeddings", self.max_positions)
        if positions < 2:
            raise self.settings.bad("original_max_position_embeddings", "at least 2")
        return positions

    @property
    def factor(self) -> float:
        if self.kind in ("yarn", "longrope"):
            return self.settings.number("factor", self.max_positions / self.original_positions)
        return self.settings.number("factor")

    def longest_sequence(self, max_seq_len: int | None) -> int:
        """Positions the rope serves: yarn extends what the config says; the short factors of longrope, taken when
        no sequence will be longer than the original context, end there."""
        if self.kind == "yarn":
            return max(self.max_positions, int(self.original_positions * self.factor))
        if self.kind == "longrope" and max_seq_len is not None and max_seq_len <= self.original_positions:
            return min(self.original_positions, self.max_positions)
        return self.max_positions

    def spec(self, max_seq_len: int) -> RopeSpec:
        """The rope for sequences of up to `max_seq_len` tokens."""
        frequencies = self.base ** (-np.arange(0, self.rotary_dim, 2, dtype=np.float64) / self.rotary_dim)
        scaled, attention_factor = _SCALINGS[self.kind](self, frequencies, max_seq_len)
        self.settings.refuse_unasked(("type", "rope_type", "partial_rotary_factor", "original_max_position_embeddings"))
        return RopeSpec(self.rotary_dim, tuple(scaled.astype(np.float32).tolist()), attention_factor)


def _default(rope: RopeParameters, frequencies: Float64, max_seq_len: int) -> tuple[Float64, float]:
    return frequencies, 1.0


def _linear(rope: RopeParameters, frequencies: Float64, max_seq_len: int) -> tuple[Float64, float]:
    return frequencies / rope.factor, 1.0


def _llama3(rope: RopeParameters, frequencies: Float64, max_seq_len: int) -> tuple[Float64, float]:
    low, high = rope.settings.number("low_freq_factor"), rope.settings.number("high_freq_factor")
    if high <= low:
        raise rope.settings.bad("high_freq_factor", f"greater than low_freq_factor, which is {low}")
    turns = rope.original_positions * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies, 1.0


def _yarn(rope: RopeParameters, frequencies: Float64, max_seq_len: int) -> tuple[Float64, float]:
    pairs = len(frequencies)

    def correction_dim(rotations: float) -> float:
        return pairs * math.log(rope.original_positions / (rotations * 2 * math.pi)) / math.log(rope.base)

    low = correction_dim(rope.settings.number("beta_fast", 32.0))
    high = correction_dim(rope.settings.number("beta_slow", 1.0))
    if rope.settings.raw("truncate") is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    span = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(pairs) - low) / span, 0.0, 1.0)
    scaled = frequencies / rope.factor * interpolated + frequencies * (1 - interpolated)
    return scaled, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeParameters) -> float:
    stated = rope.settings.optional_number("attention_factor")
    mscale, mscale_all_dim = (rope.settings.optional_number(key) for key in ("mscale", "mscale_all_dim"))
    if stated is not None:
        return stated

    def magnitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if mscale is not None and mscale_all_dim is not None:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


def _longrope(rope: RopeParameters, frequencies: Float64, max_seq_len: int) -> tuple[Float64, float]:
    original = rope.original_positions
    attention_factor = rope.settings.optional_number("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))
    long, short = (rope.settings.numbers(key, len(frequencies)) for key in ("long_factor", "short_factor"))
    return frequencies / np.asarray(long if max_seq_len > original else short), attention_factor


_SCALINGS: dict[RopeKind, Callable[[RopeParameters, Float64, int], tuple[Float64, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
