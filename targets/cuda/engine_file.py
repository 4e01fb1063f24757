"""The engine file of a GPU, read back: its plan, and its weights without plan and kernels."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from farrier.targets.cuda.plan import KERNEL_PREFIX, PLAN, PLAN_TENSOR, Plan
from farrier.targets.errors import CheckpointError, EngineError
from farrier.targets.tensorfile import Tensor, TensorFile


def open_engine_file(path: Path) -> TensorFile:
    """Raises EngineError when it is not whole."""
    try:
        return TensorFile.open(path)
    except CheckpointError as error:
        raise EngineError(f"The engine is damaged; build it again. {error}") from error


def plan_of(tensors: Mapping[str, Tensor]) -> Plan:
    """Raises EngineError when there is none that this farrier can follow."""
    try:
        return PLAN.validate_json(tensors[PLAN_TENSOR].array.tobytes())
    except (KeyError, ValidationError) as error:
        raise EngineError("The engine has no launch plan that this farrier can follow; build it again.") from error


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What lies on the device: weights in kernel layout and rotary tables."""
    return {
        name: tensor for name, tensor in tensors.items() if name != PLAN_TENSOR and not name.startswith(KERNEL_PREFIX)
    }
