"""Runs an engine on the CPU through OpenVINO."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from farrier.targets.detect import detect, select_target
from farrier.targets.engine import Batch, EngineConfig, Int32, KvMemory, StepResult
from farrier.targets.errors import CheckpointError, EngineError, InsufficientResourcesError
from farrier.targets.openvino.attention import Attention, attention_for
from farrier.targets.openvino.graph import build_graph
from farrier.targets.openvino.weights import EngineWeights
from farrier.targets.sampling import sample
from farrier.targets.target import memory_budget
from farrier.targets.tensorfile import TensorFile
from farrier.targets.trial import one_token


def compile_options(config: EngineConfig) -> dict[str, Any]:
    """Plugin settings for an engine; part of what was decided at build time."""
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "bf16" if "bf16" in config.fingerprint.features else "f32",
        "KV_CACHE_PRECISION": config.kv_dtype,
        # Integer weights meet activations quantized in groups of this many: measured fastest from batch 4 on.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 128,
    }


class OpenVinoEngine:
    """The engine contract over one OpenVINO infer request. `load` maps and compiles; see `farrier.targets.engine`."""

    overlaps = False
    """Scheduling needs the cores that compute, and there is one infer request."""

    def __init__(
        self, config: EngineConfig, file: TensorFile, attention: Attention, compiled: ov.CompiledModel
    ) -> None:
        self._config = config
        self._file: TensorFile | None = file
        self._attention = attention
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._pending: _Handle | None = None
        self._allocated = False

    @classmethod
    def load(cls, path: Path, config: EngineConfig) -> "OpenVinoEngine":
        try:
            file = TensorFile.open(path)
        except CheckpointError as error:
            raise EngineError(f"The engine is damaged; build it again. {error}") from error
        attention = attention_for(config.spec)
        try:
            model = build_graph(config.spec, EngineWeights(file.tensors), attention, config.ceilings.max_seq_len)
            with file.trimmed():
                compiled = ov.Core().compile_model(model, "CPU", compile_options(config))
        except (RuntimeError, KeyError) as error:
            raise EngineError(f"OpenVINO cannot compile {path}: {error}") from error
        return cls(config, file, attention, compiled)

    @property
    def config(self) -> EngineConfig:
        return self._config

    def memory(self) -> KvMemory:
        per_block = self._attention.bytes_per_block(self._compiled)
        return KvMemory(per_block, memory_budget(select_target(detect(), "cpu")) // per_block)

    def allocate(self, num_blocks: int) -> None:
        if self._allocated:
            raise EngineError("The KV pool is already allocated; load the engine again for another size.")
        try:
            self._attention.bind(self._compiled, self._request, num_blocks)
        except (RuntimeError, MemoryError) as error:
            raise InsufficientResourcesError(
                f"A KV pool of {num_blocks} blocks does not fit into memory; ask for fewer."
            ) from error
        self._allocated = True
        # The plugin packs each weight when it first runs: now, while its source pages can be handed back.
        assert self._file is not None
        with self._file.trimmed():
            self.step(one_token()).wait()
        self._pending = None

    def step(self, batch: Batch) -> "_Handle":
        token_ids = self._resolve(batch.token_ids)
        inputs = {"token_ids": token_ids, "positions": batch.positions, "sample_rows": batch.sample_rows}
        inputs |= self._attention.inputs(batch)
        # The request reads these arrays while it runs: the handle keeps them alive.
        tensors = {name: ov.Tensor(np.asarray(array, order="C"), shared_memory=True) for name, array in inputs.items()}
        for name, tensor in tensors.items():
            self._request.set_tensor(name, tensor)
        self._pending = _Handle(self._request, self._attention, batch, tensors)
        self._request.start_async()
        return self._pending

    def _resolve(self, token_ids: Int32) -> Int32:
        """Replaces references to the previous step's samples by what it sampled."""
        references = token_ids < 0
        if not references.any():
            return token_ids
        if self._pending is None:
            raise EngineError("The first step cannot refer to a previous one.")
        resolved = token_ids.copy()
        resolved[references] = self._pending.wait().token_ids[-1 - token_ids[references]]
        return resolved

    def close(self) -> None:
        if self._file is not None:
            # A step that nobody waited for still reads its inputs and the mapping.
            with suppress(RuntimeError):
                self._request.wait()
            # Order matters: constants of the compiled model lie in the mapping.
            self._pending = None
            del self._request, self._compiled
            self._file.close()
            self._file = None


class _Handle:
    def __init__(self, request: ov.InferRequest, attention: Attention, batch: Batch, tensors: dict[str, Any]) -> None:
        self._request = request
        self._attention = attention
        self._batch = batch
        self._tensors = tensors
        self._result: StepResult | None = None

    def wait(self) -> StepResult:
        if self._result is None:
            try:
                self._request.wait()
            except RuntimeError as error:
                raise EngineError(f"OpenVINO failed while running a step: {error}") from error
            self._attention.after(self._batch)
            logits = self._request.get_tensor("logits").data
            self._result = sample(logits, self._batch.sampling)
            self._tensors.clear()
        return self._result
