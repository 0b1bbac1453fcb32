"""Which of many stored lists of ids shares the longest prefix with a new one: a sorted list and bisection.

A key is a list of ids packed big-endian, so that bytes sort as the ids do. Of all keys, one that shares most with
another stands right beside the place where that one belongs: a look-up compares ids, never hashes, and costs two
comparisons however many keys there are. Pure: knows nothing of what is stored under a key.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

ID_BYTES = 4


class Shared(NamedTuple):
    """A stored key, and how many leading ids it shares with the one asked for."""

    key: bytes
    ids: int


def pack(ids: Sequence[int]) -> bytes:
    """Ids (0 to 2^31 - 1) as a key."""
    return np.asarray(ids, ">u4").tobytes()


def unpack(key: bytes) -> list[int]:
    """The ids of a key."""
    ids: list[int] = np.frombuffer(key, ">u4").tolist()
    return ids


def length(key: bytes) -> int:
    """How many ids a key has."""
    return len(key) // ID_BYTES


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items two lists share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low = 0  # a[:low] == b[:low]
    while n - low > 1:
        middle = (low + n) // 2
        low, n = (middle, n) if a[low:middle] == b[low:middle] else (low, middle)
    return low


class PrefixMap:
    """A set of keys, ordered."""

    def __init__(self) -> None:
        self._keys: list[bytes] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._keys)

    def __contains__(self, key: bytes) -> bool:
        at = bisect_left(self._keys, key)
        return at < len(self._keys) and self._keys[at] == key

    def add(self, key: bytes) -> None:
        """Once, however often it is added."""
        if key not in self:
            insort(self._keys, key)

    def discard(self, key: bytes) -> None:
        """Unknown keys are ignored."""
        if key in self:
            del self._keys[bisect_left(self._keys, key)]

    def longest(self, key: bytes) -> Shared | None:
        """The stored key that shares most with this one, the shortest of several; None if none shares an id."""
        at = bisect_left(self._keys, key)
        beside = self._keys[max(0, at - 1) : at + 1]
        shared = max((common_prefix(key, one) // ID_BYTES for one in beside), default=0)
        if not shared:
            return None
        prefix = key[: shared * ID_BYTES]
        end = bisect_left(self._keys, prefix + b"\xff")  # no id begins with this byte
        return Shared(min(self._keys[bisect_left(self._keys, prefix) : end], key=len), shared)

    def covers(self, key: bytes, slack: int) -> bytes | None:
        """A stored key that shares all but at most `slack` of this one's ids."""
        found = self.longest(key)
        return found.key if found and found.ids >= length(key) - slack else None

    def covered(self, key: bytes, slack: int) -> list[bytes]:
        """The other stored keys of which this one shares all but at most `slack` ids."""
        cut = slack * ID_BYTES
        return [one for one in self._keys if one != key and key.startswith(one[: max(0, len(one) - cut)])]
