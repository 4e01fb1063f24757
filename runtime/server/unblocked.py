"""Keeps long work on text off the event loop."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

_LONG = 8192
"""Characters or tokens that take about a millisecond; a thread costs a tenth of that."""


async def unblocked(length: int, work: Callable[[], Result]) -> Result:
    """The result of `work`, which takes time in proportion to `length` (characters or tokens)."""
    return await asyncio.to_thread(work) if length > _LONG else work()
