"""An event loop whose clock jumps: when nothing is ready, the time of the next timer has come. No I/O.

So the product's own asyncio code runs through an hour of round trips in a second, and always in the same way. What
computes takes no time; what should take time sleeps.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jump(selectors.BaseSelector):
    """Never waits: it moves the clock instead. Files are kept for the loop's own pipe and never looked at."""

    def __init__(self) -> None:
        self.now = 0.0
        self._files = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits and no timer is set: nothing will ever happen")
        self.now += timeout
        return []

    def register(self, *args: Any, **kwargs: Any) -> Any:
        return self._files.register(*args, **kwargs)

    def unregister(self, *args: Any) -> Any:
        return self._files.unregister(*args)

    def get_map(self) -> Any:
        return self._files.get_map()

    def close(self) -> None:
        self._files.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and is exact: callbacks run at the very second they were set for."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        """Seconds since the loop began."""
        return self._jump.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
