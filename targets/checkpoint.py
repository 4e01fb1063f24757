"""The unified checkpoint: `config.json` + `rank0.safetensors` with canonical names + `tokenizer/`.

A weight `X.weight` that is quantized has its scales beside it as `X.scale`, and its zero points, if it has any, as
`X.zero` (see `farrier.targets.quantize`).
With tied embeddings `lm_head.weight` is stored only where it differs from the table in how it is stored.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from farrier.targets.decoder import DecoderSpec, is_projection
from farrier.targets.errors import CheckpointError
from farrier.targets.quantize import Quantization, dequantize
from farrier.targets.safetensors_file import DTYPE_SIZES
from farrier.targets.tensorfile import Tensor, TensorFile, to_float32

FORMAT_VERSION = 1
"""Raised whenever older checkpoints would be read wrongly, or the same conversion would give other weights."""

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "rank0.safetensors"
TOKENIZER_DIR = "tokenizer"

StoredDtype = Literal["f32", "bf16", "f16", "int8", "int4", "fp8"]
"""How a tensor is stored: bf16 as bits in uint16, fp8 as bits in uint8, int4 as two in a uint8."""

FLOATS: dict[str, StoredDtype] = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
"""safetensors' name of a type → ours."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Parallelism:
    """Over how many ranks the weights are spread: tensor, pipeline, expert parallel."""

    tp: int = 1
    pp: int = 1
    ep: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    """`config.json` of a unified checkpoint: all that decides what its weights are."""

    format_version: int
    model: str
    """The source's name."""
    spec: DecoderSpec
    precision: str
    overrides: tuple[tuple[str, str], ...]
    """(pattern, precision) as asked for, in order."""
    quantization: dict[str, Quantization]
    """Canonical name → how it is quantized; all others are floating-point."""
    parallelism: Parallelism
    sources: dict[str, str]
    """File name → SHA-256 of every file of the source model that went in."""
    eos_token_ids: tuple[int, ...]


CONFIG = TypeAdapter(CheckpointConfig)


def read_config(path: Path) -> CheckpointConfig:
    """Reads the config of the checkpoint in directory `path`. Raises CheckpointError unless there is one."""
    try:
        config = CONFIG.validate_json((path / CONFIG_FILE).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} is not a farrier checkpoint: cannot read its {CONFIG_FILE}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise CheckpointError(f"{path / CONFIG_FILE} is not a farrier checkpoint's: {where}: {first['msg']}") from error
    if config.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of format {config.format_version}, this farrier reads format {FORMAT_VERSION};"
            " convert the model again"
        )
    return config


def scale_name(name: str) -> str:
    return name.removesuffix(".weight") + ".scale"


def zero_name(name: str) -> str:
    return name.removesuffix(".weight") + ".zero"


def stored_tensors(
    name: str, shape: tuple[int, ...], stored: Quantization | str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → safetensors dtype and shape of what a weight is stored as; `stored`: quantized so, or of that dtype."""
    if isinstance(stored, str):
        return {name: (stored, shape)}
    rows, columns = shape
    scales = (rows,) if stored.group_size is None else (rows, columns // stored.group_size)
    tensors = {
        name: {"int8": ("I8", shape), "fp8": ("F8_E4M3", shape), "int4": ("U8", (rows, columns // 2))}[stored.kind],
        scale_name(name): ("F32", scales),
    }
    return tensors | ({zero_name(name): ("I8", scales)} if stored.zero_points else {})


def stored_bytes(spec: DecoderSpec, stored: Mapping[str, Quantization | str]) -> int:
    """Bytes of the weights of a checkpoint; `stored`: see `stored_tensors`."""
    shapes = {"lm_head.weight": spec.tensors()["embed.weight"], **spec.tensors()}
    tensors = (stored_tensors(name, shapes[name], kind) for name, kind in stored.items())
    return sum(math.prod(shape) * DTYPE_SIZES[dtype] for weight in tensors for dtype, shape in weight.values())


class CheckpointReader:
    """A checkpoint, mapped into memory. Raises CheckpointError unless it holds just what its spec calls for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        self._file = TensorFile.open(path / WEIGHTS_FILE)
        self._check()

    def close(self) -> None:
        """Gives the map back: what is stored can no longer be read."""
        self._file.close()

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All that is stored, scales and zero points too, by name."""
        return self._file.tensors

    @property
    def spec(self) -> DecoderSpec:
        return self.config.spec

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → logical shape of every weight, without scales; an int4 weight `[N, K]` is stored as
        `[N, K / 2]`. With tied embeddings `lm_head.weight` is there only if it is stored."""
        shapes = self.spec.tensors()
        if self.spec.tied_embeddings and "lm_head.weight" in self.tensors:
            shapes["lm_head.weight"] = shapes["embed.weight"]
        return shapes

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def dtype(self, name: str) -> StoredDtype:
        quantization = self.quantization(name)
        return quantization.kind if quantization else FLOATS[self.tensors[name].dtype]

    def quantization(self, name: str) -> Quantization | None:
        return self.config.quantization.get(name)

    def tensor(self, name: str) -> Array:
        """What is stored, not copied and read-only: f32, f16, bf16 as uint16, int8, fp8 as uint8, or int4 packed in
        uint8."""
        return self.tensors[name].array

    def scale(self, name: str) -> npt.NDArray[np.float32]:
        """The scales of quantized weight `name`: `[N]`, or `[N, K / group_size]` in groups."""
        return self.tensors[scale_name(name)].array

    def zero(self, name: str) -> npt.NDArray[np.int8] | None:
        """The zero points of quantized weight `name`, in the scales' shape, if it has any."""
        tensor = self.tensors.get(zero_name(name))
        return None if tensor is None else tensor.array

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The weight's values, a copy."""
        stored, quantization = self.tensor(name), self.quantization(name)
        if quantization is not None:
            return dequantize(stored, self.scale(name), quantization, self.zero(name))
        return np.array(to_float32(stored, self.tensors[name].dtype))

    def _check(self) -> None:
        for name in self.config.quantization:
            if name not in self.shapes or not is_projection(name):
                raise CheckpointError(f"{self.path / CONFIG_FILE} quantizes '{name}', which is no matrix of the model")
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, shape in self.shapes.items():
            tensor = self.tensors.get(name)
            floating = tensor.dtype if tensor is not None and tensor.dtype in FLOATS else "F32"
            expected |= stored_tensors(name, shape, self.quantization(name) or floating)
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}
        for name in [*expected, *found]:
            if found.get(name) != expected.get(name):
                raise CheckpointError(
                    f"'{name}' in {self.path / WEIGHTS_FILE} is {_described(found.get(name))}, but {CONFIG_FILE} calls"
                    f" for {_described(expected.get(name))}"
                )


def _described(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "no tensor" if tensor is None else f"{tensor[0]} {list(tensor[1])}"
