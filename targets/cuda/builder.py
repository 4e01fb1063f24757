"""From a checkpoint's tensors to the engine file of a GPU: lower, measure, compile, write."""

from collections.abc import Callable, Mapping
from pathlib import Path

from farrier.targets.backend import Choices, Progress
from farrier.targets.cuda.backend import BLOCK_SIZE, ENGINE_FILE, KV_TYPES
from farrier.targets.cuda.compile import compile_all, described
from farrier.targets.cuda.emitter import Settings, Shaped
from farrier.targets.cuda.lower import lower
from farrier.targets.cuda.pack import Item, blob, items, write_engine_file
from farrier.targets.cuda.plan import KERNEL_PREFIX, PLAN, PLAN_TENSOR, Plan
from farrier.targets.cuda.products import Tactics
from farrier.targets.cuda.timings import Timings, fastest, read_timings, write_timings
from farrier.targets.decoder import DecoderSpec
from farrier.targets.engine_dir import TIMINGS_FILE
from farrier.targets.errors import BuildError
from farrier.targets.tensorfile import Tensor

Stages = Callable[[str], Progress]


def write_engine(
    directory: Path, spec: DecoderSpec, tensors: Mapping[str, Tensor], choices: Choices, stages: Stages
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
    timings: Timings | None = None
    if choices.runs_here and not choices.deterministic:
        device = choices.target.device_name
        timings = measured(spec, shapes, settings, read_timings(choices.timings, device), stages)
        write_timings(directory / TIMINGS_FILE, device, timings)
    content = [*weights, *code(spec, shapes, settings, timings, stages)]
    write_engine_file(directory / ENGINE_FILE, content, tensors, stages("Packing"))


def measured(
    spec: DecoderSpec, weights: Mapping[str, Shaped], settings: Settings, known: Timings, stages: Stages
) -> Timings:
    """Times every product that `known` does not hold, on this machine's GPU. Returns all timings."""
    try:
        from farrier.targets.cuda.sweep import sweep
    except ImportError as error:
        raise BuildError(f"Measuring kernels on this GPU needs farrier[cuda]; install it ({error}).") from error
    tactics = Tactics(settings.capability, settings.activation, deterministic=False)
    return sweep(spec, lower(spec, weights, settings, tactics).products, settings, known, stages("Measuring kernels"))


def code(
    spec: DecoderSpec, weights: Mapping[str, Shaped], settings: Settings, timings: Timings | None, stages: Stages
) -> list[Item]:
    """The compiled kernels and the launch plan of an engine with these weights.

    `timings` None: nothing was measured, and every product gets its default kernel.
    """
    tactics = Tactics(
        settings.capability,
        settings.activation,
        deterministic=settings.deterministic,
        swept=None if timings is None else fastest(timings),
    )
    lowered = lower(spec, weights, settings, tactics)
    compiled = compile_all(lowered.sources, settings.capability, stages("Compiling kernels"))
    plan = Plan(
        capability=settings.capability,
        activation=settings.activation,
        kv_type=settings.kv_type,
        tile_rows=lowered.tile_rows,
        swept=timings is not None,
        buffers=lowered.buffers,
        kernels={name: described(kernel) for name, kernel in compiled.items()},
        programs=lowered.programs,
    )
    kernels = [blob(KERNEL_PREFIX + name, kernel.cubin) for name, kernel in sorted(compiled.items())]
    return [*kernels, blob(PLAN_TENSOR, PLAN.dump_json(plan))]
