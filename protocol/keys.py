"""Every Redis key, one page: type, life time, owner. Nothing else in the tree spells a key.

    key                                     type    life          owner (who writes, who removes)
    pf:tenants                              set     for ever      operator; re-read by workers each second
    pf:quotas                               hash    for ever      operator: tenant -> quota (text); re-read likewise
    pf:targets                              hash    for ever      workers: target -> name (text)
    pf:<target>:pair                        string  PAIR_TTL_MS   workers of the target, renewed by their beat
    pf:<target>:workers                     zset    JOBS_TTL_MS   workers: name -> last beat; peers remove the dead
    pf:<target>:w:<worker>                  hash    BEAT_TTL_MS   that worker's beat (text, for people)
    pf:<target>:jobs:<tenant>:any           stream  JOBS_TTL_MS   agents add, any worker takes; renewed by beats
    pf:<target>:jobs:<tenant>:<worker>      stream  JOBS_TTL_MS   agents add, that worker takes (a peer if dead)
    pf:<target>:fwd:<worker>                stream  JOBS_TTL_MS   workers pass jobs on to that worker (a peer if dead)
    pf:<target>:use:<tenant>                hash    JOBS_TTL_MS   workers: rows saved up, and worker -> tokens in flight
    pf:<target>:dlq                         stream  DLQ_TTL_MS    workers: jobs given up after DELIVERIES_MAX tries
    pf:<target>:kv                          zset    JOBS_TTL_MS   workers with a prefix index: name -> end of its lease
    pf:<target>:kv:<worker>                 hash    JOBS_TTL_MS   that worker's epoch, rate, queue (text); peers reap it
    pf:<target>:kv:<epoch>:<bucket>:<worker> set    JOBS_TTL_MS   blocks that worker holds; renewed by its beats, reaped
    pf:<target>:kvgone                      hash    JOBS_TTL_MS   epochs that ended: "epoch:worker" -> buckets to remove
    pf:salt                                 string  JOBS_TTL_MS   workers: key of the tenants' cache salts, by beats
    pf:rep:<tenant>:<agent>                 stream  REPLY_TTL_MS  workers add, that agent reads; one group per boot
    pf:agents:<tenant>                      zset    JOBS_TTL_MS   agents: name -> last beat in Redis ms
    pf:a:<tenant>:<agent>                   hash    BEAT_TTL_MS   that agent's beat (text, for people)
    pf:prompts:<tenant>                     stream  JOBS_TTL_MS   shells add, any agent takes; renewed by agents' beats
    pf:out:<tenant>:<request>               stream  OUT_TTL_MS    the agent that took the prompt
    arq:*                                   arq's own zset path (cron, deferred and admin jobs); owned by arq

`target` is the first 16 hex digits of the target's fingerprint. Payloads are msgpack (`codec.py`), beats plain text.
"""

from __future__ import annotations

import re
from typing import Final

PREFIX: Final = "pf"
GROUP_WORKERS: Final = "workers"
GROUP_AGENTS: Final = "agents"
ANY: Final = "any"

BEAT_TTL_MS: Final = 2_000
BEAT_EVERY_MS: Final = 500
DEFAULT_TENANT: Final = "default"
PAIR_TTL_MS: Final = 3_600_000
JOBS_TTL_MS: Final = 3_600_000
REPLY_TTL_MS: Final = 60_000
REPLY_MAXLEN: Final = 256
OUT_TTL_MS: Final = 3_600_000
DLQ_TTL_MS: Final = 7 * 86_400_000
DLQ_MAXLEN: Final = 1_000

LEASE_MS: Final = 1_000
SWEEP_MS: Final = 250
DELIVERIES_MAX: Final = 3
HOPS_MAX: Final = 2
STREAMS_MAX: Final = 64  # that one XREADGROUP, or one script, may name
BLOCK_MS: Final = 1_000  # Redis checks blocked clients' timeouts every 100 ms; a wake-up is instant

# fields of a stream entry
FIELD_AGENT: Final = "a"  # who gets the reply, readable even when the payload is not
FIELD_MESSAGE: Final = "m"  # one msgpack message
# ... and of one that a worker passed on to another
FIELD_TENANT: Final = "t"  # the key of a worker-only stream names none
FIELD_FIRST: Final = "f"  # id of the entry as it first came: its age
FIELD_DELIVERIES: Final = "n"  # so far
FIELD_HOPS: Final = "h"  # how often it was passed on
FIELD_CACHED: Final = "c"  # prefix tokens its new worker should have
FIELD_QUEUED: Final = "q"  # tokens reserved in its new worker's queue

NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a tenant, worker or agent: it becomes part of a key

TENANTS: Final = f"{PREFIX}:tenants"
QUOTAS: Final = f"{PREFIX}:quotas"
TARGETS: Final = f"{PREFIX}:targets"
SALT: Final = f"{PREFIX}:salt"


def pair(target: str) -> str:
    """Chat template and id -> bytes table of a target."""
    return f"{PREFIX}:{target}:pair"


def beat(target: str, worker: str) -> str:
    """One worker's beat."""
    return f"{PREFIX}:{target}:w:{worker}"


def workers(target: str) -> str:
    """Live workers of a target, by the time of their last beat."""
    return f"{PREFIX}:{target}:workers"


def jobs(target: str, tenant: str, worker: str = ANY) -> str:
    """Ingress stream of one tenant, for one worker or for any."""
    return f"{PREFIX}:{target}:jobs:{tenant}:{worker}"


def forwarded(target: str, worker: str) -> str:
    """Jobs other workers passed on to this one; no edge may touch it."""
    return f"{PREFIX}:{target}:fwd:{worker}"


def use(target: str, tenant: str) -> str:
    """What a tenant with a quota has used of a target; no edge may touch it."""
    return f"{PREFIX}:{target}:use:{tenant}"


def index(target: str) -> str:
    """Workers whose blocks the prefix index knows, by the end of their lease in Redis ms."""
    return f"{PREFIX}:{target}:kv"


def index_worker(target: str, worker: str) -> str:
    """What the index knows of one worker besides its blocks."""
    return f"{index(target)}:{worker}"


def index_bucket(target: str, epoch: int | str, bucket: int | str, worker: str) -> str:
    """Blocks one worker holds since its `epoch`; the worker comes last, so that no ACL pattern of a tenant fits."""
    return f"{index(target)}:{epoch}:{bucket}:{worker}"


def index_gone(target: str) -> str:
    """Epochs whose buckets are still to be removed."""
    return f"{PREFIX}:{target}:kvgone"


def dead_letters(target: str) -> str:
    """Jobs given up."""
    return f"{PREFIX}:{target}:dlq"


def replies(tenant: str, agent: str) -> str:
    """Everything workers and shells say to one agent."""
    return f"{PREFIX}:rep:{tenant}:{agent}"


def agent_beat(tenant: str, agent: str) -> str:
    """One agent's beat."""
    return f"{PREFIX}:a:{tenant}:{agent}"


def agents(tenant: str) -> str:
    """Live agents of a tenant, by the time of their last beat."""
    return f"{PREFIX}:agents:{tenant}"


def prompts(tenant: str) -> str:
    """Prompts waiting for an agent."""
    return f"{PREFIX}:prompts:{tenant}"


def output(tenant: str, request: str) -> str:
    """Everything an agent says about one submitted prompt."""
    return f"{PREFIX}:out:{tenant}:{request}"
