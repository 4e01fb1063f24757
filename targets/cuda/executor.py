"""Runs an engine on an NVIDIA GPU: follows the launch plan the build wrote, captured as graphs where it can be."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from cuda.bindings import driver
from cuda.core import Device, Stream
from cuda.core.graph import Graph

from farrier.targets.cuda.bound import BoundStep, rows_of
from farrier.targets.cuda.device import (
    Array,
    DeviceMemory,
    LoadedKernel,
    PinnedMemory,
    Sizes,
    check,
    farrier_errors,
    free_memory,
    open_device,
    shares_memory,
)
from farrier.targets.cuda.engine_file import open_engine_file, plan_of, weights_of
from farrier.targets.cuda.footprint import WORKSPACE_BYTES, Footprint, buffer_bytes, weight_bytes
from farrier.targets.cuda.inputs import InputLayout, decode_layout, fill_decode, fill_mixed, mixed_layout
from farrier.targets.cuda.library import Library
from farrier.targets.cuda.plan import KERNEL_PREFIX, TYPE_BYTES, Plan, Program
from farrier.targets.cuda.sampler import SamplingSlot, sampling_layout
from farrier.targets.cuda.upload import upload
from farrier.targets.detect import detect, select_target
from farrier.targets.engine import Batch, EngineConfig, Int32, KvMemory, StepResult
from farrier.targets.errors import EngineError, FingerprintMismatchError
from farrier.targets.target import memory_budget
from farrier.targets.tensorfile import Tensor

_SLOTS = 3
"""Steps whose host memory is in use at once: one running, one enqueued, one being read."""


class Closes(Protocol):
    def close(self) -> None: ...


class CudaEngine:
    """The engine contract over one CUDA stream; see `farrier.targets.engine`."""

    def __init__(
        self, config: EngineConfig, plan: Plan, device: Device, memory: DeviceMemory, weights: dict[str, Array],
        kernels: dict[str, LoadedKernel], footprint: Footprint,
    ) -> None:  # fmt: skip
        self._config = config
        self._plan = plan
        self._device = device
        self._memory = memory
        self._weights = weights
        self._kernels = kernels
        self._footprint = footprint
        self._pool = DeviceMemory()
        self._stream: Stream = device.create_stream()
        self._library: Library | None = None
        self._programs: _Programs | None = None
        self._slots: list[_Slot] = []
        self._next_slot = 0
        self._thread = threading.get_ident()

    @classmethod
    def load(cls, path: Path, config: EngineConfig) -> "CudaEngine":
        file = open_engine_file(path)
        memory = DeviceMemory()
        kernels: dict[str, LoadedKernel] = {}
        weights: dict[str, Tensor] = {}
        try:
            with farrier_errors():
                device = open_device()
                plan = plan_of(file.tensors)
                _check_capability(device, plan)
                weights = weights_of(file.tensors)
                footprint = _footprint(plan, config, weights)
                footprint.check_load(_free_bytes(device))
                for name, kernel in plan.kernels.items():
                    kernels[name] = LoadedKernel(kernel, file.tensors[KERNEL_PREFIX + name].array.tobytes())
                with file.trimmed():
                    arrays = upload(weights, memory, device)
                return cls(config, plan, device, memory, arrays, kernels, footprint)
        except BaseException:
            memory.close()
            for loaded in kernels.values():
                loaded.close()
            raise
        finally:
            weights = {}
            file.close()

    @property
    def config(self) -> EngineConfig:
        return self._config

    @property
    def overlaps(self) -> bool:
        return True

    def memory(self) -> KvMemory:
        return KvMemory(self._config.kv_bytes_per_block, self._footprint.max_blocks(_free_bytes(self._device)))

    def allocate(self, num_blocks: int) -> None:
        if self._programs is not None:
            raise EngineError("The KV pool is already allocated; load the engine again for another size.")
        self._footprint.check_pool(num_blocks, _free_bytes(self._device))
        try:
            with farrier_errors():
                arrays = self._weights | self._kv_pool(num_blocks) | self._buffers()
                self._library = Library(self._pool)
                programs = _Programs(self._plan, self._config, arrays, self._kernels, self._library, self._pool)
                programs.capture(self._stream)
                for _ in range(_SLOTS):
                    self._slots.append(_Slot(programs, self._stream))
        except BaseException:
            self._close_pool()
            raise
        self._programs = programs

    def _kv_pool(self, num_blocks: int) -> dict[str, Array]:
        spec = self._config.spec
        shape = (num_blocks, spec.num_kv_heads, self._config.block_size, spec.head_dim)
        size = int(np.prod(shape)) * TYPE_BYTES[self._plan.kv_type]
        names = [f"{kind}_cache.{index}" for index in range(len(spec.layers)) for kind in ("key", "value")]
        base = self._pool.allocate(size * len(names))
        return {name: Array(base + index * size, self._plan.kv_type, shape) for index, name in enumerate(names)}

    def _buffers(self) -> dict[str, Array]:
        rows = _ceilings(self._plan, self._config)
        shapes = {buffer.name: (rows_of(buffer.rows, rows), buffer.columns) for buffer in self._plan.buffers}
        return {
            buffer.name: Array(
                self._pool.allocate(shapes[buffer.name][0] * buffer.columns * TYPE_BYTES[buffer.type]),
                buffer.type,
                shapes[buffer.name],
            )
            for buffer in self._plan.buffers
        }

    def step(self, batch: Batch) -> "_Handle":
        assert self._programs is not None
        with farrier_errors():
            # The runtime steps an engine from a thread of its own; CUDA's context belongs to a thread.
            if threading.get_ident() != self._thread:
                self._device.set_current()
                self._thread = threading.get_ident()
            slot = self._slots[self._next_slot]
            self._next_slot = (self._next_slot + 1) % _SLOTS
            return slot.run(batch)

    def close(self) -> None:
        # After a device's failure every call returns it once more, and there is nothing left to free.
        with suppress(Exception):
            self._device.set_current()  # whoever closes the engine need not have stepped it
            self._stream.sync()
        self._close_pool()
        for kernel in self._kernels.values():
            kernel.close()
        self._memory.close()
        self._kernels, self._weights = {}, {}

    def _close_pool(self) -> None:
        library = [self._library] if self._library is not None else []
        closings: tuple[Closes, ...] = (*self._slots, *library, self._pool)
        for closing in closings:
            with suppress(Exception):
                closing.close()
        self._slots, self._library, self._programs = [], None, None


def _check_capability(device: Device, plan: Plan) -> None:
    found = device.compute_capability
    here = 10 * found.major + found.minor
    if here != plan.capability:
        raise FingerprintMismatchError(
            f"The engine is machine code for sm_{plan.capability}, and the first GPU that CUDA offers is sm_{here}; "
            "choose another with CUDA_VISIBLE_DEVICES, or build the engine again for this one.",
            field="architecture",
        )


def _free_bytes(device: Device) -> int:
    return memory_budget(select_target(detect(), "auto")) if shares_memory(device) else free_memory()


def _footprint(plan: Plan, config: EngineConfig, weights: Mapping[str, Tensor]) -> Footprint:
    inputs = sum(layout.size for layout in _layouts(plan, config).values())
    return Footprint(
        weights=weight_bytes(tensor.array.nbytes for tensor in weights.values()),
        buffers=buffer_bytes(plan, _ceilings(plan, config)) + inputs + WORKSPACE_BYTES,
        kv_block=config.kv_bytes_per_block,
    )


def _layouts(plan: Plan, config: EngineConfig) -> dict[str, InputLayout]:
    ceilings, block = config.ceilings, config.block_size
    padded = max([ceilings.max_batch_size, *(p.rows for p in plan.programs if p.kind == "decode")])
    return {
        "decode": decode_layout(ceilings, block, padded),
        "mixed": mixed_layout(ceilings, block, plan.tile_rows),
        "sampling": sampling_layout(config),
    }


def _ceilings(plan: Plan, config: EngineConfig) -> Sizes:
    ceilings = config.ceilings
    tiles = ceilings.max_num_tokens // plan.tile_rows + ceilings.max_batch_size
    batch = max([program.rows for program in plan.programs if program.kind == "decode"], default=1)
    rows = max(ceilings.max_batch_size, batch)
    return {"#T": max(ceilings.max_num_tokens, rows), "#B": rows, "#S": rows, "#tiles": tiles}


class _Programs:
    """The plan's programs, bound to addresses: ready to run."""

    def __init__(
        self,
        plan: Plan,
        config: EngineConfig,
        arrays: Mapping[str, Array],
        kernels: Mapping[str, LoadedKernel],
        library: Library,
        memory: DeviceMemory,
    ) -> None:
        self.config = config
        self.plan = plan
        self.arrays = arrays
        self.layouts = _layouts(plan, config)
        self.addresses = {kind: memory.allocate(layout.size) for kind, layout in self.layouts.items()}
        self._library = library
        self._kernels = kernels
        self._bound = {
            kind: dict(arrays) | layout.arrays(self.addresses[kind]) for kind, layout in self.layouts.items()
        }
        by_kind = {kind: [p for p in plan.programs if p.kind == kind] for kind in ("decode", "mixed")}
        self.decode = sorted(by_kind["decode"], key=lambda program: (program.rows, program.context))
        self._mixed = sorted(by_kind["mixed"], key=lambda program: program.rows)
        self._launches = {id(p): self._bind(p, p.kind) for p in (*self.decode, *self._mixed)}
        self._tails: dict[str, list[BoundStep]] = {
            p.kind: self._bind(p, "sampling") for p in plan.programs if p.kind not in by_kind
        }
        self._graphs: dict[int, Graph] = {}

    def _bind(self, program: Program, inputs: str) -> list["BoundStep"]:
        arrays = self._bound[inputs]
        return [BoundStep(step, arrays, self._kernels, self._library) for step in program.steps]

    def capture(self, stream: Stream) -> None:
        """Runs every decode program once on a batch of nothing, then captures it."""
        rows = max((program.rows for program in self.decode), default=0)
        if rows:
            nothing = np.full(rows, -1, np.int32)
            address = self._bound["decode"]["context_lens"].address
            check(driver.cuMemcpyHtoD(address, nothing.ctypes.data, nothing.nbytes))
        for program in self.decode:
            sizes: Sizes = {"#T": program.rows, "#B": program.rows, "#S": program.rows}
            self._follow(program, sizes, stream)
            stream.sync()
            builder = stream.create_graph_builder()
            builder.begin_building()
            self._follow(program, sizes, builder.stream)
            graph = builder.end_building().complete()
            builder.close()
            graph.upload(stream)
            self._graphs[id(program)] = graph
        stream.sync()

    def _follow(self, program: Program, sizes: Sizes, stream: Stream) -> None:
        for step in (*self._launches[id(program)], *self._tails["greedy"]):
            step.run(sizes, stream)

    def decode_program(self, batch: Batch) -> Program | None:
        """The smallest captured program that holds the batch; None when only a mixed one does."""
        count = batch.num_sequences
        if not count == batch.num_tokens == len(batch.sample_rows):
            return None
        longest = int(batch.context_lens.max()) + 1
        for program in self.decode:
            if program.rows >= count and program.context >= longest:
                return program
        return None

    def run_decode(self, program: Program, stream: Stream) -> None:
        self._graphs[id(program)].launch(stream)

    def run_mixed(self, sizes: Sizes, stream: Stream) -> None:
        program = next(program for program in self._mixed if program.rows >= sizes["#T"])
        self._follow(program, sizes, stream)

    def run_tail(self, kind: str, sizes: Sizes, stream: Stream) -> None:
        for step in self._tails[kind]:
            step.run(sizes, stream)


class _Slot:
    """Host memory of one step under way: its inputs, and where its results arrive."""

    def __init__(self, programs: _Programs, stream: Stream) -> None:
        self._programs = programs
        self._stream = stream
        self._sampling = SamplingSlot(programs.layouts["sampling"], programs.arrays, programs.addresses["sampling"])
        self._inputs = {kind: _PinnedInputs(programs.layouts[kind]) for kind in ("decode", "mixed")}
        self._results = PinnedMemory(4 * programs.arrays["sampled"].shape[0])
        self._pending: _Handle | None = None

    def run(self, batch: Batch) -> "_Handle":
        if self._pending is not None:
            self._pending.wait()
        programs, stream = self._programs, self._stream
        config = programs.config
        count = len(batch.sample_rows)
        sizes: dict[Any, int] = {"#T": batch.num_tokens, "#B": batch.num_sequences, "#S": count}
        program = programs.decode_program(batch)
        if program is not None:
            place = self._inputs["decode"]
            blocks = fill_decode(place.arrays, batch, program.rows)
            place.copy(blocks, programs.addresses["decode"], stream)
            programs.run_decode(program, stream)
        else:
            place = self._inputs["mixed"]
            blocks, tiles = fill_mixed(place.arrays, batch, config.block_size, programs.plan.tile_rows)
            sizes["#tiles"] = tiles
            place.copy(blocks, programs.addresses["mixed"], stream)
            programs.run_mixed(sizes, stream)
        self._sampling.run(batch.sampling, sizes, programs, stream)
        if count:
            sampled = programs.arrays["sampled"]
            check(driver.cuMemcpyDtoHAsync(self._results.address, sampled.address, 4 * count, stream.handle))
        self._pending = _Handle(stream.record(), self._results.array[: 4 * count].view(np.int32), self._sampling)
        return self._pending

    def close(self) -> None:
        closings: tuple[Closes, ...] = (*self._inputs.values(), self._results, self._sampling)
        for closing in closings:
            closing.close()


class _PinnedInputs:
    def __init__(self, layout: InputLayout) -> None:
        self._memory = PinnedMemory(layout.size)
        whole = self._memory.array.view(np.int32)
        self.arrays = {name: whole[start : start + layout.capacities[name]] for name, start in layout.offsets.items()}
        self._last = layout.offsets["block_ids"]

    def copy(self, num_blocks: int, address: int, stream: Stream) -> None:
        size = 4 * (self._last + num_blocks)
        check(driver.cuMemcpyHtoDAsync(address, self._memory.address, size, stream.handle))

    def close(self) -> None:
        self._memory.close()


class _Handle:
    def __init__(self, event: Any, tokens: Int32, sampling: Any) -> None:
        self._event = event
        self._tokens = tokens
        self._sampling = sampling
        self._result: StepResult | None = None

    def wait(self) -> StepResult:
        if self._result is None:
            with farrier_errors():
                self._event.sync()
            self._result = StepResult(self._tokens.copy(), self._sampling.logprobs(self._tokens))
        return self._result
