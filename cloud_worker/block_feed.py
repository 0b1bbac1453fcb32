"""Keeps one worker's part of the prefix index equal to its engine's cache: block events in, batches out.

The mirror is the truth and the index a copy that may be lost: whenever it is (Redis flushed, a batch lost, an engine
restarted, predictions that do not come true) the worker registers anew, which makes the old copy unreachable at once,
and tells everything again, 100,000 blocks in about half a second. Knows blocks and tokens; nothing of jobs.
"""

from __future__ import annotations

import asyncio
import logging

import redis.exceptions as rx

from pilotfish.cache.block_mirror import BlockMirror
from pilotfish.cache.prefix_index import BATCH_BLOCKS, PrefixIndex, Published, Share, buckets_for
from pilotfish.cloud_worker.engines.base import KvChange
from pilotfish.protocol import metrics
from pilotfish.protocol.broker import PAUSE_MAX_SECONDS, PAUSE_SECONDS
from pilotfish.protocol.tasks import end_tasks

log = logging.getLogger("pilotfish.index")

LIES = 3  # predictions in a row that promised too much: the copy, or the mirror itself, is wrong
MUTE_SECONDS = (1.0, 64.0)  # a worker whose copy was wrong again tells nothing for so long, twice as long each time

INDEX_ERRORS = (rx.RedisError, OSError)


class PrefillRate:
    """Tokens a second that the engine prefills: rows over the time in which any prefill was under way, recent first."""

    KEEP = 0.9  # of the past, with every prefill that ends

    def __init__(self) -> None:
        self._rows = self._seconds = 0.0
        self._under_way, self._since = 0, 0.0

    def begin(self, now: float) -> None:
        """A prefill has begun."""
        if not self._under_way:
            self._since = now
        self._under_way += 1

    def end(self, now: float, rows: int) -> None:
        """One has ended; with `rows` 0 it was given up."""
        self._under_way -= 1
        self._rows = self._rows * self.KEEP + rows
        self._seconds = self._seconds * self.KEEP + now - self._since
        self._since = now

    @property
    def per_second(self) -> float:
        """0 until something was measured."""
        return self._rows / self._seconds if self._seconds > 0 else 0.0


class BlockFeed:
    """One worker's share of the index. `heard` is the engine's voice; everything else is told by a task of its own."""

    def __init__(self, index: PrefixIndex, worker: str, kv_blocks: int) -> None:
        self.index, self.worker, self.kv_blocks = index, worker, kv_blocks
        self.mirror, self.rate = BlockMirror(), PrefillRate()
        self.share: Share | None = None
        self.resyncs = self.evicted = 0
        self._buckets = buckets_for(kv_blocks)
        self._done_tokens = 0
        self._lies, self._mute_seconds, self._mute_until = 0, 0.0, 0.0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Register, so that the first job can be routed; an index that is away is tried again later."""
        self._wake.set()
        try:
            await self._tell()
        except INDEX_ERRORS as error:
            self._failed(error)
        self._task = asyncio.create_task(self._tell_for_ever())

    async def stop(self) -> None:
        """Nobody is sent here any more."""
        await end_tasks([self._task] if self._task else [])
        await self.leave()

    async def leave(self) -> None:
        """End the lease: a worker that drains, or goes."""
        share, self.share = self.share, None
        self._mute_until = float("inf")
        if share:
            try:
                await self.index.leave(share)
            except INDEX_ERRORS as error:
                self._failed(error)

    # --- from the engine -------------------------------------------------------------------------------------

    def heard(self, change: KvChange) -> None:
        """What the engine's cache did. One that was emptied is not told block by block."""
        if change.kind == "stored":
            self.mirror.stored(change.blocks)
        elif change.kind == "removed":
            self.mirror.removed(change.blocks)
            self.evicted += len(change.blocks)
        else:
            self.evicted += len(self.mirror)
            self.mirror.cleared()
            self.share = None
        self._wake.set()

    def computed(self, tokens: int) -> None:
        """Tokens reserved in our queue were computed, or given up."""
        self._done_tokens += tokens
        self._wake.set()

    def judge(self, predicted: int, actual: int, *, excused: bool = False) -> None:
        """Compare a prediction with what the engine took from its cache, in tokens.

        Too much promised LIES times in a row: this worker's copy is dropped, so that nobody is sent here for it, and
        told again from the mirror; if that is wrong too, after a silence. It is `excused` when the engine has evicted
        as much since: a cache under pressure is no lie.
        """
        outcome = "equal" if predicted == actual else "too_much" if predicted > actual else "too_little"
        metrics.PREDICTIONS.labels(outcome).inc()
        if outcome == "too_much" and excused:
            return
        self._lies = self._lies + 1 if outcome == "too_much" else 0
        if outcome == "equal" and predicted:
            self._mute_seconds = 0.0
        if self._lies >= LIES:
            self._lies = 0
            self._distrust()

    def _distrust(self) -> None:
        log.warning("this worker's part of the prefix index promised too much %d times: telling it again", LIES)
        self.share = None
        self._mute_until = asyncio.get_running_loop().time() + self._mute_seconds
        self._mute_seconds = min(MUTE_SECONDS[1], max(MUTE_SECONDS[0], 2 * self._mute_seconds))
        self._wake.set()

    # --- to the index ----------------------------------------------------------------------------------------

    async def beat(self, queued_tokens: int) -> None:
        """Renew the lease and remove a piece of what the dead left. -1: the queue in the index is what it is."""
        share = self.share
        try:
            if share and not await self.index.beat(share, self.rate.per_second, queued_tokens) and share is self.share:
                self.share = None
            if not self.share or self.mirror.untold:
                self._wake.set()
            await self.index.reap()
        except INDEX_ERRORS as error:
            self._failed(error)

    async def _tell_for_ever(self) -> None:
        pause = PAUSE_SECONDS
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._tell()
                pause = PAUSE_SECONDS
            except INDEX_ERRORS as error:
                self._failed(error)
                self.share = None  # the last batch came, or did not: begin anew
                await asyncio.sleep(pause)
                pause = min(PAUSE_MAX_SECONDS, 2 * pause)
                self._wake.set()

    async def _tell(self) -> None:
        """Until the index knows what the mirror does, unless we are to be silent."""
        while True:
            share = self.share or await self._register()
            if share is None or self._muted or not (self.mirror.untold or self._done_tokens):
                return
            tokens, self._done_tokens = self._done_tokens, 0
            changes = self.mirror.take(BATCH_BLOCKS)
            outcome = await self.index.publish(share, changes.stored, changes.removed, done_tokens=tokens)
            if outcome is not Published.DONE and share is self.share:
                self.share = None

    async def _register(self) -> Share | None:
        if self._mute_until == float("inf"):
            return None
        self.resyncs += 1
        self._done_tokens = 0  # a new epoch begins with an empty queue
        share = await self.index.register(self.worker, self._buckets, self.rate.per_second)
        self.mirror.retell()
        self.share = share
        return share

    @property
    def _muted(self) -> bool:
        return asyncio.get_running_loop().time() < self._mute_until

    def _failed(self, error: Exception) -> None:
        metrics.INDEX_ERRORS.inc()
        log.warning("the prefix index is away (%s %s): jobs stay where they are", type(error).__name__, error)
