"""Two other prefix indexes' key layouts, as `bench index` fills and asks them: llm-d's and AIBrix's.

What they keep and which commands they send, from their sources (llm-d kv-cache `pkg/kvcache/kvblock/redis.go`, AIBrix
`pkg/utils/syncprefixcacheindexer` with Redis); the client is redis-py with hiredis, pipelined. Both name a block by 64
bits. Neither knows when a worker died.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import redis

PIPELINE = 1_000
MODEL = "qwen2.5-7b-instruct"
TTL_SECONDS = 120  # AIBrix'


def number(block: bytes) -> int:
    """A block as both write it: 64 bits, decimal."""
    return int.from_bytes(block, "big")


def pod(worker: str) -> str:
    """A worker as a Kubernetes pod is named."""
    return f"{worker}.inference.svc.cluster.local:8000"


class Peer(Protocol):
    """A layout under test."""

    def fill(self, worker: str, blocks: Sequence[bytes]) -> None:
        """Say that a worker holds blocks."""

    def lookup(self, blocks: Sequence[bytes]) -> int:
        """Who holds a prefix; the number of blocks anyone holds."""

    def drop(self, worker: str) -> None:
        """Forget a dead worker."""


class LlmD:
    """HASH a block, one field a pod (JSON), and a ZSET from the engine's own key to it; no time to live."""

    def __init__(self, client: redis.Redis) -> None:
        self.redis = client

    def fill(self, worker: str, blocks: Sequence[bytes]) -> None:
        """HSET and ZADD for every block."""
        entry = _entry(worker)
        for some in _batches(blocks):
            pipe = self.redis.pipeline(transaction=False)
            for key in map(number, some):
                pipe.hset(str(key), entry, "")
                pipe.zadd(f"engine:{key}", {str(key): 0})
            pipe.execute()

    def lookup(self, blocks: Sequence[bytes]) -> int:
        """HKEYS for every block, in one pipeline."""
        pipe = self.redis.pipeline(transaction=False)
        for key in map(number, blocks):
            pipe.hkeys(str(key))
        return sum(bool(pods) for pods in pipe.execute())

    def drop(self, worker: str) -> None:
        """SCAN the whole keyspace and HDEL the pod from every hash (its `Clear`)."""
        entry, cursor = _entry(worker), 0
        while True:
            cursor, found = self.redis.scan(cursor, count=PIPELINE)  # type: ignore[misc]  # typed as sync or async
            pipe = self.redis.pipeline(transaction=False)
            for key in found:
                if not key.startswith(b"engine:"):
                    pipe.hdel(key, entry)
            pipe.execute()
            if not cursor:
                return


class AIBrix:
    """STRING a block, JSON of model and pods with times, rewritten by each pod; gone after two minutes."""

    def __init__(self, client: redis.Redis) -> None:
        self.redis = client

    def fill(self, worker: str, blocks: Sequence[bytes]) -> None:
        """MGET, change, SETEX."""
        for some in _batches(blocks):
            names = [_name(block) for block in some]
            pipe = self.redis.pipeline(transaction=False)
            for name, old in zip(names, self._get(names), strict=True):
                pods = json.loads(old)[MODEL] if old else {}
                value = {MODEL: {**pods, pod(worker): 1_700_000_000_000_000_000}}
                pipe.setex(name, TTL_SECONDS, json.dumps(value, separators=(",", ":")))
            pipe.execute()

    def lookup(self, blocks: Sequence[bytes]) -> int:
        """One MGET."""
        return sum(found is not None for found in self._get([_name(block) for block in blocks]))

    def drop(self, worker: str) -> None:
        """There is nothing but to wait for TTL_SECONDS."""

    def _get(self, names: list[str]) -> list[bytes | None]:
        found: Any = self.redis.mget(names)
        return list(found)


def _entry(worker: str) -> str:
    return json.dumps({"PodIdentifier": pod(worker), "DeviceTier": "gpu"}, separators=(",", ":"))


def _name(block: bytes) -> str:
    return f"aibrix:{{prefixcache}}:e:{number(block)}"


def _batches(blocks: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    return (blocks[start : start + PIPELINE] for start in range(0, len(blocks), PIPELINE))
