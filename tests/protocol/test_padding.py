"""Padded messages: their sizes say nothing of how many tokens were drafted or accepted, and they read as before."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from rigs import PROMPT, TARGET, agent, draws, job, text_of, worker

from pilotfish.edge_agent.task import Task
from pilotfish.protocol import keys
from pilotfish.protocol import messages as m
from pilotfish.protocol.broker import EdgeBroker, ensure_group
from pilotfish.protocol.codec import BUCKET_BYTES, MAX_BYTES, decode, encode, is_padded

IDS = st.lists(st.integers(0, m.MAX_TOKEN_ID), max_size=40)
HIGH = m.MAX_TOKEN_ID  # five bytes on the wire, where an id below 128 takes one


def verdict(draws: list[int], accepted: int = 0) -> m.Verdict:
    return m.Verdict(boot="b" * 64, session="0" * 32, epoch=7, round=9, base=5, digest=b"d" * 16,
                     draws=tuple(draws), accepted=accepted, worker="w" * 64, queue_ms=0.1, engine_ms=3.2)  # fmt: skip


@given(IDS, IDS)
def test_a_padded_message_reads_as_the_same(ids: list[int], draft: list[int]) -> None:
    message = job((1, *ids), draft)
    data = encode(message, padded=True)
    assert decode(data, m.ToWorker) == message
    assert is_padded(data)
    assert not is_padded(encode(message))


@given(st.binary(max_size=5000))
def test_sizes_are_the_buckets(text: bytes) -> None:
    size = len(encode(m.Prompt(request="0" * 32, text=text.hex() + "x"), padded=True))
    assert size % BUCKET_BYTES == 0
    assert (size // BUCKET_BYTES).bit_count() == 1


@pytest.mark.parametrize("ids", [199_000, 199_900, 199_960])
def test_the_largest_are_as_large_as_a_reader_takes(ids: int) -> None:
    data = encode(job((HIGH,) * ids, epoch=1), padded=True)
    assert MAX_BYTES - 300 < len(data) <= MAX_BYTES
    assert decode(data, m.ToWorker).base == ids


def test_no_job_of_a_round_tells_how_much_was_drafted_or_accepted_before() -> None:
    jobs = [
        encode(job((1,) * 7 + (i,) * new, (i,) * drafted), padded=True)
        for i in (1, 300, 70_000, HIGH)
        for new in range(1, 18)
        for drafted in range(17)
    ]
    assert {len(data) for data in jobs} == {BUCKET_BYTES}
    assert len({len(encode(job((1,) * 7, (300,) * drafted))) for drafted in range(17)}) > 8, "unpadded ones do tell"


def test_no_verdict_tells_how_much_was_accepted() -> None:
    verdicts = [verdict([i] * (n + 1), n) for i in (1, 300, 70_000, HIGH) for n in range(17)]
    assert {len(encode(one, padded=True)) for one in verdicts} == {BUCKET_BYTES}
    assert len({len(encode(one)) for one in verdicts}) > 8


@pytest.mark.parametrize("field", ["pad", "padding"])
def test_only_the_one_field_is_ignored(field: str) -> None:
    body: dict[str, Any] = {**msgpack.unpackb(encode(job())), field: b"\0" * 9}
    if field == "pad":
        assert decode(msgpack.packb(body), m.ToWorker) == job()
    else:
        with pytest.raises(Exception, match=field):
            decode(msgpack.packb(body), m.ToWorker)


async def test_a_padded_device_sends_padded_jobs(redis: Redis) -> None:
    stream = keys.jobs(TARGET, keys.DEFAULT_TENANT)
    await ensure_group(redis, stream, keys.GROUP_WORKERS)
    edge = EdgeBroker(redis, keys.DEFAULT_TENANT, "edge1", "boot", padded=True)
    for drafted in range(8):
        await edge.publish(TARGET, "", job(PROMPT, (7,) * drafted))
    assert {len(fields[b"m"]) for _, fields in await redis.xrange(stream)} == {BUCKET_BYTES}


@pytest.mark.slow
@pytest.mark.parametrize("padded", [True, False])
async def test_a_worker_answers_in_kind(redis: Redis, redis_url: str, padded: bool) -> None:
    async with worker(redis_url), agent(redis_url, alpha=0.6) as running:
        assert running.broker
        running.broker.padded = padded
        text, generation = await text_of(running, Task(PROMPT, max_tokens=64))
        assert text == draws(PROMPT, 64)
        assert generation.session.counts.rounds > 8
        replies = await redis.xrange(keys.replies(keys.DEFAULT_TENANT, "edge1"))
    sizes = {len(fields[b"m"]) for _, fields in replies}
    assert sizes == {BUCKET_BYTES} if padded else len(sizes) > 2
