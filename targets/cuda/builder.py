"""From a checkpoint's tensors to the engine file of a GPU: lower, measure, compile, write."""

from collections.abc import Callable, Mapping
from pathlib import Path

from farrier.targets.backend import Choices, Progress
from farrier.targets.cuda.backend import BLOCK_SIZE, ENGINE_FILE, KV_TYPES
from farrier.targets.cuda.compile import compile_all, described
from farrier.targets.cuda.lower import Settings, lower
from farrier.targets.cuda.pack import blob, items, write_engine_file
from farrier.targets.cuda.plan import KERNEL_PREFIX, PLAN, PLAN_TENSOR, Plan
from farrier.targets.cuda.products import Tactics
from farrier.targets.cuda.timings import fastest, read_timings, write_timings
from farrier.targets.decoder import DecoderSpec
from farrier.targets.engine_dir import TIMINGS_FILE
from farrier.targets.tensorfile import Tensor


def write_engine(
    directory: Path,
    spec: DecoderSpec,
    tensors: Mapping[str, Tensor],
    choices: Choices,
    stages: Callable[[str], Progress],
) -> None:
    """Writes the engine file, and what was measured if `choices.runs_here`, into `directory`.

    Raises BuildError when a kernel does not compile for the target.
    """
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
    shapes = {item.name: item for item in weights}
    tactics = Tactics(settings.capability, settings.activation, deterministic=settings.deterministic)
    lowered = lower(spec, shapes, settings, tactics)
    swept = choices.runs_here and not choices.deterministic
    if swept:
        from farrier.targets.cuda.sweep import sweep  # needs the device, and CUDA's libraries

        known = read_timings(choices.timings, choices.target.device_name)
        timings = sweep(spec, lowered.products, settings, known, stages("Measuring kernels"))
        write_timings(directory / TIMINGS_FILE, choices.target.device_name, timings)
        tactics = Tactics(settings.capability, settings.activation, deterministic=False, swept=fastest(timings))
        lowered = lower(spec, shapes, settings, tactics)
    compiled = compile_all(lowered.sources, settings.capability, stages("Compiling kernels"))
    plan = Plan(
        capability=settings.capability,
        activation=settings.activation,
        kv_type=settings.kv_type,
        tile_rows=lowered.tile_rows,
        swept=swept,
        buffers=lowered.buffers,
        kernels={name: described(kernel) for name, kernel in compiled.items()},
        programs=lowered.programs,
    )
    code = [blob(KERNEL_PREFIX + name, kernel.cubin) for name, kernel in sorted(compiled.items())]
    content = [*weights, *code, blob(PLAN_TENSOR, PLAN.dump_json(plan))]
    write_engine_file(directory / ENGINE_FILE, content, tensors, stages("Packing"))
