"""What a backend is to the rest of farrier: it decides, packs, and loads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from farrier.targets.decoder import DecoderSpec
from farrier.targets.engine import Ceilings, Engine, EngineConfig, Fingerprint, KvDtype
from farrier.targets.errors import FingerprintMismatchError
from farrier.targets.target import Target

if TYPE_CHECKING:
    from farrier.targets.checkpoint import CheckpointReader

Progress = Callable[[int, int], None]
"""(done, in all), in bytes or whatever the stage counts"""


@dataclass(frozen=True)
class Choices:
    """What was decided before an engine is packed."""

    target: Target
    precision: str
    kv_dtype: KvDtype
    ceilings: Ceilings
    deterministic: bool
    runs_here: bool
    """`target` is in this machine: what is fastest can be measured."""
    timings: Path | None = None
    """What an earlier build measured (`model.cache`), if there was one."""


class Backend(Protocol):
    name: str
    block_size: int
    default_batch_size: int
    default_num_tokens: int

    def check(self, target: Target, precisions: set[str], *, deterministic: bool) -> None:
        """Raises BuildError for what `target` cannot do or this installation cannot build, naming the alternative."""
        ...

    def fingerprint(self, target: Target, precision: str, kv_dtype: KvDtype) -> Fingerprint:
        """What an engine built for `target` with these choices needs of a machine."""
        ...

    def here(self, target: Target) -> Fingerprint:
        """What `target` offers to engines."""
        ...

    def kv_dtype(self, spec: DecoderSpec, target: Target, precision: str, asked: KvDtype | None) -> KvDtype:
        """The KV type to build with. Raises BuildError naming the alternative when `asked` cannot be honoured."""
        ...

    def kv_bytes_per_block(self, spec: DecoderSpec, kv_dtype: KvDtype) -> int: ...

    def packed_bytes(self, checkpoint: "CheckpointReader") -> int:
        """Bytes of the engine file `pack` would write."""
        ...

    def pack(
        self, checkpoint: "CheckpointReader", directory: Path, choices: Choices, stages: Callable[[str], Progress]
    ) -> None:
        """Writes the engine's weights, in kernel layout, into `directory`, and whatever else is decided now.
        `stages` is asked once per stage, by its title, for a callback."""
        ...

    def details(self, directory: Path) -> dict[str, str | int | bool]:
        """What this backend alone decides at build time and people ask for, as JSON-ready data.

        Raises EngineError when the engine's files do not tell."""
        ...

    def load(self, directory: Path, config: EngineConfig) -> Engine: ...


def backend_for(target: Target) -> Backend:
    """The backend that builds for `target`."""
    return get_backend("openvino" if target.kind == "cpu" else "cuda")


def get_backend(name: str) -> Backend:
    if name == "openvino":
        from farrier.targets.openvino.backend import OpenVinoBackend

        return OpenVinoBackend()
    if name == "cuda":
        from farrier.targets.cuda.backend import CudaBackend

        return CudaBackend()
    raise FingerprintMismatchError(
        f"The engine needs the backend {name!r}, which this farrier does not have.", field="backend"
    )
