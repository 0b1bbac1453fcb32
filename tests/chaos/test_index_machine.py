"""The prefix index against what a network, crashes and an empty Redis do to it: never a block that nobody holds.

Real Redis, the product's scripts and mirror, and a model of what the index must say: a dict of workers, each with its
epoch, its sequence number and its blocks. Publications are lost, doubled, late and out of order; workers die, come back
under their old name, and tell everything anew. The end of a lease is a rule of the game, not two seconds to wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.asyncio import Redis

from nightly import NIGHTLY, STEPS_AT_LEAST, control, played
from pilotfish.cache.block_hash import block_hashes, short
from pilotfish.cache.block_mirror import BlockMirror, Changes
from pilotfish.cache.prefix_index import (
    AFFINITY_BLOCKS,
    HOP_MS,
    PUBLISH,
    RATE_UNKNOWN,
    REAP,
    REGISTER,
    ROUTE,
    PrefixIndex,
    Published,
    Share,
)
from pilotfish.protocol import keys
from pilotfish.protocol.broker import connect

pytestmark = pytest.mark.slow

TARGET = "a" * 16
BLOCK = 16
BUCKETS = 4
LEASE_MS = 3_600_000  # it ends when the machine says so
NAMES = ("w1", "w2", "w3")
SHARED, LONG = 4, 12  # three prompts of twelve blocks begin with the same four
PROMPTS = [
    [short(name) for name in block_hashes([*range(SHARED * BLOCK), *[n] * ((LONG - SHARED) * BLOCK)], BLOCK)]
    for n in range(3)
]
T = TypeVar("T")


async def _until(what: Awaitable[T]) -> T:
    return await what


def prefix_held(prompt: Sequence[bytes], held: set[bytes]) -> int:
    """Length of the longest prefix whose blocks are all held."""
    return next((n for n, block in enumerate(prompt) if block not in held), len(prompt))


@dataclass
class Worker:
    """A worker's own side: its engine's prompts, the mirror of its blocks, its part of the index if it has one."""

    lengths: list[int] = field(default_factory=lambda: [0] * len(PROMPTS))
    mirror: BlockMirror = field(default_factory=BlockMirror)
    share: Share | None = None

    @property
    def held(self) -> set[bytes]:
        return {block for prompt, n in zip(PROMPTS, self.lengths, strict=True) for block in prompt[:n]}


@dataclass
class Entry:
    """What the index must say of one worker."""

    epoch: int
    seq: int = 0
    blocks: set[bytes] = field(default_factory=set)
    queued: int = 0
    rate: float = 0.0
    alive: bool = True


class Batch(NamedTuple):
    """A publication on its way; `share` as it was when it left."""

    share: Share
    changes: Changes
    done: int


class IndexMachine(RuleBasedStateMachine):
    """See the module docstring."""

    steps = 0
    runner: asyncio.Runner
    redis: Redis
    index_class: type[PrefixIndex] = PrefixIndex

    @initialize()
    def begin(self) -> None:
        self.run(self.redis.flushall())
        self.index = self.index_class(self.redis, TARGET, lease_ms=LEASE_MS)
        self.workers = {name: Worker() for name in NAMES}
        self.model: dict[str, Entry] = {}
        self.late: list[Batch] = []
        for name in NAMES:
            self._register(name)

    def run(self, what: Awaitable[T]) -> T:
        return self.runner.run(_until(what))

    # --- engines ---------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), prompt=st.integers(0, 2), length=st.integers(0, LONG))
    def an_engine_computes_or_evicts(self, name: str, prompt: int, length: int) -> None:
        """Blocks come in the order of their prompt and go in the other."""
        worker = self.workers[name]
        before = worker.held
        worker.lengths[prompt] = length
        after, order = worker.held, PROMPTS[prompt]
        worker.mirror.stored(block for block in order if block in after - before)
        worker.mirror.removed(block for block in reversed(order) if block in before - after)

    @rule(name=st.sampled_from(NAMES))
    def an_engine_dies(self, name: str) -> None:
        """Its worker lives, and tells an empty cache by a new epoch."""
        worker = self.workers[name]
        worker.lengths = [0] * len(PROMPTS)
        worker.mirror.cleared()
        worker.share = None

    # --- telling ---------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES))
    def tell_anew(self, name: str) -> None:
        """Register, and publish again from the mirror: whoever lost its share does, and others may."""
        self._register(name)

    def _register(self, name: str, rate: float = 0.0) -> None:
        worker, old = self.workers[name], self.model.get(name)
        worker.share = self.run(self.index.register(name, BUCKETS, rate))
        worker.mirror.retell()
        assert old is None or worker.share.epoch > old.epoch
        self.model[name] = Entry(worker.share.epoch, rate=rate)

    @rule(
        name=st.sampled_from(NAMES),
        most=st.integers(1, 8),
        done=st.sampled_from([0, 0, 40]),
        fate=st.sampled_from(["arrives", "arrives", "arrives", "twice", "late", "lost", "vanishes"]),
    )
    def publish(self, name: str, most: int, done: int, fate: str) -> None:
        """`lost`: no answer came, and the worker knows. `vanishes`: it believes it was told; `late`: so far."""
        worker = self.workers[name]
        if worker.share is None:
            return
        batch = Batch(replace(worker.share), worker.mirror.take(most), done)
        if fate in ("arrives", "twice"):
            outcome = self._arrive(batch)
            worker.share = replace(worker.share, seq=batch.share.seq + 1) if outcome is Published.DONE else None
            if fate == "twice":
                assert self._arrive(batch) is outcome
            return
        if fate == "late":
            self.late.append(batch)
        worker.share = None if fate == "lost" else replace(worker.share, seq=worker.share.seq + 1)

    @precondition(lambda self: self.late)
    @rule(data=st.data(), again=st.booleans())
    def a_late_one_arrives(self, data: st.DataObject, again: bool) -> None:
        """In any order, perhaps in another epoch, perhaps not for the last time."""
        at = data.draw(st.integers(0, len(self.late) - 1))
        self._arrive(self.late[at] if again else self.late.pop(at))

    def _arrive(self, batch: Batch) -> Published:
        """At Redis, and at the model."""
        share = replace(batch.share)
        got = self.run(self.index.publish(share, *batch.changes, done_tokens=batch.done))
        assert got is self._expected(batch)
        return got

    def _expected(self, batch: Batch) -> Published:
        entry = self.model.get(batch.share.worker)
        if entry is None or entry.epoch != batch.share.epoch:
            return Published.FENCED
        if entry.seq == batch.share.seq + 1:
            return Published.DONE  # a copy: nothing happens twice
        if entry.seq != batch.share.seq:
            return Published.LOST
        entry.seq += 1
        entry.blocks = (entry.blocks | set(batch.changes.stored)) - set(batch.changes.removed)
        entry.queued = max(0, entry.queued - batch.done)
        return Published.DONE

    @rule(name=st.sampled_from(NAMES), queued=st.sampled_from([-1, -1, 0, 300]), rate=st.sampled_from([0.0, 500.0]))
    def beat(self, name: str, queued: int, rate: float) -> None:
        """A slow one's lease may have ended: if nobody removed it, it is back with all it said."""
        worker, entry = self.workers[name], self.model.get(name)
        if worker.share is None:
            return
        ours = entry is not None and entry.epoch == worker.share.epoch
        assert self.run(self.index.beat(worker.share, rate, queued)) == ours
        if not ours or entry is None:
            worker.share = None
            return
        entry.alive, entry.rate = True, rate
        entry.queued = queued if queued >= 0 else entry.queued

    # --- crashes ---------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), back=st.booleans())
    def a_worker_is_killed(self, name: str, back: bool) -> None:
        """Its lease runs on. With `back` a new process takes its name at once."""
        self.workers[name] = Worker()
        if back:
            self._register(name)

    @rule(name=st.sampled_from(NAMES))
    def a_lease_ends(self, name: str) -> None:
        self.run(self.redis.zadd(keys.index(TARGET), {name: 1}, xx=True))
        if name in self.model:
            self.model[name].alive = False

    @rule(buckets=st.sampled_from([1, 3, 128]))
    def reap(self, buckets: int) -> None:
        self.run(self.index.reap(buckets))
        self.model = {name: entry for name, entry in self.model.items() if entry.alive}

    @rule()
    def redis_is_flushed(self) -> None:
        self.run(self.redis.flushall())
        self.model.clear()

    # --- what holds after every step ---------------------------------------------------------------------------

    @invariant()
    def the_index_says_what_the_model_does(self) -> None:
        type(self).steps += 1
        if not hasattr(self, "model"):
            return
        for prompt in PROMPTS:
            told = {one.worker: one for one in self.run(self.index.look(prompt))}
            assert {name: (one.epoch, one.blocks, one.queued, one.hit) for name, one in told.items()} == {
                name: (entry.epoch, len(entry.blocks), entry.queued, prefix_held(prompt, entry.blocks))
                for name, entry in self.model.items() if entry.alive
            }  # fmt: skip

    @invariant()
    def who_has_told_everything_is_told_right(self) -> None:
        for name, worker in getattr(self, "workers", {}).items():
            entry = self.model.get(name)
            fresh = entry and worker.share and (entry.epoch, entry.seq) == (worker.share.epoch, worker.share.seq)
            if entry and fresh and not worker.mirror.untold:
                assert entry.blocks == worker.held

    @rule(prompt=st.integers(0, 2), blocks=st.integers(0, LONG), me=st.sampled_from([*NAMES, "nobody"]))
    def route(self, prompt: int, blocks: int, me: str) -> None:
        """To one that lives, by what it holds, and to none that would take longer than another."""
        asked, tokens = PROMPTS[prompt][:blocks], blocks * BLOCK + 5
        alive = {name: entry for name, entry in self.model.items() if entry.alive}
        route = self.run(self.index.route(me, tokens, BLOCK, asked))
        assert (route is None) == (not alive)
        if route is None:
            return
        chosen = alive[route.worker]  # KeyError: it was sent to a dead one
        hit = prefix_held(asked, chosen.blocks)
        assert (route.blocks, route.tokens) == (hit, tokens - hit * BLOCK)
        costs = self._seconds(alive, asked, tokens, me)
        assert costs[route.worker] <= min(costs.values()) + 1e-9
        chosen.queued += route.tokens

    def _seconds(self, alive: dict[str, Entry], asked: Sequence[bytes], tokens: int, me: str) -> dict[str, float]:
        rates = [entry.rate for entry in alive.values() if entry.rate]
        unknown = sum(rates) / len(rates) if rates else RATE_UNKNOWN
        hits = {name: prefix_held(asked, entry.blocks) for name, entry in alive.items()}
        return {
            name: (entry.queued + tokens - BLOCK * (hits[name] if hits[name] >= AFFINITY_BLOCKS else 0))
            / (entry.rate or unknown) + (name != me) * HOP_MS / 1000
            for name, entry in alive.items()
        }  # fmt: skip

    def teardown(self) -> None:
        """The dead are removed to the last key, and the living, once they have told, hold what their engines do."""
        if not hasattr(self, "model"):
            return
        for name, worker in self.workers.items():
            self._register(name)
            while worker.mirror.untold:
                self.publish(name, 8, 0, "arrives")
        self.the_index_says_what_the_model_does()
        self.who_has_told_everything_is_told_right()
        while self.run(self.index.reap(3)):
            pass
        epochs = {entry.epoch for entry in self.model.values()}
        assert {int(key.split(b":")[3]) for key in self.run(self._buckets())} <= epochs
        self.the_index_says_what_the_model_does()

    async def _buckets(self) -> list[bytes]:
        return [key async for key in self.redis.scan_iter(keys.index_bucket(TARGET, "*", "*", "*"))]


def play(machine: type[IndexMachine], redis_url: str, how: settings) -> None:
    """Games on one connection pool, closed whatever happens."""
    with asyncio.Runner() as runner:
        machine.runner, machine.redis = runner, connect(redis_url)
        try:
            run_state_machine_as_test(machine, settings=how)
        finally:
            runner.run(_until(machine.redis.flushall()))
            runner.run(_until(machine.redis.aclose()))


def test_the_index_never_names_a_block_that_nobody_holds(redis_url: str) -> None:
    play(IndexMachine, redis_url, played(suite=30, nightly=400))
    assert IndexMachine.steps >= (STEPS_AT_LEAST if NIGHTLY else 100)


# --- negative control: what the machine must notice ------------------------------------------------------------------


def without(script: str, *lines: tuple[str, str]) -> type[PrefixIndex]:
    """An index one of whose scripts lacks something."""
    broken = script
    for old, new in lines:
        assert broken.count(old) == 1, old
        broken = broken.replace(old, new)

    class Broken(PrefixIndex):
        async def _run(self, asked: str, names: Sequence[str], *args: Any) -> Any:
            if asked is not script:
                return await super()._run(asked, names, *args)
            return await self.redis.eval(broken, len(names), *names, *args)  # type: ignore[misc]

    return Broken


BROKEN = {
    "another epoch's batch counts": without(PUBLISH, ("known[1] ~= ARGV[1]", "not known[1]")),
    "a batch after a lost one counts": without(
        PUBLISH, ("if known[2] + 1 ~= tonumber(ARGV[2]) then return 0 end\n", "")
    ),
    "a copy counts again": without(PUBLISH, ("if known[2] == ARGV[2] then return 1 end\n", "")),
    "a restart keeps its epoch": without(
        REGISTER,
        ("epoch = math.max(now, old[1] + 1)", "epoch = old[1]"),
        ("while redis.call('HEXISTS', KEYS[3], epoch .. ':' .. ARGV[1]) == 1 do epoch = epoch + 1 end\n", ""),
    ),
    "the dead are routed to": without(ROUTE, ("KEYS[1], now, '+inf'", "KEYS[1], '-inf', '+inf'")),
    "the living are removed": without(REAP, ("'-inf', '(' .. now", "'-inf', '+inf'")),
    "what a restart left stays": without(
        REGISTER, ("redis.call('HSET', KEYS[3], old[1] .. ':' .. ARGV[1], old[2])\n", "")
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_machine_notices_a_broken_index(broken: str, redis_url: str) -> None:
    machine = type("Broken", (IndexMachine,), {"index_class": BROKEN[broken]})
    with pytest.raises((AssertionError, KeyError)):
        play(machine, redis_url, control())
