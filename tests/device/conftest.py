"""Tests that need an NVIDIA GPU; skipped without one."""

import pytest


def pytest_collection_modifyitems(items):
    reason = _missing()
    if reason is not None:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=reason))


def _missing() -> str | None:
    try:
        from farrier.targets.cuda.device import open_device

        open_device()
    except Exception as error:
        return f"needs an NVIDIA GPU and farrier[cuda]: {error}"
    return None
