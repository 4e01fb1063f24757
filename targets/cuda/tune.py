"""Gives an engine file other kernels, chosen by what was measured, without its checkpoint: weights stay as they are."""

from contextlib import closing
from pathlib import Path

from farrier.targets.cuda.backend import ENGINE_FILE
from farrier.targets.cuda.builder import Stages, code, measured
from farrier.targets.cuda.emitter import Settings
from farrier.targets.cuda.engine_file import open_engine_file, plan_of, weights_of
from farrier.targets.cuda.pack import Item, write_engine_file
from farrier.targets.cuda.plan import Plan
from farrier.targets.cuda.timings import Timings, write_timings
from farrier.targets.engine import EngineConfig
from farrier.targets.engine_dir import TIMINGS_FILE


def measure(source: Path, config: EngineConfig, stages: Stages) -> Timings:
    """Times the products of the engine in `source` on this machine's GPU, which it fits."""
    with closing(open_engine_file(source / ENGINE_FILE)) as file:
        settings = _settings(plan_of(file.tensors), config)
        return measured(config.spec, weights_of(file.tensors), settings, {}, stages)


def rewrite(source: Path, directory: Path, config: EngineConfig, device: str, timings: Timings, stages: Stages) -> None:
    """Writes the engine file of `source` with the kernels that were fastest on `device`, and the timings, into
    `directory`. Needs no GPU."""
    with closing(open_engine_file(source / ENGINE_FILE)) as file:
        weights = weights_of(file.tensors)
        settings = _settings(plan_of(file.tensors), config)
        kept = [Item(name, tensor.dtype, tensor.shape, values=tensor.array) for name, tensor in weights.items()]
        content = [*kept, *code(config.spec, weights, settings, timings, stages)]
        write_engine_file(directory / ENGINE_FILE, content, {}, stages("Packing"))
        del weights, kept, content  # views of the file
    write_timings(directory / TIMINGS_FILE, device, timings)


def _settings(plan: Plan, config: EngineConfig) -> Settings:
    return Settings(
        capability=plan.capability,
        activation=plan.activation,
        kv_type=plan.kv_type,
        block_size=config.block_size,
        ceilings=config.ceilings,
        deterministic=config.deterministic,
    )
