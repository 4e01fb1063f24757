"""The bare OpenVINO loop: the same compiled graph and KV pool, fixed inputs, nothing done with the logits."""

from time import perf_counter

import numpy as np
import openvino as ov

from farrier.targets.engine import Batch, SamplingArrays
from farrier.targets.openvino.executor import OpenVinoEngine


def bare_decode(engine: OpenVinoEngine, batch_size: int, context: int, steps: int) -> list[float]:
    """Seconds of each step. Writes over the KV pool: what is computed after it means nothing, its speed does."""
    batch = _decode_batch(batch_size, context, engine.config.block_size)
    request = engine._request
    inputs = {"token_ids": batch.token_ids, "positions": batch.positions, "sample_rows": batch.sample_rows}
    inputs |= engine._attention.inputs(batch)
    tensors = {name: ov.Tensor(np.asarray(array, order="C"), shared_memory=True) for name, array in inputs.items()}
    for name, tensor in tensors.items():
        request.set_tensor(name, tensor)
    ends = [perf_counter()]
    for _ in range(steps):
        request.start_async()
        request.wait()
        ends.append(perf_counter())
    return np.diff(ends).tolist()


def _decode_batch(batch_size: int, context: int, block_size: int) -> Batch:
    rows = np.arange(batch_size + 1, dtype=np.int32)
    blocks = context // block_size + 1
    return Batch(
        token_ids=rows[:-1],
        positions=np.full(batch_size, context, np.int32),
        query_starts=rows,
        context_lens=np.full(batch_size, context, np.int32),
        block_ids=np.arange(batch_size * blocks, dtype=np.int32),
        block_starts=rows * np.int32(blocks),
        sample_rows=rows[:-1],
        sampling=SamplingArrays.greedy(batch_size),
    )
