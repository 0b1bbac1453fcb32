"""What a worker refuses when more is asked than is served: stale and expired jobs, then the newest of the largest.

A tenant's jobs wait in its own streams. Where the newest would wait longer than PATIENCE_MS, those go first that nobody
waits for any more; then, of the tenant with most waiting for its weight, the newest. Each gets a typed answer that says
"try again" (`overloaded`), long before its edge's timer. How many go is Little's law: n jobs whose oldest is a ms old
came at n / a, and leave at v times that, v being how fast the age of the queue's head advances: 1 in a queue that
stands, less in one that grows. What leaves within PATIENCE_MS may wait. Knows streams and messages; not the engine.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pilotfish.protocol import keys, metrics
from pilotfish.protocol.answers import TELL
from pilotfish.protocol.codec import decode, encode, is_padded
from pilotfish.protocol.delivery import Delivery, read
from pilotfish.protocol.errors import InvalidMessage
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Refusal, RefusalCode, ScoreJob, ToWorker, VerifyJob

PATIENCE_MS: Final = 1_000  # an edge sends a round again after five times that
SHED_MAX: Final = 256  # refused after one look
DECODED_AT_ONCE: Final = 8
SHED_AT_ONCE: Final = 4
PAUSE_SECONDS: Final = 0.004  # between two of those: who floods must not have the event loop either
_MEMORY: Final = 0.5  # of the newest look in a queue's pace
OLD_MAX: Final = 32  # looked at for stale and expired ones, of one stream

#: depths(KEYS: streams; ARGV: group) -> for each: jobs nobody has taken, id of the oldest of them or ""
DEPTHS: Final = """
local told = {}
for _, stream in ipairs(KEYS) do
  local groups, waiting, oldest = redis.pcall('XINFO', 'GROUPS', stream), 0, ''
  for _, group in ipairs(groups.err and {} or groups) do
    local about = {}
    for i = 1, #group, 2 do about[group[i]] = group[i + 1] end
    if about['name'] == ARGV[1] then
      waiting = math.max(0, redis.call('XLEN', stream) - about['pending'])
      if waiting > 0 then
        local first = redis.call('XRANGE', stream, '(' .. about['last-delivered-id'], '+', 'COUNT', 1)[1]
        if first then oldest = first[1] else waiting = 0 end
      end
    end
  end
  told[#told + 1] = waiting
  told[#told + 1] = oldest
end
return told
"""

#: refuse(KEYS: for each job its stream and its reply stream; ARGV: group, then for each job its id and the refusal)
#: -> for each 1, or 0 when somebody has taken or ended it.
REFUSE: Final = f"""{TELL}
local told = {{}}
for i = 1, #KEYS, 2 do
  local id = ARGV[i + 1]
  told[#told + 1] = 0
  if #redis.call('XPENDING', KEYS[i], ARGV[1], id, id, 1) == 0 and redis.call('XDEL', KEYS[i], id) == 1 then
    tell(KEYS[i + 1], ARGV[i + 2])
    told[#told] = 1
  end
end
return told
"""


@dataclass(slots=True)
class Depth:
    """What waits of one tenant: how many jobs, how old the oldest is, and in which streams from which id on.

    `pace`: ms by which the oldest one's time of arrival advances in a ms.
    """

    waiting: int = 0
    oldest_ms: int = 0
    pace: float = 1.0
    since: dict[str, str] = field(default_factory=dict)

    @property
    def surplus(self) -> int:
        """Jobs beyond those that will be served within PATIENCE_MS; one may always wait."""
        if self.oldest_ms <= PATIENCE_MS / 2:
            return 0  # too soon to say
        return max(0, self.waiting - max(1, int(self.waiting * self.pace * PATIENCE_MS / self.oldest_ms)))


def whom(depths: Mapping[str, Depth], weight: Callable[[str], float], most: int) -> dict[str, int]:
    """Tenant -> how many of its jobs go, `most` in all: always the next one of the largest, by weight."""
    heap = [(-depth.waiting / weight(tenant), tenant) for tenant, depth in depths.items() if depth.surplus]
    heapq.heapify(heap)
    going: dict[str, int] = {}
    while heap and sum(going.values()) < most:
        _, tenant = heapq.heappop(heap)
        going[tenant] = going.get(tenant, 0) + 1
        if going[tenant] < depths[tenant].surplus:
            heapq.heappush(heap, (-(depths[tenant].waiting - going[tenant]) / weight(tenant), tenant))
    return going


class Shedding:
    """What one worker refuses of the streams it reads; `any` is the business of the first of its peers."""

    def __init__(self, ingress: Ingress) -> None:
        self.ingress = ingress
        self._depths = ingress.redis.register_script(DEPTHS)
        self._refuse = ingress.redis.register_script(REFUSE)
        self._heads: dict[str, tuple[int, int, float]] = {}  # tenant -> when its oldest came, when we looked, pace

    async def shed(self, *, full: bool) -> int:
        """Every SWEEP_MS; one that is `full` reads nothing, so it looks at everyone. Returns how many went."""
        ingress = self.ingress
        waiting = [t for t in ingress.tenants if full or t in ingress.busy or ingress.usage.over(t)]
        if not waiting:
            return 0
        depths = await self.depths(waiting)
        self._note_pace(depths)
        shed = 0
        for tenant, count in whom(depths, ingress.shares.weight, SHED_MAX).items():
            shed += await self._shed(tenant, depths[tenant], count)
        return shed

    def _note_pace(self, depths: Mapping[str, Depth]) -> None:
        """How fast each queue's head has advanced since the last look, smoothed."""
        now, before, self._heads = self.ingress.now_ms(), self._heads, {}
        for tenant, depth in depths.items():
            came = now - depth.oldest_ms
            if tenant in before and now > before[tenant][1]:
                was, at, pace = before[tenant]
                depth.pace = pace + _MEMORY * (min(1.0, max(0.0, (came - was) / (now - at))) - pace)
            self._heads[tenant] = came, now, depth.pace

    async def depths(self, tenants: Iterable[str]) -> dict[str, Depth]:
        """What waits of these, in the streams that are ours to look after."""
        ingress = self.ingress
        workers = [ingress.worker, *([keys.ANY] if ingress.is_first else [])]
        asked = [(tenant, keys.jobs(ingress.target, tenant, worker)) for tenant in tenants for worker in workers]
        depths: dict[str, Depth] = {}
        for first in range(0, len(asked), keys.STREAMS_MAX):
            some = asked[first : first + keys.STREAMS_MAX]
            told = await self._depths(keys=[stream for _, stream in some], args=[keys.GROUP_WORKERS])
            for (tenant, stream), waiting, oldest in zip(some, told[::2], told[1::2], strict=True):
                if waiting:
                    depth = depths.setdefault(tenant, Depth())
                    depth.waiting += waiting
                    depth.since[stream] = oldest.decode()
                    age_ms = ingress.now_ms() - int(oldest.partition(b"-")[0])
                    depth.oldest_ms = max(depth.oldest_ms, age_ms)
        return depths

    # --- one tenant ------------------------------------------------------------------------------------------

    async def _shed(self, tenant: str, depth: Depth, count: int) -> int:
        """Its stale and expired ones first, then its newest."""
        jobs = await self._jobs(depth, count)
        newest: dict[tuple[str, str], int] = {}
        for _, job in jobs:
            session = (job.agent, job.session)
            newest[session] = max(newest.get(session, 0), job.epoch)
        going: list[tuple[Delivery, VerifyJob | ScoreJob, RefusalCode]] = []
        for delivery, job in jobs:
            if self.ingress.age_ms(delivery) > job.deadline_ms:
                going.append((delivery, job, "expired"))
            elif isinstance(job, VerifyJob) and job.epoch < newest[job.agent, job.session]:
                going.append((delivery, job, "stale"))
        chosen = {(delivery.stream, delivery.entry_id) for delivery, _, _ in going}
        rest = [pair for pair in jobs if (pair[0].stream, pair[0].entry_id) not in chosen]
        going += [(*pair, "overloaded") for pair in rest[::-1][: max(0, count - len(going))]]
        return await self._refuse_all(going, self._sentence(tenant, depth))

    async def _jobs(self, depth: Depth, count: int) -> list[tuple[Delivery, VerifyJob | ScoreJob]]:
        """The oldest and the newest jobs that wait, oldest first; what is no job stays where it is."""
        pipe = self.ingress.redis.pipeline(transaction=False)
        for stream, oldest in depth.since.items():
            pipe.xrange(stream, oldest, "+", count=OLD_MAX)
            pipe.xrevrange(stream, "+", oldest, count=count)
        answers = await pipe.execute()
        streams = [stream for stream in depth.since for _ in range(2)]
        found = {
            (stream, entry_id): read(stream, entry_id, fields)
            for stream, entries in zip(streams, answers, strict=True)
            for entry_id, fields in entries
        }
        inorder = sorted(found.values(), key=lambda delivery: tuple(map(int, delivery.entry_id.split("-"))))
        jobs = []
        for place, delivery in enumerate(inorder):
            if job := _job(delivery):
                jobs.append((delivery, job))
            if place % DECODED_AT_ONCE == DECODED_AT_ONCE - 1:
                await asyncio.sleep(PAUSE_SECONDS)
        return jobs

    def _sentence(self, tenant: str, depth: Depth) -> str:
        why = self.ingress.usage.over(tenant)
        about = f"tenant {tenant} is {why}: " if why else ""
        return f"{about}{depth.waiting} of its jobs wait, the oldest for {depth.oldest_ms} ms: try again later"

    async def _refuse_all(
        self, going: list[tuple[Delivery, VerifyJob | ScoreJob, RefusalCode]], overloaded: str
    ) -> int:
        shed = 0
        for first in range(0, len(going), SHED_AT_ONCE):
            some = going[first : first + SHED_AT_ONCE]
            names: list[str] = []
            args: list[Any] = [keys.GROUP_WORKERS]
            for delivery, job, code in some:
                sentence = overloaded if code == "overloaded" else f"{code} before a worker had room for it"
                refusal = Refusal.of(job, code, sentence, worker=self.ingress.worker, credit=0)
                names += [delivery.stream, keys.replies(delivery.tenant, delivery.agent or job.agent)]
                args += [delivery.entry_id, encode(refusal, padded=is_padded(delivery.payload))]
            gone = await self._refuse(keys=names, args=args)
            for (_, _, code), done in zip(some, gone, strict=True):
                shed += done
                metrics.SHED.labels(code).inc(done)
            await asyncio.sleep(PAUSE_SECONDS)
        return shed


def _job(delivery: Delivery) -> VerifyJob | ScoreJob | None:
    try:
        message: Any = decode(delivery.payload, ToWorker)
    except InvalidMessage:
        return None
    return message if isinstance(message, VerifyJob | ScoreJob) else None
