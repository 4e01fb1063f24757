"""Which precision each tensor of a checkpoint gets."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, get_args

from farrier.targets.decoder import DecoderSpec, is_projection
from farrier.targets.errors import BuildError

Precision = Literal["auto", "f32", "bf16", "f16", "int8", "int4", "fp8"]
"""`auto` is the type of the source, or how it is quantized."""

_QUANTIZED = ("int8", "int4", "fp8")


def precisions(spec: DecoderSpec, precision: str, overrides: Mapping[str, str]) -> dict[str, Precision]:
    """Canonical name → precision, for every weight and, with tied embeddings too, `lm_head.weight`.

    Quantization is for the weights of matrix products; what remains keeps the type of the source. Under int4 and fp8
    the output layer, whose errors go straight into the logits, gets int8: that takes no more room than fp8 and is off
    by a quarter as much (measured on the demo model's logits). In a model that is quantized already, `auto` keeps each
    matrix as it is.

    `overrides` are patterns (`*` matches any characters, dots too) on canonical names without `.weight`, such as
    `lm_head`, `layers.0.*`, `layers.*.down`; later ones win. Raises BuildError naming an override that changes nothing
    or a precision that does not exist.
    """
    names = list(dict.fromkeys([*spec.tensors(), "lm_head.weight"]))
    chosen = {name: _default(name, _known(precision)) for name in names}
    for pattern, wanted in overrides.items():
        kind = _known(wanted)
        matches = [name for name in names if fnmatchcase(name.removesuffix(".weight"), pattern)]
        if kind in _QUANTIZED:
            matches = [name for name in matches if is_projection(name)]
        if not matches:
            what = "weight of a matrix product" if kind in _QUANTIZED else "tensor"
            raise BuildError(f"the override {pattern}={wanted} matches no {what} of the model, such as layers.0.down")
        chosen.update(dict.fromkeys(matches, kind))
    return chosen


def _default(name: str, precision: Precision) -> Precision:
    if precision not in _QUANTIZED:
        return precision
    if not is_projection(name):
        return "auto"
    return "int8" if name == "lm_head.weight" else precision


def _known(precision: str) -> Precision:
    for known in get_args(Precision):
        if precision == known:
            return known  # type: ignore[no-any-return]
    raise BuildError(f"the precision '{precision}' does not exist; choose one of {', '.join(get_args(Precision))}")
