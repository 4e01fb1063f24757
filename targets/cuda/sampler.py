"""The host's half of sampling: what rows ask for, sent to the device; logprobs, read back."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver
from cuda.core import Stream

from farrier.targets.cuda.device import Array, PinnedMemory, Sizes, check
from farrier.targets.cuda.inputs import InputLayout
from farrier.targets.engine import EngineConfig, Int32, RowLogprobs, SamplingArrays
from farrier.targets.errors import EngineError
from farrier.targets.sampling import uniforms

MAX_LOGPROBS = 20
MAX_BIASES = 1024
"""Of a row: its logit biases, and the stop tokens that min_tokens holds back."""

_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_NUMBERS = ("top_k", "num_logprobs", "history_starts", "output_starts", "bias_starts")
_RAGGED = ("bias_ids", "bias_values", "history_ids")


def sampling_layout(config: EngineConfig) -> InputLayout:
    """Arrays of 4-byte elements; `draws` are fp64."""
    rows, length = config.ceilings.max_batch_size, config.ceilings.max_seq_len
    words = -(-config.spec.vocab_size // 32)
    fixed = dict.fromkeys((*_FLOATS, *_NUMBERS), rows + 1) | {"draws": 2 * rows}
    ragged = {"bias_ids": rows * MAX_BIASES, "bias_values": rows * MAX_BIASES, "history_ids": rows * length}
    return InputLayout(fixed | {"masks": rows * words} | ragged)


class Runs(Protocol):
    def run_tail(self, kind: str, sizes: Sizes, stream: Stream) -> None: ...


class SamplingSlot:
    """One step's sampling inputs and logprobs in pinned memory. `arrays` are the device's, by name."""

    def __init__(self, layout: InputLayout, arrays: Mapping[str, Array], address: int) -> None:
        self._layout = layout
        self._address = address
        self._inputs = PinnedMemory(layout.size)
        whole = self._inputs.array.view(np.int32)
        self._place: dict[str, npt.NDArray[Any]] = {}
        for name, start in layout.offsets.items():
            part = whole[start : start + layout.capacities[name]]
            is_float = name in _FLOATS or name == "bias_values"
            self._place[name] = part.view(np.float32 if is_float else np.float64 if name == "draws" else np.int32)
        self._results = {name: arrays[name] for name in ("token_logprobs", "top_ids", "top_values")}
        rows = arrays["token_logprobs"].shape[0]
        self._outputs = PinnedMemory(4 * rows * (1 + 2 * MAX_LOGPROBS))
        self._wanted: Int32 | None = None

    def run(self, arrays: SamplingArrays, sizes: Sizes, programs: Runs, stream: Stream) -> None:
        """Enqueues whatever goes beyond the likeliest token."""
        self._wanted = None
        count = len(arrays.temperature)
        adjusted = len(arrays.history_ids) or len(arrays.bias_ids) or arrays.masks is not None
        drawn = bool(arrays.temperature.any())
        asked = bool((arrays.num_logprobs >= 0).any())
        if not count or not (adjusted or drawn or asked):
            return
        self._fill(arrays, count, stream)
        if adjusted or drawn:
            programs.run_tail("sample" if arrays.masks is None else "masked", sizes, stream)
        if asked:
            programs.run_tail("logprobs", sizes, stream)
            self._wanted = arrays.num_logprobs.copy()
            self._read(count, stream)

    def _fill(self, arrays: SamplingArrays, count: int, stream: Stream) -> None:
        place = self._place
        for name in (*_FLOATS, *_NUMBERS):
            values = getattr(arrays, name)
            place[name][: len(values)] = values
        place["draws"][:count] = uniforms(arrays.seed, arrays.step)
        self._copy(next(iter(self._layout.offsets)), self._layout.offsets["masks"], stream)
        if arrays.masks is not None:
            place["masks"][: arrays.masks.size] = arrays.masks.reshape(-1).view(np.int32)
            self._copy("masks", arrays.masks.size, stream)
        for name in _RAGGED:
            values = getattr(arrays, name)
            if len(values) > len(place[name]):
                raise EngineError(f"A step has {len(values)} {name}; the engine holds {len(place[name])}.")
            place[name][: len(values)] = values
            self._copy(name, len(values), stream)

    def _copy(self, name: str, count: int, stream: Stream) -> None:
        if count:
            start = 4 * self._layout.offsets[name]
            check(
                driver.cuMemcpyHtoDAsync(self._address + start, self._inputs.address + start, 4 * count, stream.handle)
            )

    def _read(self, count: int, stream: Stream) -> None:
        position = self._outputs.address
        for array in self._results.values():
            size = 4 * count * (array.shape[1] if len(array.shape) > 1 else 1)
            check(driver.cuMemcpyDtoHAsync(position, array.address, size, stream.handle))
            position += size

    def logprobs(self, tokens: Int32) -> dict[int, RowLogprobs]:
        """Once the step is done: of the rows that asked and have a token."""
        if self._wanted is None:
            return {}
        count = len(self._wanted)
        words = self._outputs.array[: 4 * count * (1 + 2 * MAX_LOGPROBS)].view(np.float32)
        chosen = words[:count]
        ids = words[count : count * (1 + MAX_LOGPROBS)].view(np.int32).reshape(count, MAX_LOGPROBS)
        values = words[count * (1 + MAX_LOGPROBS) :].reshape(count, MAX_LOGPROBS)
        return {
            row: RowLogprobs(float(chosen[row]), ids[row, :wanted].copy(), values[row, :wanted].copy())
            for row, wanted in enumerate(self._wanted.tolist())
            if wanted >= 0 and tokens[row] >= 0
        }

    def close(self) -> None:
        self._inputs.close()
        self._outputs.close()
