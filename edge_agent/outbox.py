"""A generation's way to the workers: its jobs on their way to Redis, who is asked next, whether anybody is there.

Knows nothing of what jobs ask or answers say. Nobody waits for Redis to confirm a job: drafting goes on meanwhile, and
one that could not leave comes back to the inbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import NamedTuple

from pilotfish.edge_agent.session import Round
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import BrokerError, NoWorker
from pilotfish.protocol.fleet import Target
from pilotfish.protocol.messages import Close, Refusal, ScoreJob, Scores, Verdict, VerifyJob


class Unsent(NamedTuple):
    """A job that did not reach Redis, or nobody who would read it there."""

    flying: Round
    why: str


Inbox = asyncio.Queue[Verdict | Scores | Refusal | Unsent]


class Outbox:
    """`worker` is asked next: the one that answered last; "": whoever is free. Without a broker nothing ever leaves.

    `hasty`: a job that Redis takes longer to confirm than is usual counts as one that could not leave.
    """

    def __init__(self, broker: EdgeBroker | None, target: Target | None, inbox: Inbox, *, hasty: bool = False) -> None:
        self._broker, self._target, self._inbox, self._hasty = broker, target, inbox, hasty
        self.open = broker is not None
        self.agent, self.boot = (broker.agent, broker.boot) if broker else ("", "")
        self.worker, self._asked = "", False
        self._posts: set[asyncio.Task[None]] = set()  # jobs on their way

    async def send(self, flying: Round, job: VerifyJob) -> None:
        """A round's job leaves, without waiting for it to arrive."""
        post = asyncio.create_task(self._post(flying, self.publish(job)))
        self._posts.add(post)
        post.add_done_callback(self._posts.discard)
        await asyncio.sleep(0)  # so that jobs leave in the order of their rounds

    def publish(self, message: VerifyJob | ScoreJob | Close) -> Awaitable[bytes]:
        """To be awaited until Redis has it, which raises NoWorker or BrokerError if it cannot."""
        assert self._broker is not None
        assert self._target is not None
        self._asked = True
        return self._broker.publish(self._target.id, self.worker, message)

    async def _post(self, flying: Round, sent: Awaitable[bytes]) -> None:
        """A broker that is away, or without workers, is told to the loop, which tries again later."""
        patience = self._broker.patience if self._broker and self._hasty else None
        try:
            async with asyncio.timeout(patience):
                await sent
        except (NoWorker, BrokerError, TimeoutError) as error:
            self._inbox.put_nowait(Unsent(flying, str(error) or "Redis does not answer"))

    async def end(self, *, drop: bool) -> None:
        """What is still on its way arrives, or with `drop` (nobody answers there) is given up."""
        posts = list(self._posts)
        for post in posts if drop else ():
            post.cancel()
        await asyncio.gather(*posts, return_exceptions=True)

    async def say_goodbye(self, session: str) -> None:
        """The session is over: whoever was asked may stop and forget it. Best effort, nothing depends on it."""
        if self._asked:
            with suppress(NoWorker, BrokerError):
                await self.publish(Close(agent=self.agent, boot=self.boot, session=session))

    async def anybody_there(self) -> bool:
        """Whether Redis answers, and a worker of the target lives."""
        if self._broker is None or self._target is None:
            return False
        try:
            return await self._broker.pulse.answers() and await self._broker.live_workers(self._target.id) > 0
        except BrokerError:
            return False
