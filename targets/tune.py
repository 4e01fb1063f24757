"""Choosing an engine's kernels by measuring them, after it was built on another machine."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from farrier import __version__
from farrier.targets.backend import Progress, get_backend
from farrier.targets.detect import detect, select_target
from farrier.targets.engine import EngineConfig
from farrier.targets.engine_dir import TOKENIZER_DIR, damaged_file, read_config, seal
from farrier.targets.errors import BuildError, EngineError
from farrier.targets.loading import misfit
from farrier.targets.trial import trial_step
from farrier.targets.workspace import disk_errors, publish_over, workspace


def tune(directory: Path, on_progress: Callable[[str], Progress]) -> EngineConfig:
    """Measures the kernels of the engine in `directory` on this machine's GPU and rewrites it with the fastest ones.

    Whatever goes wrong, the engine stays as it was. `on_progress` is asked once per stage, by its title, for a
    callback of (done, in all).

    Raises FingerprintMismatchError when the engine does not fit this machine, EngineError when it is damaged,
    BuildError when it has nothing to tune, InsufficientResourcesError when disk or memory would not do.
    """
    _check_tunable(read_config(directory))
    with workspace(directory) as partial:
        config = read_config(directory)  # another process may have replaced it while we waited
        detection = detect()
        _check_tunable(config)
        if mismatch := misfit(config, detection):
            raise mismatch
        if damaged := damaged_file(directory, config):
            raise EngineError(f"The engine in {directory} is damaged ({damaged}); build it again.")
        backend, target = get_backend(config.fingerprint.backend), select_target(detection, "auto")
        backend.check(target, {config.precision}, deterministic=False)
        from farrier.targets.cuda.tune import measure, rewrite  # Triton is needed only from here on

        timings = measure(directory, config, on_progress)
        with disk_errors(directory):
            rewrite(directory, partial, config, target.device_name, timings, on_progress)
            if (directory / TOKENIZER_DIR).is_dir():
                shutil.copytree(directory / TOKENIZER_DIR, partial / TOKENIZER_DIR)
            config = seal(partial, replace(config, target=target.name, farrier_version=__version__))
            trial_step(backend.load(partial, config))
            publish_over(partial, directory)
    return config


def _check_tunable(config: EngineConfig) -> None:
    """Raises BuildError when there is nothing to choose by measuring in such an engine."""
    backend = config.fingerprint.backend
    if backend != "cuda":
        raise BuildError(f"Only engines for NVIDIA GPUs are tuned; this one is for {config.target} ({backend}).")
    if config.deterministic:
        raise BuildError(
            "A deterministic engine keeps one kernel for any number of rows, so there is nothing to tune; "
            "build it without --deterministic."
        )
