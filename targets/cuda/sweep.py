"""Which kernel is fastest for each product: measured on the device, every candidate on weights it has not cached."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.core import Device, EventOptions, Stream

from farrier.targets.backend import Progress
from farrier.targets.cuda.bound import BoundStep, rows_of
from farrier.targets.cuda.compile import compile_all, described
from farrier.targets.cuda.device import Array, DeviceMemory, LoadedKernel, check, farrier_errors, open_device
from farrier.targets.cuda.emitter import Settings
from farrier.targets.cuda.library import Library
from farrier.targets.cuda.lower import lower_product
from farrier.targets.cuda.plan import TYPE_BYTES, Step
from farrier.targets.cuda.products import Product, Tactics
from farrier.targets.cuda.timings import Timings, spelled
from farrier.targets.cuda.upload import TYPES
from farrier.targets.decoder import DecoderSpec

_MOST = {1: 20}
_MOST_OTHERS = 6
"""Candidates of a product: at one row the tile decides most."""
_CACHE_FACTOR = 4
"""Weights rotate over this many times the L2 cache."""
_LAUNCHES, _REPLAYS = 16, 5
_POOL_BYTES = 1 << 26


def sweep(
    spec: DecoderSpec,
    products: Mapping[str, tuple[Product, int, bool]],
    settings: Settings,
    known: Timings,
    progress: Progress,
) -> Timings:
    """Times every product (with its rows, and whether they are decode rows) that `known` does not hold, on this
    machine's GPU. Returns all timings."""
    tactics = Tactics(settings.capability, settings.activation, deterministic=False)
    wanted = {key: value for key, value in products.items() if key not in known}
    candidates = {
        (key, choice): lower_product(spec, product, choice, rows, settings, decode=decode)
        for key, (product, rows, decode) in wanted.items()
        for choice in tactics.candidates(product, rows, decode=decode)[: _MOST.get(rows, _MOST_OTHERS)]
    }
    sources = {name: source for _, _, own in candidates.values() for name, source in own.items()}
    total = len(sources) + len(candidates)
    compiled = compile_all(sources, settings.capability, lambda done, _: progress(done, total))
    timings: Timings = dict(known)
    with farrier_errors(), _Bench() as bench:
        for done, ((key, choice), (steps, buffers, own)) in enumerate(candidates.items()):
            progress(len(sources) + done, total)
            product, rows, _ = wanted[key]
            kernels = {name: LoadedKernel(described(compiled[name]), compiled[name].cubin) for name in own}
            try:
                seconds = bench.time(product, rows, steps, buffers, kernels)
            finally:
                for kernel in kernels.values():
                    kernel.close()
            timings.setdefault(key, {})[spelled(choice)] = seconds
    progress(total, total)
    return timings


@dataclass
class _Place:
    memory: DeviceMemory
    arrays: list[dict[str, Array]]


class _Bench:
    """Times steps in a captured graph, as they will run. Weights of one product stay until another is timed."""

    def __enter__(self) -> "_Bench":
        self._device: Device = open_device()
        self._stream: Stream = self._device.create_stream()
        self._memory = DeviceMemory()
        self._library = Library(self._memory)
        self._cache_bytes = int(
            check(
                driver.cuDeviceGetAttribute(
                    driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, self._device.device_id
                )
            )
        )
        rng = np.random.default_rng(0)
        self._pool = rng.integers(0, 0x3F, _POOL_BYTES, np.uint8)  # no NaN in any format
        self._product: Product | None = None
        self._place = _Place(DeviceMemory(), [])
        return self

    def __exit__(self, *_: object) -> None:
        self._place.memory.close()
        self._library.close()
        self._memory.close()
        self._stream.close()

    def time(
        self, product: Product, rows: int, steps: tuple[Step, ...], buffers: Any, kernels: Mapping[str, LoadedKernel]
    ) -> float:
        """Seconds of one run of `steps`."""
        weights = self._weights(product)
        memory = DeviceMemory()
        sizes: Any = {"#T": rows, "#S": rows, "#B": rows}
        try:
            shared = {
                buffer.name: Array(
                    memory.allocate(rows_of(buffer.rows, sizes) * buffer.columns * TYPE_BYTES[buffer.type]),
                    buffer.type,
                    (rows_of(buffer.rows, sizes), buffer.columns),
                )
                for buffer in buffers
            }
            norm = memory.allocate(4 * product.k)
            shared["product_norm"] = Array(norm, "fp32", (product.k,))
            bound = [
                BoundStep(step, shared | weights[index % len(weights)], kernels, self._library)
                for index in range(_LAUNCHES)
                for step in steps
            ]
            return self._replay(bound, sizes) / _LAUNCHES
        finally:
            memory.close()

    def _replay(self, bound: list[BoundStep], sizes: Any) -> float:
        stream = self._stream
        for step in bound:
            step.run(sizes, stream)
        stream.sync()
        builder = stream.create_graph_builder()
        builder.begin_building()
        for step in bound:
            step.run(sizes, builder.stream)
        graph = builder.end_building().complete()
        builder.close()
        graph.launch(stream)
        seconds = []
        for _ in range(_REPLAYS):
            start = stream.record(options=EventOptions(timing_enabled=True))
            graph.launch(stream)
            end = stream.record(options=EventOptions(timing_enabled=True))
            end.sync()
            seconds.append((end - start) / 1000)
        graph.close()
        return float(median(seconds))

    def _weights(self, product: Product) -> list[dict[str, Array]]:
        if product == self._product:
            return self._place.arrays
        self._place.memory.close()
        operands = product.tensors("product")
        size = sum(operand.bytes for operand in operands.values())
        copies = max(1, -(-_CACHE_FACTOR * self._cache_bytes // size))
        self._place = _Place(DeviceMemory(), [])
        for _ in range(min(copies, _LAUNCHES)):
            arrays = {}
            for name, operand in operands.items():
                address = self._place.memory.allocate(operand.bytes)
                for start in range(0, operand.bytes, _POOL_BYTES):
                    count = min(_POOL_BYTES, operand.bytes - start)
                    check(driver.cuMemcpyHtoD(address + start, self._pool.ctypes.data, count))
                arrays[name] = Array(address, TYPES[operand.dtype], operand.shape)
            self._place.arrays.append(arrays)
        self._product = product
        return self._place.arrays
