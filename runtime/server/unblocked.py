"""Keeps long work on text off the event loop."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

LONG = 8192
"""Characters or tokens that take about a millisecond to go through; a thread costs a tenth of that."""


async def unblocked(work: Callable[[], Result], *, is_long: bool) -> Result:
    return await asyncio.to_thread(work) if is_long else work()
