"""Sessions on the sequences of one llama.cpp context: who holds what, and passes whose numbers agree.

A session keeps its sequence until another needs it (least recently used first); a new list of ids reuses the longest
common prefix. With a cache, what a session leaves is saved, and one that comes without KV gets what another computed.
`evaluate` groups the work into forward passes. With `exact` a row's logits are the same bits in
whatever company it is computed, which takes three things:
  - few rows go through other kernels than many: a pass has at least `LlamaModel.exact_rows` rows, as many of them
    with logits, and two of each sequence (attention is computed per sequence);
  - all sequences of a pass bring equally many rows, and their numbers are consecutive: llama.cpp would otherwise
    split the pass by itself, possibly leaving one row;
  - padding rows lie behind the sequence's own and are removed after the pass.
Knows nothing of drafts, draws or requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from pilotfish.cache.edge_cache import EdgeCache, worthwhile
from pilotfish.cache.llama_context import LlamaContext, Logits, Row
from pilotfish.cache.prefix_map import common_prefix, unpack
from pilotfish.protocol.errors import EngineError

SPARE = 16  # positions a context needs beyond its sessions' longest, for padding
_FILL = 4  # padding rows worth one pass saved


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence: its number, whose it is, and the ids it holds."""

    sequence: int
    session: str = ""
    ids: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Part:
    """Ids that continue a slot; logits are wanted for the last `wanted` of them. `computed` counts padding too."""

    slot: Slot
    ids: Sequence[int]
    wanted: int
    computed: int = 0
    error: str = ""


class Sequences:
    """The sequences of a context, handed to sessions. One owner, like the context itself.

    A model whose memory cannot forget a part gets no cache: a saved state is always rolled back to what is shared.
    """

    def __init__(self, context: LlamaContext, *, exact: bool, cache: EdgeCache | None = None) -> None:
        self.context, self.exact = context, exact
        self.cache = cache if context.model.rolls_back else None
        self._least = context.model.exact_rows if exact else 1
        self._free = [Slot(i) for i in reversed(range(context.sequences))]
        self._held: OrderedDict[str, Slot] = OrderedDict()

    def hold(self, session: str, busy: Container[str] = ()) -> Slot | None:
        """The session's slot, its own or the least recently used one of nobody in `busy`; None if all are busy."""
        slot = self._held.pop(session, None) or self._take(busy)
        if slot is not None:
            slot.session = session
            self._held[session] = slot
        return slot

    def _take(self, busy: Container[str]) -> Slot | None:
        if self._free:
            return self._free.pop()
        victim = next((s for s in self._held if s not in busy), None)
        if victim is None:
            return None
        slot = self._held.pop(victim)
        self._save(slot)
        self.trim(slot, 0)
        return slot

    def fit(self, slot: Slot, ids: Sequence[int]) -> int:
        """Keep what the slot shares with `ids`, at most all but its last id (whose logits are wanted): how many.

        A slot that shares nothing is given what the cache, or another session, has of them.
        """
        self._keep_shared(slot, ids)
        if self.cache and not slot.ids:
            self._restore(slot, ids)
            self._keep_shared(slot, ids)
            self.cache.count(len(slot.ids))
        return len(slot.ids)

    def _keep_shared(self, slot: Slot, ids: Sequence[int]) -> None:
        self.trim(slot, min(common_prefix(slot.ids, ids), len(ids) - 1))

    def _restore(self, slot: Slot, ids: Sequence[int]) -> None:
        assert self.cache
        wanted = ids[:-1]
        neighbour = max(self._held.values(), key=lambda one: common_prefix(one.ids, wanted))
        shared = common_prefix(neighbour.ids, wanted)
        if shared > self.cache.shared(wanted) and worthwhile(shared, len(neighbour.ids)):
            self._save(neighbour)
        while found := self.cache.find(wanted):
            if self._holds(slot, found.state, found_ids := unpack(found.key)):
                slot.ids = found_ids
                return
            self.cache.drop(found.key)

    def _holds(self, slot: Slot, state: memoryview, ids: Sequence[int]) -> bool:
        """Put a state into a slot; False, and the slot empty, if it is not one of these ids in this context."""
        with suppress(EngineError):
            self.context.set_state(slot.sequence, state)
        fits = self.context.length(slot.sequence) == len(ids)
        if not fits:
            self._clear(slot)
        return fits

    def _save(self, slot: Slot, *, closing: bool = False) -> None:
        if self.cache:
            self.cache.save(slot.ids, lambda: self.context.state(slot.sequence), closing=closing)

    def trim(self, slot: Slot, length: int) -> None:
        """Roll a slot back to `length` tokens, or to nothing where the memory refuses a part."""
        if length >= len(slot.ids):
            return
        if length > 0 and self.context.remove(slot.sequence, length):
            del slot.ids[length:]
        else:
            self._clear(slot)

    def _clear(self, slot: Slot) -> None:
        self.context.remove(slot.sequence, -1)
        slot.ids.clear()

    def forget(self, session: str) -> None:
        """Free a session's sequence; unknown sessions are ignored."""
        slot = self._held.pop(session, None)
        if slot is not None:
            self._save(slot, closing=True)
            self._clear(slot)
            slot.session = ""
            self._free.append(slot)
            self._free.sort(key=lambda s: -s.sequence)  # low numbers first: neighbours share passes

    def close(self) -> None:
        """Free every session's sequence, then the cache: what they hold is on disk if it has a folder."""
        for session in list(self._held):
            self.forget(session)
        if self.cache:
            self.cache.close()

    def __contains__(self, session: str) -> bool:
        return session in self._held

    def evaluate(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Logits]]:
        """Compute every part, at most `n_batch` ids each, in few passes; yields (part, logits [wanted, vocab]).

        Logits are a view valid until the next item is asked for. A pass that fails sets `error` on its parts, clears
        their slots and yields empty logits; the other parts are unaffected.
        """
        for group in self._groups(parts):
            try:
                found = self._pass(group, self._width(group))
            except EngineError as error:
                for part in group:
                    self._clear(part.slot)
                    part.error = str(error)
                found = [np.empty((0, self.context.model.vocab_size), np.float32)] * len(group)
            yield from zip(group, found, strict=True)

    def _width(self, group: Sequence[Part]) -> int:
        """Rows per sequence: the longest part, and enough for the pass as a whole; attention is per sequence."""
        longest = max(len(p.ids) for p in group)
        return max(longest, 2, -(-self._least // len(group))) if self.exact else longest

    def _pass(self, group: Sequence[Part], width: int) -> list[Logits]:
        """One forward pass, `width` rows of each part; afterwards the slots hold exactly their parts' ids."""
        flags = self._flags(group, width)
        logits = self.context.decode([row for p, flag in zip(group, flags, strict=True) for row in _rows(p, flag)])
        found, offset = [], 0
        for part, flag in zip(group, flags, strict=True):
            first = offset + sum(flag[: len(part.ids) - part.wanted])
            found.append(logits[first : first + part.wanted])
            offset += sum(flag)
            part.computed = width
            part.slot.ids.extend(part.ids)
            if width > len(part.ids):
                self.context.remove(part.slot.sequence, len(part.slot.ids))
        return found

    def _flags(self, group: Sequence[Part], width: int) -> list[list[bool]]:
        """Which of each part's `width` rows yield logits: those it wants, and others if a pass needs more."""
        flags = [[len(p.ids) - p.wanted <= i < len(p.ids) for i in range(width)] for p in group]
        wanted = sum(p.wanted for p in group)
        extra = self._least - wanted if wanted else 0
        for flag in flags:
            for i in range(width - 1, -1, -1):
                if extra > 0 and not flag[i]:
                    flag[i] = True
                    extra -= 1
        return flags

    def _groups(self, parts: Sequence[Part]) -> list[list[Part]]:
        groups: list[list[Part]] = []
        for part in sorted(parts, key=lambda p: p.slot.sequence):
            if groups and self.exact and self._joins(groups[-1], part):
                groups[-1].append(part)
            else:
                groups.append([part])
        return groups

    def _joins(self, group: Sequence[Part], part: Part) -> bool:
        """Whether a part may share the pass of its left neighbours, and whether the padding it costs is worth it."""
        together = [*group, part]
        sizes = [max(2, len(p.ids)) for p in together]
        padding = max(sizes) * len(sizes) - sum(sizes)
        return (
            part.slot.sequence == group[-1].slot.sequence + 1
            and padding <= _FILL * len(group)
            and max(sizes) - min(sizes) < SPARE
            and max(sizes) * len(sizes) <= self.context.n_batch
            and sum(p.wanted for p in together) <= self.context.outputs
        )


def _rows(part: Part, flags: Sequence[bool]) -> Iterator[Row]:
    """A part's rows, one per flag; those beyond its ids repeat the last one."""
    start, n, sequence = len(part.slot.ids), len(part.ids), part.slot.sequence
    for i, wanted in enumerate(flags):
        yield Row(part.ids[min(i, n - 1)], start + i, sequence, wanted)
