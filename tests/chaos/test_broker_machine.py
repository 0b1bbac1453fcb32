"""The streams against crashes, stalls, duplicates and a Redis that comes back empty: no job is lost, none is doubled.

Real Redis, the product's EdgeBroker and Ingress, and a model that knows where every job must be: waiting, held by
somebody, or answered. A lease that ran out and a beat that went stale are rules of the game, not seconds to wait. At
the end of every game one healthy worker is left, and it must answer all that is owed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from typing import TypeVar
from unittest.mock import patch

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
from rigs import TARGET, job

from nightly import NIGHTLY, STEPS_AT_LEAST, control, played
from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.codec import decode
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.errors import NoWorker
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Refusal, ToEdge, ToWorker

pytestmark = pytest.mark.slow

WORKERS = ("w1", "w2", "w3")
STATE = {"state": "serving"}
T = TypeVar("T")


async def _until(what: Awaitable[T]) -> T:
    return await what


def number(delivery: Delivery) -> int:
    """Which job it is."""
    return int(decode(delivery.payload, ToWorker).round)


class BrokerMachine(RuleBasedStateMachine):
    """See the module docstring."""

    steps = 0
    runner: asyncio.Runner
    redis: Redis

    @initialize()
    def begin(self) -> None:
        self.run(self.redis.flushall())
        self.edge = EdgeBroker(self.redis, keys.DEFAULT_TENANT, "edge1", "boot1")
        self.workers: dict[str, Ingress] = {}
        self.next_job = 0
        self.owed: set[int] = set()  # published and never answered for good
        self.held: dict[str, dict[int, Delivery]] = {}  # by worker, what it believes it holds
        self.replies: Counter[int] = Counter()  # said, of each job
        for name in WORKERS:
            self._open(name)

    def run(self, what: Awaitable[T]) -> T:
        return self.runner.run(_until(what))

    def _open(self, name: str) -> None:
        self.workers[name], self.held[name] = Ingress(self.redis, TARGET, name), {}
        self.run(self.workers[name].open())
        self.run(self.workers[name].beat(STATE))

    # --- the edge --------------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(["", *WORKERS]), copies=st.sampled_from([1, 1, 1, 2]))
    def publish(self, worker: str, copies: int) -> None:
        """To anyone, or to the one who served last, which may be dead and buried; now and then twice."""
        try:
            for _ in range(copies):
                self.run(self.edge.publish(TARGET, worker, job(round=self.next_job)))
        except NoWorker:
            assert not self.workers, "somebody has opened its streams"
            return
        self.owed.add(self.next_job)
        self.next_job += 1

    # --- workers ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), room=st.integers(1, 6))
    def pick_up(self, data: st.DataObject, room: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        self._take(name, self.run(self.workers[name].pick_up(room, 1)))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), expired=st.booleans(), room=st.integers(0, 6))
    def sweep(self, data: st.DataObject, expired: bool, room: int) -> None:
        """With `expired`, every lease but this worker's own has run out: its peers stalled."""
        name = data.draw(st.sampled_from(sorted(self.workers)))
        self.run(self.workers[name].beat(STATE))
        with patch.object(keys, "LEASE_MS", 0 if expired else 3_600_000):
            self._take(name, self.run(self.workers[name].sweep(room)))

    def _take(self, name: str, deliveries: list[Delivery]) -> None:
        for one in deliveries:
            self.held[name][id(one)] = one

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data(), last=st.sampled_from([True, True, False]))
    def reply(self, data: st.DataObject, last: bool) -> None:
        """Perhaps by one that stalled, whose lease a peer has taken over: a second answer, and no harm."""
        name = data.draw(st.sampled_from(sorted(name for name, held in self.held.items() if held)))
        key = data.draw(st.sampled_from(sorted(self.held[name])))
        self._reply(name, key, last=last)

    def _reply(self, name: str, key: int, *, last: bool) -> None:
        delivery = self.held[name][key]
        answer = Refusal(code="overloaded", worker=name, round=number(delivery))
        self.run(self.workers[name].reply(delivery, answer, last=last))
        self.replies[number(delivery)] += 1
        if last:
            del self.held[name][key]
            self.owed.discard(number(delivery))

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """A job that raised: its lease runs out."""
        name = data.draw(st.sampled_from(sorted(name for name, held in self.held.items() if held)))
        key = data.draw(st.sampled_from(sorted(self.held[name])))
        self.workers[name].release(self.held[name].pop(key))

    # --- crashes ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), word=st.booleans())
    def a_worker_ends(self, data: st.DataObject, word: bool) -> None:
        """With a `word` it drains; else it is killed, and its beat goes stale."""
        name = data.draw(st.sampled_from(sorted(self.workers)))
        gone = self.workers.pop(name)
        del self.held[name]
        if word:
            self.run(gone.leave())
        elif self.run(self.redis.exists(keys.workers(TARGET))):
            self.run(self.redis.zadd(keys.workers(TARGET), {name: 1}))

    @rule(name=st.sampled_from(WORKERS))
    def a_worker_comes(self, name: str) -> None:
        if name not in self.workers:
            self._open(name)

    @rule()
    def redis_comes_back_empty(self) -> None:
        """All it held is lost, and it says so by having no streams; the edge's timers are the remedy."""
        self.run(self.redis.flushall())
        self.owed.clear()
        self.replies.clear()
        for name, worker in self.workers.items():
            worker.held.clear()
            self.held[name] = {}
            self.run(worker.open())

    # --- what holds after every step ---------------------------------------------------------------------------

    @invariant()
    def every_job_that_is_owed_is_in_a_stream(self) -> None:
        type(self).steps += 1
        if not hasattr(self, "edge"):
            return
        lying = Counter(number for _, number in self.run(self._lying()))
        assert self.owed <= set(lying)

    @invariant()
    def every_reply_is_heard_as_often_as_it_was_said(self) -> None:
        if hasattr(self, "edge"):
            said = self.run(self.redis.xrange(keys.replies(keys.DEFAULT_TENANT, "edge1")))
            heard = Counter(decode(fields[b"m"], ToEdge).round for _, fields in said)
            assert heard == self.replies

    async def _lying(self) -> list[tuple[str, int]]:
        """(stream, job) of everything that lies in a stream."""
        found = []
        for name in (keys.ANY, *WORKERS):
            stream = keys.jobs(TARGET, keys.DEFAULT_TENANT, name)
            for _, fields in await self.redis.xrange(stream):
                found.append((stream, decode(fields[b"m"], ToWorker).round))
        return found

    def teardown(self) -> None:
        """One healthy worker is left."""
        if not hasattr(self, "edge"):
            return
        for name in sorted(self.workers):
            del self.workers[name]
            self.run(self.redis.zadd(keys.workers(TARGET), {name: 1}))
        self.held = {}
        self._open("w9")
        for _ in range(8):
            if not self.run(self._lying()):
                break
            self.pick_up_all("w9")
        assert not self.run(self._lying()), "jobs lie in a stream and nobody takes them"
        assert not self.owed

    def pick_up_all(self, name: str) -> None:
        self._take(name, self.run(self.workers[name].pick_up(64, 1)))
        self.run(self.workers[name].beat(STATE))
        with patch.object(keys, "LEASE_MS", 0):
            self._take(name, self.run(self.workers[name].sweep(64)))
        for key in sorted(self.held[name]):
            self._reply(name, key, last=True)


def play(machine: type[BrokerMachine], redis_url: str, how: settings) -> None:
    """Games on one connection pool, closed whatever happens."""
    with asyncio.Runner() as runner:
        machine.runner, machine.redis = runner, connect(redis_url)
        runner.run(
            _until(machine.redis.config_set("hz", 500))
        )  # how often it looks whether a blocked client's time is up
        try:
            run_state_machine_as_test(machine, settings=how)
        finally:
            runner.run(_until(machine.redis.flushall()))
            runner.run(_until(machine.redis.config_set("hz", 10)))
            runner.run(_until(machine.redis.aclose()))


def test_no_job_is_lost_and_no_reply_doubled(redis_url: str) -> None:
    play(BrokerMachine, redis_url, played(suite=25, nightly=300))
    assert BrokerMachine.steps >= (STEPS_AT_LEAST if NIGHTLY else 100)


class AcknowledgesFirst(Ingress):
    """Loses what it holds when it dies: the order of things that DESIGN forbids."""

    async def pick_up(self, count: int, block_ms: int, *, passed_on: bool = True) -> list[Delivery]:
        found = await super().pick_up(count, block_ms, passed_on=passed_on)
        for one in found:
            await self.redis.xack(one.stream, keys.GROUP_WORKERS, one.entry_id)
            await self.redis.xdel(one.stream, one.entry_id)
        return found


class NeverLooksAtTheDead(Ingress):
    async def _left_behind(self, dead: list[str], count: int) -> list[Delivery]:
        return []


class StealsNothing(Ingress):
    async def _expired(self, count: int) -> list[Delivery]:
        return []


@pytest.mark.parametrize("broken", [AcknowledgesFirst, NeverLooksAtTheDead, StealsNothing])
def test_the_machine_notices_a_broken_broker(broken: type[Ingress], redis_url: str) -> None:
    machine = type(broken.__name__, (BrokerMachine,), {})
    with patch(f"{__name__}.Ingress", broken), pytest.raises(AssertionError):
        play(machine, redis_url, control())
