"""Who serves a new session: keep its first job, or pass it on to the worker that would be through with it first.

The worker that took a job from the common stream asks the prefix index once, which counts in seconds: (tokens queued +
tokens of the prefix not cached) / prefill rate. Later rounds stick to the worker that answered. Routing is a matter of
speed: whatever fails here is logged and counted, and the job is kept. Knows jobs, deliveries and tenants' salts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Literal

from pilotfish.cache.block_hash import block_hashes, cacheable, short
from pilotfish.cache.prefix_index import Route
from pilotfish.cloud_worker.block_feed import INDEX_ERRORS, BlockFeed
from pilotfish.cloud_worker.salts import Salts
from pilotfish.protocol import keys, metrics
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.errors import BrokerError
from pilotfish.protocol.ingress import Ingress
from pilotfish.protocol.messages import Cancel, Close, VerifyJob

log = logging.getLogger("pilotfish.routing")

Routing = Literal["prefix", "load", "off"]

ROUTE_SECONDS = 0.25  # an index slower than that is asked in vain
FOLLOW_SECONDS = 2.0  # jobs of a session that come so soon after its first one go where that went
NOTES_SECONDS = 60.0  # cancel and close do, for longer: the edge does not know where it went before the first verdict
BACKLOG_SECONDS = 0.5  # of prefill in hand: what was passed on beyond it is left for idle peers
DECISIONS = 4096

Session = tuple[str, str, str]  # tenant, agent, session


class PassedOn(Exception):
    """The job is another worker's: there is nothing to answer here."""


class Start:
    """The first job of a session in this worker's hands: what was promised for it, what it turned out to cost."""

    def __init__(self, router: Router, prefix: int, predicted: int = -1, tokens: int = 0) -> None:
        self._router, self.prefix, self.predicted, self.tokens = router, prefix, predicted, tokens
        self.evicted_before, self._open = router.feed.evicted, True
        router.begin(self)

    def answered(self, cached: int, rows: int) -> None:
        """The engine's first draws: `cached` prefix tokens were not computed, `rows` positions were."""
        if self._open:
            self._open = False
            self._router.end(self, rows)
            self._router.judge(self, cached)

    def close(self) -> None:
        """No verdict came, or it did: nothing is under way any more."""
        if self._open:
            self._open = False
            self._router.end(self, 0)


class Router:
    """The routing of one worker. `knows` says whether this worker has served a session before."""

    def __init__(
        self, ingress: Ingress, feed: BlockFeed, block_size: int, salts: Salts, knows: Callable[[Session], bool],
        routing: Routing = "prefix",
    ) -> None:  # fmt: skip
        self.ingress, self.feed, self.block_size, self.salts = ingress, feed, block_size, salts
        self.knows, self.routing = knows, routing
        self.counts: Counter[str] = Counter(
            kept=0, passed_on=0, stolen=0, predicted=0, predicted_equal=0, cached_tokens=0, prefix_tokens=0
        )
        self._decisions: OrderedDict[Session, tuple[float, asyncio.Future[str]]] = OrderedDict()
        self._asking = 0
        self._starts: set[Start] = set()

    # --- keep or pass on -------------------------------------------------------------------------------------

    async def place(self, delivery: Delivery, job: VerifyJob) -> Start | None:
        """Decide about a job. Raises PassedOn when it is another worker's now; a Start if a session begins here."""
        session = (delivery.tenant, job.agent, job.session)
        if self.ingress.is_mine(delivery) or delivery.stolen:
            return self._arrived(delivery, job)
        if self.knows(session):
            return None
        if (decided := self._decided(session, FOLLOW_SECONDS)) is not None:
            await self._follow(delivery, await asyncio.shield(decided))
            return None
        if job.offset or len(job.ids) != job.base or delivery.hops >= keys.HOPS_MAX or not self.feed.share:
            return None
        return await self._decide(delivery, job, session)

    async def follow(self, delivery: Delivery, note: Cancel | Close) -> None:
        """A note about a session whose job was passed on goes after it. Raises PassedOn."""
        session = (delivery.tenant, note.agent, note.session)
        if (decided := self._decided(session, NOTES_SECONDS)) is not None:
            await self._follow(delivery, await asyncio.shield(decided))

    def _arrived(self, delivery: Delivery, job: VerifyJob) -> Start | None:
        """What a peer passed on is ours, without a second question."""
        if delivery.stolen:
            self._count("stolen")
            return Start(self, job.base)
        if not delivery.queued_tokens:
            return None  # it followed its session's first one
        return Start(self, job.base, delivery.cached_tokens, delivery.queued_tokens)

    async def _decide(self, delivery: Delivery, job: VerifyJob, session: Session) -> Start | None:
        me = self.ingress.worker
        decided: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._decisions[session] = (asyncio.get_running_loop().time(), decided)
        while len(self._decisions) > DECISIONS:
            self._decisions.popitem(last=False)
        where = me
        try:
            route = await self._ask(job, delivery.tenant)
            if route and route.worker != me and await self._pass_on(delivery, route):
                where = route.worker
        finally:
            decided.set_result(where)
        if where != me:
            self._count("passed_on")
            raise PassedOn
        self._count("kept")
        if route is None or route.worker != me:
            return Start(self, job.base)
        return Start(self, job.base, route.blocks * self.block_size, route.tokens)

    async def _ask(self, job: VerifyJob, tenant: str) -> Route | None:
        blocks: list[bytes] = []
        if self.routing == "prefix":
            names = block_hashes(job.ids, self.block_size, self.salts.of(tenant))
            blocks = [short(name) for name in names[: cacheable(job.base, self.block_size)]]
        self._asking += 1
        try:
            async with asyncio.timeout(ROUTE_SECONDS):
                return await self.feed.index.route(self.ingress.worker, job.base, self.block_size, blocks)
        except INDEX_ERRORS as error:  # a time-out is an OSError
            self._failed(error)
            return None
        finally:
            self._asking -= 1

    async def _pass_on(self, delivery: Delivery, route: Route) -> bool:
        cached = route.blocks * self.block_size if self.routing == "prefix" else -1
        try:
            return await self.ingress.pass_on(
                delivery, route.worker, cached_tokens=cached, queued_tokens=max(1, route.tokens)
            )
        except (*INDEX_ERRORS, BrokerError) as error:
            self._failed(error)
            return False

    async def _follow(self, delivery: Delivery, worker: str) -> None:
        if worker != self.ingress.worker and await self.ingress.pass_on(delivery, worker):
            raise PassedOn

    def _decided(self, session: Session, within_seconds: float) -> asyncio.Future[str] | None:
        when, decided = self._decisions.get(session, (float("-inf"), None))
        return decided if asyncio.get_running_loop().time() - when < within_seconds else None

    # --- what is under way -----------------------------------------------------------------------------------

    def begin(self, start: Start) -> None:
        """A session begins here."""
        self._starts.add(start)
        self.feed.rate.begin(asyncio.get_running_loop().time())

    def end(self, start: Start, rows: int) -> None:
        """Its prefix is computed, or given up."""
        self._starts.discard(start)
        self.feed.rate.end(asyncio.get_running_loop().time(), rows)
        if start.tokens:
            self.feed.computed(start.tokens)

    def judge(self, start: Start, cached: int) -> None:
        """Every routed job logs what was predicted and what was there, in tokens."""
        self.counts["prefix_tokens"] += start.prefix
        self.counts["cached_tokens"] += cached
        if start.predicted < 0 or self.routing != "prefix":
            return
        log.debug("of %d tokens %d were predicted to be cached, %d were", start.prefix, start.predicted, cached)
        self.counts["predicted"] += 1
        self.counts["predicted_equal"] += start.predicted == cached
        own = (start.prefix - cached) // self.block_size + 1  # blocks that had to go to make room for this very prefix
        others = self.feed.evicted - start.evicted_before - own
        excused = others >= (start.predicted - cached) // self.block_size
        self.feed.judge(start.predicted, cached, excused=excused)

    @property
    def takes_more(self) -> bool:
        """False while there is prefill enough in hand: what was passed on may go to an idle peer."""
        rate = self.feed.rate.per_second
        return not rate or sum(start.tokens for start in self._starts) / rate < BACKLOG_SECONDS

    async def beat(self, *, serving: bool) -> None:
        """With the worker's own beat: the lease, and the true length of the queue where it can be known."""
        if not serving:
            await self.feed.leave()
        known = not self._asking and not self.ingress.waiting
        await self.feed.beat(sum(start.tokens for start in self._starts) if known else -1)
        await self.salts.keep()

    def describe(self) -> dict[str, str]:
        """For the worker's beat, as text for people."""
        held = {"kv_held": len(self.feed.mirror), "kv_blocks": self.feed.kv_blocks, "block_size": self.block_size}
        return {name: str(value) for name, value in {**held, **self.counts}.items()}

    def _count(self, outcome: str) -> None:
        self.counts[outcome] += 1
        metrics.ROUTES.labels(outcome).inc()

    def _failed(self, error: Exception) -> None:
        metrics.INDEX_ERRORS.inc()
        log.warning("a job could not be routed (%s %s): it is kept", type(error).__name__, error)
