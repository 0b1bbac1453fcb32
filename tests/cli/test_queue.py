from __future__ import annotations

import json
from typing import Any

import pytest
from redis.asyncio import Redis

from pilotfish.cli.main import run_command
from pilotfish.cli.queue import age
from pilotfish.protocol import inspection, keys
from pilotfish.protocol.codec import encode
from pilotfish.protocol.errors import UsageError
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Prompt, Sampling, VerifyJob

TARGET = "a" * 16
JOB = VerifyJob(
    agent="edge1", boot="b", session="0" * 32, epoch=0, round=0, base=3, digest=b"\xff" * 16, offset=0, ids=(1, 2, 3),
    draft=(4, 5), sampling=Sampling(seed=7),
)  # fmt: skip


@pytest.fixture
async def queue(redis: Redis) -> Redis:
    """One worker, two jobs (one of them taken), a letter nobody can read, a prompt."""
    ingress = Ingress(redis, TARGET, "w1")
    await ingress.open()
    await ingress.beat({"engine": "fake 1", "state": "serving"})
    await redis.hset(keys.TARGETS, TARGET, "fake-target context=100 draft_max=4")  # type: ignore[misc]
    entry: dict[Any, Any] = {keys.FIELD_AGENT: "edge1", keys.FIELD_MESSAGE: encode(JOB)}
    for name in ("w1", keys.ANY):
        await redis.xadd(keys.jobs(TARGET, "default", name), entry)
    await redis.xreadgroup(keys.GROUP_WORKERS, "w1", {keys.jobs(TARGET, "default", "w1"): ">"})
    letter: dict[Any, Any] = {keys.FIELD_AGENT: b"edge\xff", keys.FIELD_MESSAGE: b"junk", "stream": "where it was"}
    await redis.xadd(keys.dead_letters(TARGET), letter)
    prompt = Prompt(request="0" * 32, text="hi")
    await redis.xadd(keys.prompts("default"), {keys.FIELD_MESSAGE: encode(prompt)})
    for key in (keys.dead_letters(TARGET), keys.prompts("default")):
        await redis.pexpire(key, keys.JOBS_TTL_MS)
    return redis


async def test_all_there_is_to_see(queue: Redis) -> None:
    found = await inspection.look(queue, "default")
    streams = {one.key.rpartition(":")[2]: (one.kind, one.length, one.pending) for one in found.streams}
    assert streams == {
        "default": ("prompts", 1, 0),
        "any": ("jobs", 1, 0),
        "w1": ("jobs", 1, 1),
        "dlq": ("dead letters", 1, 0),
    }
    assert all(one.oldest_ms is not None and 0 <= one.oldest_ms < 60_000 for one in found.streams)
    (target,) = found.targets
    assert (target.name, target.workers[0].name, target.workers[0].alive) == ("fake-target", "w1", True)
    assert target.workers[0].beat == {"engine": "fake 1", "state": "serving"}


async def test_an_entry_is_read_and_not_taken(queue: Redis) -> None:
    stream = keys.jobs(TARGET, "default")
    (entry,) = await inspection.peek(queue, stream, 10)
    assert entry["agent"] == "edge1"
    assert entry["message"]["draft"] == [4, 5]
    assert entry["message"]["digest"] == "ff" * 16
    assert (await queue.xpending(stream, keys.GROUP_WORKERS))["pending"] == 0
    assert await queue.xlen(stream) == 1


async def test_a_letter_nobody_can_read_says_why(queue: Redis) -> None:
    (entry,) = await inspection.peek(queue, keys.dead_letters(TARGET), 10)
    assert entry["unreadable"]
    assert entry["stream"] == "where it was"
    json.dumps(entry)


async def test_what_is_no_stream_is_refused(queue: Redis) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        await inspection.peek(queue, "nothing", 1)
    with pytest.raises(UsageError, match="is a hash"):
        await inspection.peek(queue, keys.TARGETS, 1)


@pytest.mark.parametrize(
    ("args", "lines"), [((), 4), (("--dlq",), 1), ((keys.jobs(TARGET, "default"),), 1), (("-n", "1"), 4)]
)
def test_peek_prints_a_line_per_entry(
    args: tuple[str, ...], lines: int, queue: Redis, redis_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["queue", "peek", *args, "--redis-url", redis_url]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == lines


@pytest.mark.parametrize("as_json", [True, False])
def test_ls(as_json: bool, queue: Redis, redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["queue", "ls", "--redis-url", redis_url, *(["--json"] if as_json else [])]) == 0
    out = capsys.readouterr().out
    if as_json:
        body = json.loads(out)
        assert set(body) == {"targets", "agents", "streams"}
        assert body["targets"][0]["workers"][0]["beat"]["engine"] == "fake 1"
    else:
        assert "worker w1  engine=fake 1  state=serving" in out
        assert "no agents" in out


def test_an_empty_queue_says_so(redis_url: str, redis: Redis, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["queue", "ls", "--redis-url", redis_url]) == 0
    assert capsys.readouterr().out.startswith("no streams: nothing has been queued")


@pytest.mark.parametrize(
    ("ms", "words"), [(None, "-"), (12, "12 ms"), (1500, "2 s"), (600_000, "10 min"), (7_200_000, "2 h")]
)
def test_an_age_as_a_person_says_it(ms: int | None, words: str) -> None:
    assert age(ms) == words
