"""One round over the broker on fakeredis: the same two sides and scripts as in `test_ingress.py`, in milliseconds.

The real server decides what is right; this only tells a broken round early, where there is none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from fakeredis import FakeAsyncRedis

from pilotfish.protocol import keys
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import NoWorker
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Close, Refusal

TARGET = "0123456789abcdef"
CLOSE = Close(agent="edge1", boot="b1", session="0" * 32)


@pytest.fixture
async def fake() -> AsyncIterator[FakeAsyncRedis]:
    async with FakeAsyncRedis() as client:
        yield client


async def test_a_job_goes_out_and_its_answer_comes_back(fake: FakeAsyncRedis) -> None:
    edge, worker = EdgeBroker(fake, "default", "edge1", "b1"), Ingress(fake, TARGET, "w1")
    await worker.open()
    await edge.publish(TARGET, "", CLOSE)
    (delivery,) = await worker.pick_up(8, 100)
    assert (delivery.agent, delivery.tenant, delivery.deliveries) == ("edge1", keys.DEFAULT_TENANT, 1)
    refusal = Refusal(code="stale", worker="w1")
    await worker.reply(delivery, refusal)
    replies = edge.replies()
    assert await anext(replies) == refusal
    await replies.aclose()
    assert await fake.xlen(delivery.stream) == 0


async def test_without_a_worker_nothing_is_published(fake: FakeAsyncRedis) -> None:
    with pytest.raises(NoWorker, match="start one with `pilotfish worker`"):
        await EdgeBroker(fake, "default", "edge1", "b1").publish(TARGET, "w1", CLOSE)
    assert await fake.keys() == []
