"""An agent process: one drafter, one broker, many generations at once; takes submitted prompts.

Ties the parts together: a thread that owns the drafter, a task that reads every reply on one blocking connection and
hands it to its generation, a task that takes prompts (`submissions.py`), a task that beats. Knows nothing of HTTP or
terminals.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pilotfish.edge_agent.drafters.base import Draft, Drafter, Proceed
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.learning import Learner
from pilotfish.edge_agent.policy import Pace
from pilotfish.edge_agent.proposer import DraftFn
from pilotfish.edge_agent.submissions import Submissions
from pilotfish.edge_agent.task import WINDOW, Task
from pilotfish.edge_agent.tokenizer import Tokenizer, Turns
from pilotfish.protocol import keys, metrics
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.errors import (
    BrokerError,
    EmptyPrompt,
    InvalidMessage,
    PromptTooLong,
    StoreError,
)
from pilotfish.protocol.fleet import Target
from pilotfish.protocol.messages import (
    CancelRequest,
    Drafting,
    Prompt,
    Sampling,
)
from pilotfish.protocol.tasks import end_tasks

log = logging.getLogger("pilotfish.agent")
T = TypeVar("T")
SAVE_SECONDS = 30.0
PREFILL_ROWS = 256  # ids of a prompt that are read at a time, between the drafts of others
OnDraft = Callable[[int, Draft], None]  # (position of its first id in the sequence, draft)

INBOX_MAX = 256  # messages that wait for one generation

PULSE_SECONDS = 0.05  # between two PINGs; with the broker's patience, what a pause of Redis costs a reader


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets where it does not say otherwise."""

    drafting: Drafting = "auto"
    draft_tokens: int | None = None
    window: int = WINDOW
    resends: int = 2
    round_timeout_ms: int = 5_000
    max_requests: int = 8
    max_disagreement: float = 0.02
    audit_share: float = 0.05


class Agent:
    """See the module docstring. Without broker and target only `edge_only` generations run."""

    def __init__(
        self,
        drafter: Drafter,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        broker: EdgeBroker | None = None,
        target: Target | None = None,
        defaults: Defaults | None = None,
        learner: Learner | None = None,
    ) -> None:
        self.drafter, self.tokenizer, self.stop_ids = drafter, tokenizer, frozenset(stop_ids)
        self.broker, self.target, self.defaults = broker, target, defaults or Defaults()
        self.pace = Pace()
        self.learner = learner or Learner(drafter.info.fingerprint, target.id if target else "", "")
        self.generations: dict[str, Generation] = {}
        self._coin = random.SystemRandom()
        self._known: dict[str, int] = {}  # session -> ids the drafter was given last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="drafter")
        self._tasks: list[asyncio.Task[None]] = []
        self._submissions = Submissions(self, broker) if broker else None
        self._taking: asyncio.Task[None] | None = None

    # --- life ------------------------------------------------------------------------------------------------

    async def start(self, *, take_prompts: bool = False) -> None:
        """Begin to read replies, and with `take_prompts` to serve what shells submit."""
        if self.broker is None or self._submissions is None:
            return
        self._tasks.append(asyncio.create_task(_for_ever(self._read_replies)))
        self._tasks.append(asyncio.create_task(_for_ever(self._save_often)))
        self._tasks.append(asyncio.create_task(_for_ever(self._feel_pulse)))
        if take_prompts:
            await self.broker.open_prompts()
            self._taking = asyncio.create_task(_for_ever(self._submissions.take))
            await self._beat()
            self._tasks += [self._taking, asyncio.create_task(_for_ever(self._beat_often))]

    async def stop(self) -> None:
        """End every task and generation, leave the fleet, free the drafter."""
        await end_tasks(self._tasks)
        if self._submissions:
            await self._submissions.end()
        self._save()
        if self.broker is not None:
            with suppress(BrokerError):
                await self.broker.leave()
            await self.broker.redis.aclose()
        await self._on_thread(self.drafter.close)
        self._thread.shutdown()

    async def drain(self, seconds: float) -> None:
        """Take no more prompts; give those running some time. Their leases are renewed all the while."""
        if self._taking:
            await end_tasks([self._taking])
        if self._submissions:
            await self._submissions.finish(seconds)

    # --- generations -----------------------------------------------------------------------------------------

    async def encode(self, text: str | Turns, *, chat: bool, max_tokens: int) -> tuple[int, ...]:
        """Token ids of a prompt, or of a conversation's turns. Raises EmptyPrompt or PromptTooLong."""
        if not (text if isinstance(text, str) else text[-1]["content"]).strip():
            raise EmptyPrompt("the prompt is empty: give some text, a file, or - for standard input")
        ids = await self._on_thread(lambda: self.tokenizer.encode(text, chat=chat))
        if not ids:
            raise EmptyPrompt("the prompt has no tokens: give some text")
        if len(ids) + max_tokens + 1 > self.context:
            raise PromptTooLong(
                f"the prompt's {len(ids)} tokens and {max_tokens} for the answer exceed the context of {self.context}: "
                f"shorten it or lower --max-tokens"
            )
        return tuple(ids)

    @property
    def context(self) -> int:
        """Longest prompt and answer together, in tokens: the shorter of draft and target."""
        return min([self.drafter.info.context, *([self.target.context] if self.target else [])])

    def open(self, task: Task, on_draft: OnDraft | None = None) -> Generation:
        """A generation of this agent; run it, then `close` it. `on_draft` sees what is drafted before it is judged."""
        learned, share = self.learner.of(task.sampling), 0.0
        if task.mode == "gated":
            share = learned.gate(task.max_disagreement).audit_share(self.defaults.audit_share)
        chosen = share if self._coin.random() < share else None
        generation = Generation(
            task, self._drafting(on_draft), self.broker, self.target, self.vocab_size, learned, chosen, self.pace
        )
        self.generations[generation.session.id] = generation
        metrics.RUNNING.set(len(self.generations))
        return generation

    def close(self, generation: Generation) -> None:
        """Learn what a generation teaches, then forget it, here and in the drafter."""
        if self.generations.pop(generation.session.id, None):
            self.learner.learn(generation.task.sampling, generation.lesson())
            metrics.observe(generation.summary())
            metrics.RUNNING.set(len(self.generations))
            self._known.pop(generation.session.id, None)
            self._thread.submit(self.drafter.close_session, generation.session.id)

    def task(self, prompt: Prompt, ids: tuple[int, ...]) -> Task:
        """A prompt's wishes, completed by this agent's defaults."""
        chosen = self.defaults.draft_tokens if prompt.draft_tokens is None else prompt.draft_tokens
        budget = self.defaults.max_disagreement if prompt.max_disagreement is None else prompt.max_disagreement
        return Task(
            prompt=ids,
            mode=prompt.mode,
            on_cloud_loss=prompt.on_cloud_loss or ("local" if prompt.mode == "gated" else "wait"),
            max_disagreement=budget,
            sampling=prompt.sampling,
            max_tokens=prompt.max_tokens,
            stop_ids=self.stop_ids,
            drafting=self.defaults.drafting,
            draft_tokens=chosen,
            window=self.defaults.window,
            resends=self.defaults.resends,
            round_timeout_ms=self.defaults.round_timeout_ms,
            deadline_ms=prompt.deadline_ms,
        )

    @property
    def vocab_size(self) -> int:
        """Ids a verdict may contain."""
        return len(self.target.vocabulary) if self.target else self.drafter.info.vocab_size

    async def _draft(
        self,
        session: str,
        ids: Sequence[int],
        count: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        proceed: Proceed,
    ) -> Draft:
        """A draft; what it needs of a long prompt is read in turns with other generations' drafts."""
        known, self._known[session] = self._known.get(session, 0), len(ids)
        for _ in range((len(ids) - known) // PREFILL_ROWS):  # bounded: others may take the session's sequence away
            if await self._on_thread(lambda: self.drafter.prefill(session, ids, PREFILL_ROWS)):
                break
        return await self._on_thread(lambda: self.drafter.draft(session, list(ids), count, sampling, stop_ids, proceed))

    def _drafting(self, on_draft: OnDraft | None) -> DraftFn:
        if on_draft is None:
            return self._draft

        async def draft(session: str, ids: Sequence[int], *how: Any) -> Draft:
            drafted = await self._draft(session, ids, *how)
            on_draft(len(ids), drafted)
            return drafted

        return draft

    async def _on_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    # --- loops -----------------------------------------------------------------------------------------------

    async def _read_replies(self) -> None:
        assert self.broker is not None
        assert self._submissions is not None
        async for message in self.broker.replies():
            if isinstance(message, InvalidMessage):
                log.warning("a reply could not be read: %s", message)
            elif isinstance(message, CancelRequest):
                self._submissions.cancel(message.request)
            elif message.boot == self.broker.boot and (found := self.generations.get(message.session)):
                _hand_over(found.inbox, message)

    async def _feel_pulse(self) -> None:
        """Generations that may go on alone hear at once that Redis is silent; it costs a PING while there are any."""
        assert self.broker is not None
        while True:
            await asyncio.sleep(PULSE_SECONDS)
            waiting = [generation for generation in self.generations.values() if generation.may_go_on_alone]
            if waiting and not await self.broker.pulse.answers():
                for generation in waiting:
                    generation.redis_is_silent()

    async def _beat_often(self) -> None:
        while True:
            await asyncio.sleep(keys.BEAT_EVERY_MS / 1000)
            with suppress(BrokerError):
                await self._beat()

    async def _beat(self) -> None:
        assert self.broker is not None
        assert self._submissions is not None
        target = self.target.id if self.target else ""
        fields = {
            "running": str(len(self.generations)), "target": target,
            "max_disagreement": f"{self.defaults.max_disagreement:.6f}", **self.drafter.beat, **metrics.told(),
        }  # fmt: skip
        await self.broker.beat(fields, taking=self._taking is not None and not self._taking.done())
        await self._submissions.keep()

    async def _save_often(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            self._save()

    def _save(self) -> None:
        try:
            self.learner.save()
        except StoreError as error:
            log.warning("%s", error)


def _hand_over(inbox: asyncio.Queue[Any], message: Any) -> None:
    """Unless a worker has gone wild: then the round's timer makes up for what is lost."""
    if inbox.qsize() < INBOX_MAX:
        inbox.put_nowait(message)


async def _for_ever(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run one of the agent's loops; a fault of ours in it is logged, and does not leave the agent deaf."""
    while True:
        try:
            await loop()
        except Exception:
            log.exception("%s failed: it starts again", loop.__name__)
            await asyncio.sleep(keys.BEAT_EVERY_MS / 1000)


def new_boot() -> str:
    """A name for this run of an agent; replies to an earlier run are not ours."""
    return secrets.token_hex(8)
