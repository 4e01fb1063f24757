"""Follows a launch plan over numpy arrays: kernels under the interpreter, library products by numpy."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from farrier.targets.bfloat16 import from_bfloat16, to_bfloat16
from farrier.targets.cuda.emitter import Settings
from farrier.targets.cuda.inputs import decode_layout, fill_decode, fill_mixed, mixed_layout
from farrier.targets.cuda.lower import Lowered
from farrier.targets.cuda.plan import Launch, Multiply, Program
from farrier.targets.decoder import DecoderSpec
from farrier.targets.engine import Batch
from tests.kernels.interpreter import run

_NUMPY = {
    "bf16": np.uint16,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
    "fp8e4nv": np.uint8,
    "i8": np.int8,
    "u8": np.uint8,
    "i32": np.int32,
    "u32": np.uint32,
    "i64": np.int64,
}


class PlanRunner:
    """One engine's worth of numpy memory. `forward` leaves `logits` and the KV pool as a GPU would."""

    def __init__(
        self, spec: DecoderSpec, weights: Mapping[str, Any], lowered: Lowered, settings: Settings, num_blocks: int
    ) -> None:
        self._lowered = lowered
        self._settings = settings
        ceilings = settings.ceilings
        rows = max([ceilings.max_batch_size, *(p.rows for p in lowered.programs if p.kind == "decode")])
        sizes = {
            "#T": max(ceilings.max_num_tokens, rows),
            "#B": rows,
            "#S": rows,
            "#tiles": ceilings.max_num_tokens // lowered.tile_rows + rows,
        }
        self.arrays: dict[str, Any] = dict(weights)
        for buffer in lowered.buffers:
            count = buffer.rows if isinstance(buffer.rows, int) else sizes[buffer.rows]
            self.arrays[buffer.name] = np.zeros((count, buffer.columns), _NUMPY[buffer.type])
        pool = (num_blocks, spec.num_kv_heads, settings.block_size, spec.head_dim)
        for index in range(len(spec.layers)):
            for kind in ("key", "value"):
                self.arrays[f"{kind}_cache.{index}"] = np.zeros(pool, _NUMPY[settings.kv_type])
        self._decode = _inputs(decode_layout(ceilings, settings.block_size, rows))
        self._mixed = _inputs(mixed_layout(ceilings, settings.block_size, lowered.tile_rows))

    def step(self, batch: Batch, *, kind: str) -> Any:
        """Runs the smallest program of `kind` that holds `batch`. Returns its logits `[S, vocab]`."""
        programs = [p for p in self._lowered.programs if p.kind == kind and p.rows >= batch.num_tokens]
        program = min(programs, key=lambda p: (p.rows, p.context))
        sizes = {"#T": batch.num_tokens, "#B": batch.num_sequences, "#S": len(batch.sample_rows)}
        if kind == "decode":
            inputs = self._decode
            fill_decode(inputs, batch, program.rows)
            sizes = dict.fromkeys(sizes, program.rows)
        else:
            inputs = self._mixed
            _, sizes["#tiles"] = fill_mixed(inputs, batch, self._settings.block_size, self._lowered.tile_rows)
        self.follow(program, inputs, sizes)
        return self.arrays["logits"][: len(batch.sample_rows)].copy()

    def follow(self, program: Program, inputs: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
        arrays = self.arrays | dict(inputs)
        for step in program.steps:
            if isinstance(step, Launch):
                grid = tuple(e if isinstance(e, int) else -(-sizes[e[0]] // e[1]) * e[2] for e in step.grid)
                given = [_argument(a, arrays, sizes) for a in step.arguments]
                run(self._lowered.sources[step.kernel], grid, *given)
            else:
                _multiply(step, arrays, sizes)


def _inputs(layout: Any) -> dict[str, Any]:
    return {name: np.zeros(capacity, np.int32) for name, capacity in layout.capacities.items()}


def _argument(argument: Any, arrays: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    if not isinstance(argument, str):
        return argument
    return sizes[argument] if argument.startswith("#") else arrays[argument]


def _multiply(step: Multiply, arrays: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    rows = step.rows if isinstance(step.rows, int) else sizes[step.rows]
    x, weight = _wide(arrays[step.x], step.type)[:rows], _wide(arrays[step.weight], step.type)
    product = x[:, : step.k] @ weight.T
    if step.bias is not None:
        product += _wide(arrays[step.bias], step.type)
    out = arrays[step.out]
    if step.accumulate:
        product += _wide(out, step.out_type)[:rows]
    out[:rows, : step.n] = to_bfloat16(product) if step.out_type == "bf16" else product


def _wide(values: Any, type_: str) -> Any:
    return from_bfloat16(values) if type_ == "bf16" else values.astype(np.float32)
