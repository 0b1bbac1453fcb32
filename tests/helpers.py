"""Shared by tests, imported as `from helpers import wait_until`: waiting for something instead of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any

PAUSE_SECONDS = 0.005


def _failed(what: str, timeout: float) -> AssertionError:
    return AssertionError(f"waited {timeout:g} s in vain for: {what}")


async def wait_until(predicate: Callable[[], Any | Awaitable[Any]], what: str, timeout: float = 10.0) -> Any:
    """The first true value of `predicate` (plain or async). AssertionError naming `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise _failed(what, timeout)
        await asyncio.sleep(PAUSE_SECONDS)


def wait_until_sync(predicate: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
    """The same for tests that have no event loop."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise _failed(what, timeout)
        time.sleep(PAUSE_SECONDS)
    return value
