"""The NVIDIA backend: what it can build, what that takes, how it loads."""

import importlib.util
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from farrier.targets.backend import Choices, Progress
from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.cuda.engine_file import open_engine_file, plan_of
from farrier.targets.cuda.plan import TYPE_BYTES, Type
from farrier.targets.decoder import DecoderSpec
from farrier.targets.engine import ENGINE_ABI, Engine, EngineConfig, Fingerprint, KvDtype
from farrier.targets.errors import BuildError, TargetError
from farrier.targets.target import Target, sm_name

BLOCK_SIZE = 32
ENGINE_FILE = "rank0.engine"
FP8_CAPABILITY = (8, 9)
KV_TYPES: dict[KvDtype, Type] = {"bf16": "bf16", "f16": "fp16", "fp8": "fp8e4nv"}


class CudaBackend:
    name = "cuda"
    block_size = BLOCK_SIZE
    default_batch_size = 64
    default_num_tokens = 4096

    def fingerprint(self, target: Target, precision: str, kv_dtype: KvDtype) -> Fingerprint:
        return self.here(target)

    def here(self, target: Target) -> Fingerprint:
        # Machine code for one compute capability; it carries everything it needs.
        capability = target.compute_capability
        return Fingerprint(ENGINE_ABI, self.name, sm_name(capability) if capability else "none", (), ())

    def check(self, target: Target, precisions: set[str], *, deterministic: bool) -> None:
        if "f32" in precisions:
            raise BuildError("GPU engines compute in 16 bits; build with --precision bf16 or f16.")
        if "fp8" in precisions and not _has_fp8(target):
            raise BuildError(f"{target.device_name} has no fp8 arithmetic; build with --precision int8 or int4.")
        if importlib.util.find_spec("triton") is None:
            raise BuildError("Building for a GPU needs Triton; install farrier[build-cuda].")

    def kv_dtype(self, spec: DecoderSpec, target: Target, precision: str, asked: KvDtype | None) -> KvDtype:
        activation: KvDtype = "f16" if precision == "f16" else "bf16"
        if asked is None or asked == activation:
            return activation
        if asked != "fp8":
            raise BuildError(f"On a GPU this engine keeps its KV cache in {activation} or fp8, not {asked}.")
        if not _has_fp8(target):
            raise BuildError(f"{target.device_name} has no fp8; build with --kv-dtype {activation}.")
        return "fp8"

    def kv_bytes_per_block(self, spec: DecoderSpec, kv_dtype: KvDtype) -> int:
        return 2 * len(spec.layers) * spec.kv_size * BLOCK_SIZE * TYPE_BYTES[KV_TYPES[kv_dtype]]

    def packed_bytes(self, checkpoint: CheckpointReader) -> int:
        from farrier.targets.cuda.pack import items

        return sum(item.size for item in items(checkpoint.spec, checkpoint.tensors, "bf16", 0))

    def pack(
        self, checkpoint: CheckpointReader, directory: Path, choices: Choices, stages: Callable[[str], Progress]
    ) -> None:
        from farrier.targets.cuda.builder import write_engine  # Triton is needed only from here on

        write_engine(directory, checkpoint.spec, checkpoint.tensors, choices, stages)

    def details(self, directory: Path) -> dict[str, str | int | bool]:
        with closing(open_engine_file(directory / ENGINE_FILE)) as file:
            plan = plan_of(file.tensors)
        capability = f"{plan.capability // 10}.{plan.capability % 10}"
        return {"compute_capability": capability, "kernels": len(plan.kernels), "swept": plan.swept}

    def load(self, directory: Path, config: EngineConfig) -> Engine:
        try:
            from farrier.targets.cuda.executor import CudaEngine
        except ImportError as error:
            raise TargetError(
                f"Engines for a GPU need farrier[cuda]; install it ({error}).", code="backend_not_installed"
            ) from error
        return CudaEngine.load(directory / ENGINE_FILE, config)


def _has_fp8(target: Target) -> bool:
    return target.compute_capability is not None and target.compute_capability >= FP8_CAPABILITY
