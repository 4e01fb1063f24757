"""The CPU backend: what it can build, what that takes, how it loads."""

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from farrier.targets.backend import Choices, Progress
from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.decoder import DecoderSpec
from farrier.targets.engine import ENGINE_ABI, Engine, EngineConfig, Fingerprint, KvDtype
from farrier.targets.errors import BuildError, TargetError
from farrier.targets.openvino.layout import BLOCK_SIZE, kv_bytes_per_block
from farrier.targets.openvino.pack import EXPERT_PARTS, write_engine_file
from farrier.targets.packing import packed_bytes, plan
from farrier.targets.target import Target

ENGINE_FILE = "rank0.engine"


class OpenVinoBackend:
    name = "openvino"
    block_size = BLOCK_SIZE
    default_batch_size = 16
    default_num_tokens = 512

    def check(self, target: Target, precisions: set[str], *, deterministic: bool) -> None:
        if "fp8" in precisions:
            # OpenVINO unfolds fp8 weights to f32 while it compiles: four times the memory, and no faster.
            raise BuildError("The CPU does not run fp8 weights; choose int8 instead, with --precision or --override.")
        if deterministic:
            raise BuildError("The CPU backend has no batch-invariant mode; build without --deterministic.")

    def fingerprint(self, target: Target, precision: str, kv_dtype: KvDtype) -> Fingerprint:
        # An f32 cache means f32 arithmetic to OpenVINO, a bf16 one bf16; a u8 one goes with either.
        computes_bf16 = kv_dtype == "bf16" or (kv_dtype == "u8" and precision == "bf16" and target.cpu.native_bf16)
        return self._fingerprint(target, ("bf16",) if computes_bf16 else ())

    def here(self, target: Target) -> Fingerprint:
        return self._fingerprint(target, ("bf16",) if target.cpu.native_bf16 else ())

    def _fingerprint(self, target: Target, features: tuple[str, ...]) -> Fingerprint:
        # OpenVINO promises nothing about its PagedAttention operation beyond a minor version.
        try:
            version = ".".join(importlib.metadata.version("openvino").split(".")[:2])
        except importlib.metadata.PackageNotFoundError as error:
            raise TargetError(
                "Engines for the CPU need OpenVINO; install farrier[cpu].", code="backend_not_installed"
            ) from error
        return Fingerprint(ENGINE_ABI, self.name, target.cpu.architecture, features, (("openvino", version),))

    def kv_dtype(self, spec: DecoderSpec, target: Target, precision: str, asked: KvDtype | None) -> KvDtype:
        if spec.attention_softcap is not None:
            if asked not in (None, "f32"):
                raise BuildError(
                    f"Soft-capped attention ({spec.architecture}) keeps its KV cache in f32 on the CPU; "
                    "build with --kv-dtype f32."
                )
            return "f32"
        if asked in ("f16", "fp8"):
            raise BuildError(f"The CPU keeps its KV cache in f32, bf16 or u8; {asked} is for GPUs.")
        if asked == "bf16" and not target.cpu.native_bf16:
            raise BuildError(f"{target.cpu.name} has no bf16 instructions; build with --kv-dtype f32 or u8.")
        if asked == "bf16" and precision == "f32":
            raise BuildError(
                "An f32 engine keeps its KV cache in f32 or u8; build with --kv-dtype f32, or --precision bf16."
            )
        if asked is not None:
            return asked
        return "bf16" if precision == "bf16" and target.cpu.native_bf16 else "f32"

    def kv_bytes_per_block(self, spec: DecoderSpec, kv_dtype: KvDtype) -> int:
        return kv_bytes_per_block(spec, kv_dtype)

    def packed_bytes(self, checkpoint: CheckpointReader) -> int:
        return packed_bytes(plan(checkpoint.spec, checkpoint.tensors, EXPERT_PARTS))

    def pack(
        self, checkpoint: CheckpointReader, directory: Path, choices: Choices, stages: Callable[[str], Progress]
    ) -> None:
        items = plan(checkpoint.spec, checkpoint.tensors, EXPERT_PARTS)
        write_engine_file(directory / ENGINE_FILE, items, checkpoint.tensors, stages("Packing"))

    def details(self, directory: Path) -> dict[str, str | int | bool]:
        return {}

    def load(self, directory: Path, config: EngineConfig) -> Engine:
        from farrier.targets.openvino.executor import OpenVinoEngine  # OpenVINO itself is needed only from here on

        return OpenVinoEngine.load(directory / ENGINE_FILE, config)
