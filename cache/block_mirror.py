"""A picture of which blocks one engine holds, kept from what the engine says, and what a reader was not yet told.

An engine may hold one name in several blocks (two requests computed the same prefix at a time), so names are counted:
a name is held until the last of its blocks is evicted. Values in, values out; knows neither engine nor index.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple


class Changes(NamedTuple):
    """Names that came to be held, and that are held no more."""

    stored: list[bytes]
    removed: list[bytes]


class BlockMirror:
    """Names held by one engine, each with the number of its blocks."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._untold: dict[bytes, bool] = {}  # name -> whether the reader believes it is held
        self.strays = 0  # evictions of what was never stored: the engine's account was not whole

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: object) -> bool:
        return name in self._blocks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._blocks)

    def blocks(self, name: bytes) -> int:
        """How many blocks of the engine have this name."""
        return self._blocks.get(name, 0)

    def stored(self, names: Iterable[bytes]) -> None:
        """One block more for each name."""
        for name in names:
            before = self._blocks.get(name, 0)
            self._blocks[name] = before + 1
            if not before:
                self._turned(name, told=False)

    def removed(self, names: Iterable[bytes]) -> None:
        """One block less for each name."""
        for name in names:
            before = self._blocks.get(name, 0)
            if before > 1:
                self._blocks[name] = before - 1
            elif before:
                del self._blocks[name]
                self._turned(name, told=True)
            else:
                self.strays += 1

    def cleared(self) -> None:
        """The engine holds nothing."""
        for name in self._blocks:
            self._turned(name, told=True)
        self._blocks.clear()

    def _turned(self, name: bytes, *, told: bool) -> None:
        """Held or not has changed: changed back, there is nothing to tell."""
        if self._untold.pop(name, None) is None:
            self._untold[name] = told

    # --- telling ---------------------------------------------------------------------------------------------

    @property
    def untold(self) -> int:
        """How many names the reader has wrong."""
        return len(self._untold)

    def take(self, most: int) -> Changes:
        """The oldest of what is untold; it counts as told from now on."""
        names = list(islice(self._untold, most))
        believed = [(name, self._untold.pop(name)) for name in names]
        return Changes([name for name, held in believed if not held], [name for name, held in believed if held])

    def retell(self) -> None:
        """The reader knows nothing: everything is untold."""
        self._untold = dict.fromkeys(self._blocks, False)
