"""Ending asyncio's tasks. Knows nothing of what they do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

AGAIN_SECONDS: Final = 0.05  # between two cancellations of a task


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks that talk to Redis, until they end; what they raise is dropped.

    Once is not enough in Python 3.11: redis-py sends within `asyncio.wait_for`, which there loses a cancellation that
    arrives together with its result.
    """
    ending = list(tasks)
    while pending := [task for task in ending if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=AGAIN_SECONDS)
    await asyncio.gather(*ending, return_exceptions=True)
