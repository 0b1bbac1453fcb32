"""A prefix cache without KV: names of blocks under LRU, as vLLM's block pool keeps them, for the fake engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from pilotfish.cache.block_hash import block_hashes, cacheable, short
from pilotfish.cloud_worker.engines.base import KvChange


class FakeBlockCache:
    """At most `blocks` names; the one used longest ago goes first, and of one prefix the end before its beginning."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks, self.block_size = blocks, block_size
        self._held: OrderedDict[bytes, None] = OrderedDict()
        self._changes: list[KvChange] = []

    def cached(self, ids: Sequence[int], salt: str) -> int:
        """How many tokens of a prefix need not be computed."""
        names = self._names(ids, salt)[: cacheable(len(ids), self.block_size)]
        hit = next((i for i, name in enumerate(names) if name not in self._held), len(names))
        return hit * self.block_size

    def computed(self, ids: Sequence[int], salt: str) -> None:
        """These were computed: their full blocks are held, and were used just now."""
        names = self._names(ids, salt)
        new = tuple(name for name in names if name not in self._held)
        for name in reversed(names):
            self._held[name] = None
            self._held.move_to_end(name)
        gone = tuple(self._held.popitem(last=False)[0] for _ in range(len(self._held) - self.blocks))
        self._changes += [KvChange("stored", new)] if new else []
        self._changes += [KvChange("removed", gone)] if gone else []

    def take(self) -> list[KvChange]:
        """What changed since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def _names(self, ids: Sequence[int], salt: str) -> list[bytes]:
        return [short(name) for name in block_hashes(ids, self.block_size, salt)]
