"""What no honest process sends: bytes that are no message, messages that ask for the impossible, far too many."""

from __future__ import annotations

import random
from typing import Any, Final

from redis.asyncio import Redis

from pilotfish.cloud_worker.engines.fake import VOCAB, FakeVerifier
from pilotfish.protocol import fleet, keys
from pilotfish.protocol.codec import WIRE_VERSION, encode
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Sampling, Verdict, VerifyJob

TARGET: Final = fleet.target_id(FakeVerifier().info.fingerprint)
AGENT: Final = "poisoner"
FLOOD: Final = 500
PER_STRIKE: Final = 5


async def poison(redis: Redis, coin: random.Random) -> None:
    """Into every kind of stream there is."""
    for _ in range(PER_STRIKE):
        worker = coin.choice((keys.ANY, "w0", "w1", "w2"))
        await _add(redis, keys.jobs(TARGET, keys.DEFAULT_TENANT, worker), _bad_job(coin))
        await _add(redis, keys.replies(keys.DEFAULT_TENANT, coin.choice(("a0", "a1"))), _bad_reply(coin))
    await _add(redis, keys.prompts(keys.DEFAULT_TENANT), coin.randbytes(coin.randrange(60)))


async def flood(redis: Redis, coin: random.Random) -> None:
    """Good jobs of one agent that nobody waits for, more than a worker takes in a while; most expire in the queue."""
    pipe = redis.pipeline(transaction=False)
    for _ in range(FLOOD):
        stream = keys.jobs(TARGET, keys.DEFAULT_TENANT)
        pipe.xadd(stream, _entry(encode(_job(coin, deadline_ms=coin.randrange(1, 500)))), nomkstream=True)
    await pipe.execute()


def _job(coin: random.Random, **changes: Any) -> VerifyJob:
    ids, sampling = tuple(coin.choices(range(VOCAB), k=20)), Sampling()
    fields: dict[str, Any] = {
        "agent": AGENT, "boot": "b", "session": f"{coin.getrandbits(128):032x}", "epoch": 0, "round": 0,
        "base": len(ids), "digest": History(TARGET, sampling, ids).digest(len(ids)), "offset": 0, "ids": ids,
        "draft": (1, 2), "deadline_ms": 1_000,
    }  # fmt: skip
    return VerifyJob(**{**fields, **changes})


def _bad_job(coin: random.Random) -> bytes:
    absurd: list[dict[str, Any]] = [
        {"digest": bytes(16)},
        {"base": 1 << 18},
        {"offset": 1 << 18},
        {"ids": (VOCAB,) * 20},
        {"draft": (2**31 - 1,)},
        {"draft": (1,) * 256},
        {"continue_tokens": 1 << 18},
        {"epoch": 2**53, "round": 2**53},
    ]
    whole = encode(_job(coin, **coin.choice(absurd)))
    return coin.choice((whole, whole[: coin.randrange(len(whole))], coin.randbytes(coin.randrange(200)), b"", b"\xc1"))


def _bad_reply(coin: random.Random) -> bytes:
    verdict = Verdict(
        boot="b", session=f"{coin.getrandbits(128):032x}", epoch=0, round=0, base=1, digest=bytes(16),
        draws=(2**31 - 1,), accepted=7, worker="w0",
    )  # fmt: skip
    newer = encode(verdict).replace(b"\xa1v" + bytes([WIRE_VERSION]), b"\xa1v\x7f")
    return coin.choice((encode(verdict), newer, encode(verdict)[:-1], coin.randbytes(30), b""))


async def _add(redis: Redis, stream: str, payload: bytes) -> None:
    await redis.xadd(stream, _entry(payload), nomkstream=True)


def _entry(payload: bytes) -> dict[Any, Any]:
    return {keys.FIELD_AGENT: AGENT, keys.FIELD_MESSAGE: payload}
