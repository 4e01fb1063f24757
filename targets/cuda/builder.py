"""From a checkpoint's tensors to the engine file of a GPU: lower, compile, write."""

from collections.abc import Mapping
from pathlib import Path

from farrier.targets.backend import Choices, Progress
from farrier.targets.cuda.backend import BLOCK_SIZE, KV_TYPES
from farrier.targets.cuda.compile import compile_all, described
from farrier.targets.cuda.lower import Settings, lower
from farrier.targets.cuda.pack import blob, items, write_engine_file
from farrier.targets.cuda.plan import KERNEL_PREFIX, PLAN, PLAN_TENSOR, Plan
from farrier.targets.cuda.products import Tactics
from farrier.targets.decoder import DecoderSpec
from farrier.targets.tensorfile import Tensor


def write_engine(
    path: Path, spec: DecoderSpec, tensors: Mapping[str, Tensor], choices: Choices, progress: Progress | None
) -> None:
    """Raises BuildError when a kernel does not compile for the target."""
    capability = choices.target.compute_capability
    assert capability is not None
    settings = Settings(
        capability=10 * capability[0] + capability[1],
        activation="fp16" if choices.precision == "f16" else "bf16",
        kv_type=KV_TYPES[choices.kv_dtype],
        block_size=BLOCK_SIZE,
        ceilings=choices.ceilings,
        deterministic=choices.deterministic,
    )
    weights = items(spec, tensors, settings.activation, choices.ceilings.max_seq_len)
    tactics = Tactics(settings.capability, settings.activation, deterministic=settings.deterministic)
    lowered = lower(spec, {item.name: item for item in weights}, settings, tactics)
    compiled = compile_all(lowered.sources, settings.capability)
    plan = Plan(
        capability=settings.capability,
        activation=settings.activation,
        kv_type=settings.kv_type,
        tile_rows=lowered.tile_rows,
        swept=False,
        buffers=lowered.buffers,
        kernels={name: described(kernel) for name, kernel in compiled.items()},
        programs=lowered.programs,
    )
    code = [blob(KERNEL_PREFIX + name, kernel.cubin) for name, kernel in sorted(compiled.items())]
    write_engine_file(path, [*weights, *code, blob(PLAN_TENSOR, PLAN.dump_json(plan))], tensors, progress)
