"""Jobs on their way to a broker that is made up: slow, away, or without workers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from rigs import PROMPT, TARGET, job

from helpers import wait_until
from pilotfish.edge_agent.outbox import Inbox, Outbox, Unsent
from pilotfish.edge_agent.session import Round
from pilotfish.protocol.errors import BrokerUnreachable, NoWorker
from pilotfish.protocol.fleet import Target, Vocabulary
from pilotfish.protocol.messages import Close, Message

FLEET = Target(TARGET, "fake", 4096, 16, Vocabulary(tuple(bytes([value]) for value in range(256))))
FLYING = Round(0, len(PROMPT), ())


class Broker:
    """Takes jobs once `open` is set, unless `trouble` is in the way."""

    agent, boot, patience = "edge1", "boot1", 0.05

    def __init__(self, trouble: Exception | None = None, workers: int = 1) -> None:
        self.trouble, self.workers, self.open, self.pulse = trouble, workers, asyncio.Event(), self
        self.asked: list[str] = []
        self.arrived: list[tuple[str, Message]] = []

    async def publish(self, target: str, worker: str, message: Message) -> bytes:
        self.asked.append(worker)
        await self.open.wait()
        if self.trouble:
            raise self.trouble
        self.arrived.append((worker, message))
        return b"1-0"

    async def answers(self) -> bool:
        return True

    async def live_workers(self, target: str) -> int:
        if self.trouble:
            raise self.trouble
        return self.workers


def outbox(broker: Any, *, hasty: bool = False) -> tuple[Outbox, Inbox]:
    inbox: Inbox = asyncio.Queue()
    return Outbox(broker, FLEET, inbox, hasty=hasty), inbox


async def test_a_job_leaves_for_the_worker_asked_next_and_nobody_waits_for_it() -> None:
    one, inbox = outbox(broker := Broker())
    one.worker = "w1"
    await one.send(FLYING, job(PROMPT))
    one.worker = "w2"
    assert broker.asked == ["w1"]
    broker.open.set()
    await one.end(drop=False)
    assert [worker for worker, _ in broker.arrived] == ["w1"]
    assert inbox.empty()


@pytest.mark.parametrize("trouble", [NoWorker("no worker serves it"), BrokerUnreachable("no Redis answers")])
async def test_a_job_that_could_not_leave_comes_back_with_the_reason(trouble: Exception) -> None:
    one, inbox = outbox(broker := Broker(trouble))
    broker.open.set()
    await one.send(FLYING, job(PROMPT))
    assert await inbox.get() == Unsent(FLYING, str(trouble))


async def test_only_who_is_hasty_gives_up_a_redis_that_is_slow() -> None:
    patient, kept = outbox(slow := Broker())
    hasty, back = outbox(Broker(), hasty=True)
    for one in (patient, hasty):
        await one.send(FLYING, job(PROMPT))
    await wait_until(lambda: not back.empty(), "the job that came back")
    assert back.get_nowait() == Unsent(FLYING, "Redis does not answer")
    assert kept.empty()
    slow.open.set()
    await patient.end(drop=False)
    assert len(slow.arrived) == 1


async def test_the_end_drops_what_nobody_takes() -> None:
    one, inbox = outbox(broker := Broker())
    await one.send(FLYING, job(PROMPT))
    await one.end(drop=True)
    assert not broker.arrived
    assert inbox.empty()


async def test_goodbye_is_said_to_whoever_was_asked_and_to_nobody_else() -> None:
    one, _ = outbox(broker := Broker())
    broker.open.set()
    await one.say_goodbye("0" * 32)
    assert not broker.asked
    await one.publish(job(PROMPT))
    one.worker = "w1"
    await one.say_goodbye("0" * 32)
    assert broker.arrived[-1] == ("w1", Close(agent="edge1", boot="boot1", session="0" * 32))
    broker.trouble = NoWorker("they left")
    await one.say_goodbye("0" * 32)  # and is not missed


async def test_whether_anybody_is_there() -> None:
    assert await outbox(Broker())[0].anybody_there()
    assert not await outbox(Broker(workers=0))[0].anybody_there()
    assert not await outbox(Broker(BrokerUnreachable("away")))[0].anybody_there()
    assert not await outbox(None)[0].anybody_there()
    assert not outbox(None)[0].open
