"""Loading an engine: is it whole, does it fit this machine, then hand it to its backend."""

from pathlib import Path

from farrier.targets.backend import get_backend
from farrier.targets.detect import Detection, detect, select_target
from farrier.targets.engine import Engine, EngineConfig
from farrier.targets.engine_dir import read_config
from farrier.targets.errors import FingerprintMismatchError
from farrier.targets.target import Target


def load(path: Path) -> Engine:
    """See `farrier.targets.engine.load_engine`."""
    config = read_config(path)
    mismatch = misfit(config, detect())
    if mismatch is not None:
        raise mismatch
    return get_backend(config.fingerprint.backend).load(path, config)


def misfit(config: EngineConfig, detection: Detection) -> FingerprintMismatchError | None:
    """Why an engine cannot run on the machine that was detected, naming the first field that does not match; None when
    it can."""
    here = get_backend(config.fingerprint.backend).here(_target(config, detection))
    field = config.fingerprint.first_mismatch(here)
    if field is None:
        return None
    built, found = _value(config.fingerprint, field), _value(here, field)
    reasons = "".join(f" {device}." for device in detection.unusable) if field == "architecture" else ""
    return FingerprintMismatchError(
        f"The engine does not fit this machine: {field} is {built} in the engine, {found} here; "
        "run it where it fits, or build it again here."
        f"{reasons}",
        field=field,
    )


def execution_target(config: EngineConfig) -> Target:
    """The device of this machine that an engine would run on."""
    return _target(config, detect())


def _target(config: EngineConfig, detection: Detection) -> Target:
    return select_target(detection, "cpu" if config.fingerprint.backend == "openvino" else "auto")


def _value(fingerprint: object, field: str) -> object:
    name, _, library = field.partition(".")
    value = getattr(fingerprint, name)
    if library:
        return dict(value).get(library, "missing")
    return ", ".join(value) or "none" if isinstance(value, tuple) else value
