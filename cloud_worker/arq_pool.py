"""arq's client as we use it: msgpack on both sides instead of pickle, time-outs that are said.

Knows arq and Redis; no streams.
"""

from __future__ import annotations

from typing import Any

import msgpack
from arq.connections import ArqRedis
from redis.asyncio import ConnectionPool

from pilotfish.protocol.broker import CONNECT_SECONDS, SOCKET_SECONDS, readable
from pilotfish.protocol.errors import SettingsError


def arq_pool(url: str, queue_name: str) -> ArqRedis:
    """arq's client: msgpack on both sides, explicit time-outs. Raises BrokerUnreachable for a URL that is none."""
    with readable(url):
        pool = ConnectionPool.from_url(url, socket_connect_timeout=CONNECT_SECONDS, socket_timeout=SOCKET_SECONDS)
    return ArqRedis(
        connection_pool=pool, default_queue_name=queue_name, job_serializer=msgpack.packb, job_deserializer=unpack_job
    )


def unpack_job(data: bytes) -> Any:
    """arq's own jobs and results: maps with keys of any kind."""
    return msgpack.unpackb(data, raw=False, strict_map_key=False)


def refuse_pickle(kwargs: dict[str, Any]) -> None:
    """arq's default serializer is pickle: whoever can write to Redis could run code here."""
    pool = kwargs.get("redis_pool")
    for owner in (kwargs, vars(pool)) if pool is not None else (kwargs,):
        if not (owner.get("job_serializer") and owner.get("job_deserializer")):
            raise SettingsError("without job_serializer and job_deserializer a worker unpickles jobs: pass msgpack's")
