"""What of `bench chaos` needs no storm: its plan, its judge, its proxy, its older wire; and the soak's sums."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from redis.asyncio import Redis
from rigs import TARGET, job, worker

import pilotfish
from helpers import wait_until
from pilotfish.bench.chaos import over
from pilotfish.bench.chaos_fleet import Fleet, Missed, hurt_engine
from pilotfish.bench.chaos_judge import HONEST, Fate, complaint
from pilotfish.bench.chaos_load import Load
from pilotfish.bench.chaos_plan import FAULTS, Fault, faults, wish
from pilotfish.bench.chaos_process import Process
from pilotfish.bench.chaos_proxy import HOST, ChaosProxy, pretended_answer, read_command
from pilotfish.bench.chaos_wire import WRITERS, downgraded, upgrade
from pilotfish.bench.soak import Series, ends, gaps, grown, late, risen
from pilotfish.cloud_worker.engines.fake import VOCAB, fake_target
from pilotfish.protocol import codec, keys
from pilotfish.protocol.broker import EdgeBroker, connect, ensure_group
from pilotfish.protocol.codec import decode, encode
from pilotfish.protocol.errors import InvalidMessage
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Refusal, ToWorker

WISH = replace(wish(1, 1), on_cloud_loss="local", max_tokens=12)


def text(flaw: int | None = None, alone: int = 0) -> Fate:
    """What the target writes for WISH; one token may be wrong, the last `alone` are somebody else's."""
    ids, origins = list(WISH.prompt), ["accepted"] * (12 - alone) + ["local"] * alone
    for at, origin in enumerate(origins):
        token = fake_target(ids, len(ids), WISH.sampling, VOCAB)
        ids.append((token + (origin == "local" or at == flaw)) % VOCAB)
    out = tuple(ids[len(WISH.prompt) :])
    return Fate(WISH, out, tuple(origins), "length", rounds=3, degraded=alone > 0, local=alone)


# --- the plan ------------------------------------------------------------------------------------------------


def test_a_seed_replays_and_another_does_otherwise() -> None:
    first, again, other = (list(islice(faults(seed), 400)) for seed in (5, 5, 6))
    assert first == again != other
    assert [wish(5, n) for n in range(50)] == [wish(5, n) for n in range(50)] != [wish(6, n) for n in range(50)]


def test_every_fault_comes() -> None:
    seen = Counter(fault.name for fault in islice(faults(1), 8_000) if fault)
    assert seen.keys() == FAULTS.keys()


# --- the judge -----------------------------------------------------------------------------------------------


def test_the_targets_own_text_is_right_and_so_is_one_that_owns_up() -> None:
    assert complaint(text()) == ""
    assert complaint(text(alone=4)) == ""


def test_what_is_verified_after_a_flagged_token_is_the_draw_on_the_text_as_it_is() -> None:
    ids, origins = list(WISH.prompt), ["accepted", "local", *["accepted"] * 10]
    for origin in origins:
        token = fake_target(ids, len(ids), WISH.sampling, VOCAB)
        ids.append((token + (origin == "local")) % VOCAB)
    fate = Fate(WISH, tuple(ids[len(WISH.prompt) :]), tuple(origins), "length", degraded=True, local=1)
    assert complaint(fate) == ""
    assert "nobody drew token 6" in complaint(
        replace(fate, ids=(*fate.ids[:6], (fate.ids[6] + 1) % VOCAB, *fate.ids[7:]))
    )


@pytest.mark.parametrize("flaw", [0, 5, 11])
def test_a_token_nobody_drew_is_found(flaw: int) -> None:
    assert complaint(text(flaw)).startswith(f"nobody drew token {flaw}")


def test_a_near_tie_is_some_workers_draw() -> None:
    assert complaint(text(3), [HONEST, (1.0, 4)]) == ""  # that worker reads every position as the next id


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"wish": replace(WISH, on_cloud_loss="wait")}, "which the request forbids"),
        ({"local": 1}, "owns up to 1"),
        ({"degraded": False}, "degraded: False"),
        ({"ids": text(alone=2).ids[:9], "origins": text(alone=2).origins[:9]}, "9 tokens instead of 12"),
    ],
)
def test_what_a_request_was_promised_is_held_against_it(change: dict[str, object], why: str) -> None:
    assert why in complaint(replace(text(alone=2), **change))  # type: ignore[arg-type]


# --- the proxy -----------------------------------------------------------------------------------------------


def test_commands_are_read_however_they_are_cut() -> None:
    raw = b"*2\r\n$4\r\nECHO\r\n$5\r\na\r\nbc\r\n*1\r\n$4\r\nPING\r\n"
    for cut in range(1, 25):
        assert read_command(bytearray(raw[:cut])) is None
    assert read_command(bytearray(raw)) == ([b"ECHO", b"a\r\nbc"], len(raw) - 14)


def test_jobs_and_answers_are_meddled_with_and_nothing_else() -> None:
    stream, replies = keys.jobs(TARGET, "t").encode(), keys.replies("t", "a").encode()
    assert pretended_answer([b"XADD", stream, b"NOMKSTREAM", b"*"]).startswith(b"$")
    assert pretended_answer([b"EVALSHA", b"sha", b"3", stream, replies, b"dlq"]) == b"$-1\r\n"
    for other in ([b"PING"], [b"XADD", keys.prompts("t").encode()], [b"EVALSHA", b"sha", b"1", stream]):
        assert pretended_answer(other) == b""


@pytest.mark.parametrize(("share", "arrived"), [(0.0, 40), (1.0, 0)])
async def test_a_share_of_the_jobs_and_answers_is_lost(
    redis: Redis, redis_url: str, share: float, arrived: int
) -> None:
    stream = keys.jobs(TARGET, keys.DEFAULT_TENANT)
    await ensure_group(redis, stream, keys.GROUP_WORKERS)
    fates: Counter[str] = Counter()
    connection = redis.connection_pool.connection_kwargs
    proxy = ChaosProxy(HOST, connection["port"], seed=1, share=share, told=lambda fate: fates.update([fate]))
    server = await asyncio.start_server(proxy.accept, HOST, 0)
    url = redis_url.replace(f":{connection['port']}", f":{server.sockets[0].getsockname()[1]}")
    async with connect(url) as through:
        edge = EdgeBroker(through, keys.DEFAULT_TENANT, "edge1", "boot1")
        for number in range(40):
            assert await edge.publish(TARGET, "", job(round=number))
        assert await redis.xlen(stream) == arrived
        await EdgeBroker(redis, keys.DEFAULT_TENANT, "edge1", "boot1").publish(TARGET, "", job())
        ingress = Ingress(through, TARGET, "w1")
        await ingress.open()
        answered = await ingress.pick_up(200, 100)
        for delivery in answered:
            await ingress.reply(delivery, Refusal(code="stale", worker="w1"))
    server.close()
    assert len(answered) == arrived + 1
    assert await redis.xlen(keys.replies(keys.DEFAULT_TENANT, "edge1")) == (arrived + 1 if not share else 0)
    assert fates == ({"lost": 40 + 1} if share else {})


# --- a fault that nobody sees is none ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "done", "told"),
    [(None, {"stop_worker": 1}, {}), (Missed(), {"missed": 1}, {}),
     (ZeroDivisionError("by zero"), {}, {"faults": ["stop_worker: ZeroDivisionError: by zero"]})],
)  # fmt: skip
async def test_a_fault_counts_once_it_is_done_and_one_that_fails_is_told(
    raised: Exception | None, done: dict[str, int], told: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act() -> None:
        if raised:
            raise raised

    fleet = Fleet(1, lambda *_: None, flips=False)
    monkeypatch.setattr(fleet, "_chosen", lambda fault: ("w0", act()))
    fleet.strike(Fault("stop_worker", 0, 1.0, 0))
    await wait_until(lambda: not fleet.victims, "the fault to be over")
    assert (fleet.done, fleet.crashes) == (done, told)
    fleet.server._folder.cleanup()


async def test_an_engine_that_is_not_there_is_not_hurt() -> None:
    with pytest.raises(Missed):
        await hurt_engine(cast(Process, SimpleNamespace(children=list)), "kill", 0)


# --- nothing is waited for without end ----------------------------------------------------------------------


async def test_a_wait_that_does_not_end_is_told_and_not_joined() -> None:
    assert await over(asyncio.sleep(0), 5)
    assert not await over(asyncio.Event().wait(), 0.01)
    with pytest.raises(ZeroDivisionError):
        await over(asyncio.to_thread(lambda: 1 / 0), 5)


async def test_a_generation_that_is_asked_for_again_and_again_is_named() -> None:
    """No agent comes back, so that no try of it takes long: the run ends, and says which."""
    load = Load(seed=1, at_once=2, deadline_seconds=1.0)
    load.fleet = cast(Fleet, SimpleNamespace(agents=[], urls={"edges": "redis://127.0.0.1:1/0"}))
    writing = asyncio.create_task(load.run())
    await wait_until(lambda: len(load._open) == 2, "two generations to begin")
    load.stop()
    assert not await over(writing, 0.05)
    load.give_up()
    assert [wish.number for wish in load.hung] == [0, 1]
    assert all(fate.end.startswith("hung: no end after 1 tries") for fate in load.fates)


# --- an older wire -------------------------------------------------------------------------------------------


def test_an_older_form_is_refused_by_who_does_not_know_it_and_read_by_who_does(monkeypatch: pytest.MonkeyPatch) -> None:
    older = downgraded(job())
    assert older != encode(job())
    with pytest.raises(InvalidMessage, match="no longer read"):
        decode(older, ToWorker)
    monkeypatch.setitem(codec.UPGRADES, 0, upgrade)
    assert decode(older, ToWorker) == job()


def test_whoever_writes_messages_writes_the_older_form_too() -> None:
    root = Path(pilotfish.__file__).parent
    sources = [path for room in ("protocol", "edge_agent", "cloud_worker") for path in (root / room).rglob("*.py")]
    writers = {path.stem for path in sources if re.search(r"codec import .*\bencode\b", path.read_text())}
    assert writers == {module.__name__.rpartition(".")[2] for module in WRITERS}


async def test_a_newer_job_gets_a_refusal_that_says_what_to_upgrade(redis: Redis, redis_url: str) -> None:
    newer = encode(job()).replace(b"\xa1v\x01", b"\xa1v\x02")
    async with worker(redis_url):
        fields = {keys.FIELD_AGENT: "edge1", keys.FIELD_MESSAGE: newer}
        await redis.xadd(keys.jobs(TARGET, keys.DEFAULT_TENANT), fields)  # type: ignore[arg-type]
        stream = keys.replies(keys.DEFAULT_TENANT, "edge1")
        await wait_until(lambda: redis.xlen(stream), "the refusal")
        ((_, said),) = await redis.xrange(stream)
    refusal = codec.unpack(said[b"m"])
    assert refusal["code"] == "invalid_message"
    assert "upgrade this side" in refusal["sentence"]


# --- the soak ------------------------------------------------------------------------------------------------


def test_who_is_not_sampled_to_the_end_has_not_stayed_the_same() -> None:
    whole = Series([1] * 60, [1] * 60, [1] * 60)
    assert gaps({"worker": whole, "agent": whole, "redis": whole}) == []
    gone = gaps({"worker": Series([1] * 30, [1] * 30, [1] * 60), "agent": Series([1] * 60, [1] * 60)})
    assert gone == ["worker: 30 samples", "agent told its series 0 times"]
    assert ends({"length": 5, "submitted, failed": 1}) == ["1 generations ended with submitted, failed"]


def test_growth_is_the_last_quarter_against_the_second() -> None:
    warming_up = [10, 60, 90, 100, *[100] * 12]
    assert grown(warming_up) == 0
    assert grown([100] * 12 + [110] * 4) == pytest.approx(0.1)
    assert risen([4, 4, 4, 5, 5, 5, 5, 6]) == 1
    assert late([99, 3, 4, 5]) == [3, 5]
