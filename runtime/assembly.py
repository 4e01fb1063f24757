"""Puts an engine, its tokenizer, a KV pool of the right size and the engine core together."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from farrier.runtime.core import CoreOptions, EngineCore
from farrier.runtime.intake import Intake
from farrier.runtime.scheduler import CapacityPolicy
from farrier.runtime.tokenizer import Tokenizer
from farrier.targets.engine import Engine, load_engine
from farrier.targets.engine_dir import TOKENIZER_DIR
from farrier.targets.errors import InsufficientResourcesError


@dataclass(frozen=True)
class AssemblyOptions:
    """kv_blocks: size of the KV pool; None: as much as can be used and fits into `kv_memory_fraction` of the memory
    that is free once the engine is loaded. Raises ValueError naming the option that is out of range."""

    capacity_policy: CapacityPolicy
    kv_blocks: int | None
    kv_memory_fraction: float
    enable_prefix_caching: bool

    def __post_init__(self) -> None:
        if self.capacity_policy not in get_args(CapacityPolicy):
            raise ValueError(f"capacity_policy must be one of {', '.join(get_args(CapacityPolicy))}.")
        if self.kv_blocks is not None and self.kv_blocks < 1:
            raise ValueError(f"kv_blocks must be 1 or more, but it is {self.kv_blocks}.")
        if not 0 < self.kv_memory_fraction <= 1:
            raise ValueError(f"kv_memory_fraction must be above 0 and at most 1, but it is {self.kv_memory_fraction}.")


@dataclass(frozen=True)
class Assembly:
    engine: Engine
    tokenizer: Tokenizer | None
    core: EngineCore
    intake: Intake


def assemble(source: str | Path | Engine, tokenizer: Tokenizer | None, options: AssemblyOptions) -> Assembly:
    """Loads what `source` names (an engine directory brings its own tokenizer) and allocates its KV pool. When that
    fails, what was loaded here is closed again."""
    if not isinstance(source, (str, Path)):
        return _assembled(source, tokenizer, options)
    if tokenizer is not None:
        raise ValueError("An engine directory brings its own tokenizer; give one only with a loaded engine.")
    directory = Path(source)
    engine = load_engine(directory)
    try:
        if engine.config.has_tokenizer:
            tokenizer = Tokenizer.load(directory / TOKENIZER_DIR)
        return _assembled(engine, tokenizer, options)
    except BaseException:
        engine.close()
        raise


def _assembled(engine: Engine, tokenizer: Tokenizer | None, options: AssemblyOptions) -> Assembly:
    num_blocks = kv_pool_size(engine, options)
    engine.allocate(num_blocks)
    core = EngineCore(engine, CoreOptions(num_blocks, options.capacity_policy, options.enable_prefix_caching))
    return Assembly(engine, tokenizer, core, Intake(engine.config, tokenizer, num_blocks))


def kv_pool_size(engine: Engine, options: AssemblyOptions) -> int:
    """Blocks of the KV pool. Raises InsufficientResourcesError when the memory does not hold them."""
    memory = engine.memory()
    if options.kv_blocks is not None:
        if options.kv_blocks > memory.max_blocks:
            raise InsufficientResourcesError(
                f"{options.kv_blocks} KV blocks of {memory.bytes_per_block} bytes were asked for, but memory holds "
                f"{memory.max_blocks}; lower kv_blocks or free memory."
            )
        return options.kv_blocks
    fits = int(memory.max_blocks * options.kv_memory_fraction)
    if fits < 1:
        raise InsufficientResourcesError(
            f"Not one KV block of {memory.bytes_per_block} bytes fits into the free memory; free some, "
            "or build the engine with a smaller kv_dtype."
        )
    ceilings = engine.config.ceilings
    usable = ceilings.max_batch_size * -(-ceilings.max_seq_len // engine.config.block_size)
    return min(fits, usable)
