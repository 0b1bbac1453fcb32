"""The digest that binds a job and its verdict to one history: who the target is, how it draws, and every id before.

Equal digests mean equal (target, parameters, seed, ids[:base]); so a verdict that carries the digest of a session's own
history at `base` may be applied whoever made it, however late. Knows nothing of sessions or wires.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

import msgpack

from pilotfish.protocol.messages import Sampling

DIGEST_BYTES = 16


class History:
    """Token ids, append-only, with the digest of any prefix. Digests of growing prefixes cost only what is new."""

    def __init__(self, target: str, sampling: Sampling, ids: Iterable[int] = ()) -> None:
        floats = [value + 0.0 for value in (sampling.temperature, sampling.top_p, sampling.min_p)]  # -0.0 is 0.0
        header: bytes = msgpack.packb([target, *floats, sampling.top_k, sampling.seed])
        self.sampling = sampling
        self.ids = array("I", ids)
        self._origin = blake2b(header, digest_size=DIGEST_BYTES)
        self._running = self._origin.copy()
        self._hashed = 0

    def __len__(self) -> int:
        return len(self.ids)

    def extend(self, ids: Iterable[int]) -> None:
        """Append ids."""
        self.ids.extend(ids)

    def digest(self, base: int, more: Iterable[int] = ()) -> bytes:
        """Digest of ids[:base] followed by `more` (16 bytes). Raises IndexError if base lies ahead of the history."""
        if not 0 <= base <= len(self.ids):
            raise IndexError(f"base {base} outside a history of {len(self.ids)} ids")
        if base >= self._hashed:
            self._running.update(self.ids[self._hashed : base])
            self._hashed = base
            state = self._running.copy()
        else:
            state = self._origin.copy()
            state.update(self.ids[:base])
        state.update(array("I", more))
        return state.digest()
