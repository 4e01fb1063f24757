"""Engine directories on disk: `config.json` beside the files it vouches for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from farrier.targets.digest import file_digest
from farrier.targets.engine import ENGINE_ABI, EngineConfig
from farrier.targets.errors import BuildError, EngineError, FingerprintMismatchError
from farrier.targets.workspace import forget_cached

CONFIG_FILE = "config.json"
TOKENIZER_DIR = "tokenizer"
TIMINGS_FILE = "model.cache"
"""What a build measured on its device; a rebuild need not measure it again."""
_KIND = "farrier-engine"
_ADAPTER = TypeAdapter(EngineConfig)


def write_config(directory: Path, config: EngineConfig) -> None:
    document = {"kind": _KIND, "abi": ENGINE_ABI, "engine": _ADAPTER.dump_python(config, mode="json")}
    (directory / CONFIG_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def seal(directory: Path, config: EngineConfig) -> EngineConfig:
    """Writes config.json with the digests of all other files, last of all, and reads everything back from the disk.
    Raises BuildError when something is not what was written."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    config = replace(config, files={str(path.relative_to(directory)): file_digest(path) for path in files})
    write_config(directory, config)
    forget_cached(directory)
    damaged = damaged_file(directory, read_config(directory))
    if damaged is not None:
        raise BuildError(f"{damaged} does not read back as it was written; check the disk of {directory.parent}.")
    return config


def is_engine(directory: Path) -> bool:
    """Whether `directory` claims to be an engine, of whatever ABI."""
    try:
        return _document(directory).get("kind") == _KIND
    except EngineError:
        return False


def read_config(directory: Path) -> EngineConfig:
    """Raises EngineError when there is no whole engine, FingerprintMismatchError for one of another ABI."""
    document = _document(directory)
    if document.get("kind") != _KIND:
        raise EngineError(f"{directory} is not an engine; build one with `farrier build MODEL_DIR -o {directory}`.")
    if document.get("abi") != ENGINE_ABI:
        raise FingerprintMismatchError(
            f"{directory} is an engine of ABI {document.get('abi')}, this farrier runs {ENGINE_ABI}; build it again.",
            field="abi",
        )
    try:
        config = _ADAPTER.validate_python(document["engine"])
    except (ValidationError, KeyError) as error:
        raise EngineError(f"{directory / CONFIG_FILE} is damaged; build the engine again.") from error
    for name in config.files:
        if not (directory / name).is_file():
            raise EngineError(f"The engine in {directory} lacks {name}; build it again.")
    return config


def _document(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EngineError(
            f"There is no engine in {directory}: {CONFIG_FILE} cannot be read ({error.strerror})."
        ) from error
    except ValueError as error:
        raise EngineError(f"{path} is damaged; build the engine again.") from error
    if not isinstance(document, dict):
        raise EngineError(f"{path} is damaged; build the engine again.")
    return document


def damaged_file(directory: Path, config: EngineConfig) -> str | None:
    """The first file whose content is not what was built; reads everything."""
    for name, digest in config.files.items():
        if file_digest(directory / name) != digest:
            return name
    return None
