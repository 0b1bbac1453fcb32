"""What a device need not prefill twice: saved KV states, in memory and on disk, found by the longest shared prefix.

A conversation's state serves its next turn, its regeneration, and whatever else begins as it does, such as a shared
system prompt: it is restored and rolled back to what is shared. Both tiers are keyed by token ids and compare them.
States are opaque bytes here; `llama_sequences.py` makes and restores them. One owner, not thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pilotfish.cache.prefix_map import Shared, length, pack
from pilotfish.cache.state_folder import StateFolder
from pilotfish.cache.state_lru import SLACK, StateLru
from pilotfish.protocol import metrics

WORTH = 32  # tokens restored, from disk even, in the time that one takes to compute (`pilotfish bench edgecache`)


class Found(NamedTuple):
    """A saved state and the packed ids it is of."""

    key: bytes
    state: memoryview


@dataclass(frozen=True, slots=True)
class Statistics:
    """Since the start: a hit restored `tokens_saved` ids in all; now: `states` in memory, `bytes` of it."""

    hits: int
    misses: int
    tokens_saved: int
    evictions: int
    states: int
    bytes: int


class EdgeCache:
    """`budget_bytes` of memory, and a folder on disk if there is one."""

    def __init__(self, budget_bytes: int, folder: StateFolder | None = None) -> None:
        self._memory, self._folder = StateLru(budget_bytes), folder
        self._hits = self._misses = self._tokens_saved = 0

    @property
    def statistics(self) -> Statistics:
        """Counted so far."""
        memory = self._memory
        return Statistics(
            self._hits, self._misses, self._tokens_saved, memory.evictions, len(memory), memory.bytes
        )  # fmt: skip

    def shared(self, ids: Sequence[int]) -> int:
        """How many leading ids the state found for them would spare."""
        best = self._best(pack(ids))
        return best.ids if best else 0

    def find(self, ids: Sequence[int]) -> Found | None:
        """The state that shares most leading ids with these, unless restoring it costs more than it spares."""
        key = pack(ids)
        while best := self._best(key):
            if (state := self._state(best.key)) is not None:
                return Found(best.key, state)
        return None

    def _state(self, key: bytes) -> memoryview | None:
        """From memory, else from disk; None if it was gone or damaged there: it is no longer listed then."""
        state = self._memory.get(key)
        if state is None and self._folder is not None and (state := self._folder.load(key)) is not None:
            self._keep(key, state)
        return state

    def _best(self, key: bytes) -> Shared | None:
        """Of both tiers, memory first among equals."""
        candidates = [self._memory.longest(key), self._folder.longest(key) if self._folder is not None else None]
        worthy = [one for one in candidates if one and worthwhile(one.ids, length(one.key))]
        return max(worthy, key=lambda one: one.ids, default=None)

    def count(self, restored: int) -> None:
        """Note what came of a look-up: the ids it spared, 0 for none."""
        self._hits += restored > 0
        self._misses += restored == 0
        self._tokens_saved += restored
        metrics.LOOKUPS.labels("hit" if restored else "miss").inc()
        metrics.SAVED_TOKENS.inc(restored)

    def save(self, ids: Sequence[int], read: Callable[[], memoryview], *, closing: bool) -> None:
        """Keep the state of these ids, read only if no saved one serves for it; on disk too when a session closes."""
        if len(ids) <= SLACK:
            return
        key = pack(ids)
        to_memory = not self._memory.covers(key)
        to_disk = closing and self._folder is not None and not self._folder.covers(key)
        if not to_memory and not to_disk:
            return
        state = read()
        if to_memory:
            self._keep(key, state)
        if to_disk and self._folder is not None:
            self._folder.save(key, state)

    def _keep(self, key: bytes, state: memoryview) -> None:
        before = self._memory.evictions
        self._memory.put(key, state)
        metrics.EVICTIONS.inc(self._memory.evictions - before)
        metrics.CACHE_BYTES.set(self._memory.bytes)

    def drop(self, key: bytes) -> None:
        """Forget a state that turned out not to fit, and its file."""
        self._memory.drop(key)
        if self._folder is not None:
            self._folder.drop(key)

    def close(self) -> None:
        """Finish writing, free the memory."""
        if self._folder is not None:
            self._folder.close()
        self._memory.clear()
        metrics.CACHE_BYTES.set(0)


def worthwhile(shared: int, tokens: int) -> bool:
    """Whether restoring a state of `tokens` ids for the first `shared` of them is faster than computing those."""
    return shared > SLACK and shared * WORTH >= tokens
