"""Tests that need an NVIDIA GPU; skipped without one."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    own = [item for item in items if Path(__file__).parent in item.path.parents]  # it is given those of all folders
    reason = _missing() if own else None
    if reason is not None:
        for item in own:
            item.add_marker(pytest.mark.skip(reason=reason))


def _missing() -> str | None:
    try:
        from farrier.targets.cuda.device import open_device

        open_device()
    except Exception as error:
        return f"needs an NVIDIA GPU and farrier[cuda]: {error}"
    return None
