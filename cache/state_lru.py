"""Saved KV states in memory: least recently used first out, by true bytes under a budget, found by longest prefix.

A state is opaque bytes here. One whose ids are the beginning of another's is not kept beside it: the longer one is
restored and rolled back. Knows neither llama.cpp nor files. One owner, not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict

from pilotfish.cache.prefix_map import PrefixMap, Shared
from pilotfish.cache.state_memory import resident

SLACK = (
    16  # ids: fewer are computed again rather than kept, looked for or restored (a rejected draft's tail is as long)
)
ENTRY_BYTES = 600  # a key's and a mapping's Python objects


class StateLru:
    """States by the packed ids they are of. `bytes` is what they take of the process, `evictions` counts."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.bytes = self.evictions = 0
        self._map = PrefixMap()
        self._states: OrderedDict[bytes, memoryview] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: bytes) -> bool:
        return key in self._states

    def longest(self, key: bytes) -> Shared | None:
        """See `PrefixMap.longest`."""
        return self._map.longest(key)

    def get(self, key: bytes) -> memoryview | None:
        """A state, now the most recently used one."""
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def covers(self, key: bytes) -> bool:
        """Whether a stored state serves for this one; it is then the most recently used."""
        found = self._map.covers(key, SLACK)
        return found is not None and self.get(found) is not None

    def put(self, key: bytes, state: memoryview) -> bool:
        """Keep a state, drop those it serves for, evict the oldest until it fits; False if it never can."""
        if cost(key, state) > self.budget_bytes:
            return False
        for shorter in [*self._map.covered(key, SLACK), key]:
            self.drop(shorter)
        self._make_room(cost(key, state))
        self._map.add(key)
        self._states[key] = state
        self.bytes += cost(key, state)
        return True

    def _make_room(self, n_bytes: int) -> None:
        while self.bytes + n_bytes > self.budget_bytes:
            self.drop(next(iter(self._states)))
            self.evictions += 1

    def drop(self, key: bytes) -> None:
        """Unknown keys are ignored."""
        state = self._states.pop(key, None)
        if state is not None:
            self._map.discard(key)
            self.bytes -= cost(key, state)

    def clear(self) -> None:
        """Drop everything."""
        for key in list(self._states):
            self.drop(key)


def cost(key: bytes, state: memoryview) -> int:
    """What an entry takes of the process, in bytes."""
    return resident(state.nbytes) + len(key) + ENTRY_BYTES
