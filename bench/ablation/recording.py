"""What happens inside an agent, round by round: a broker and a drafter that write down what passes through them.

Both are the product's own with a pen: nothing is changed, delayed or left out. One generation at a time is recorded,
from `begin` to `rounds`. Times are ms since `begin` on the process's own clock.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from time import perf_counter
from typing import Any

from pilotfish.bench.wrapped import WrappedDrafter
from pilotfish.edge_agent.drafters.base import Draft, Drafter, Proceed
from pilotfish.protocol.broker import EdgeBroker
from pilotfish.protocol.codec import encode
from pilotfish.protocol.errors import InvalidMessage
from pilotfish.protocol.messages import Message, Refusal, Sampling, ToEdge, Verdict, VerifyJob

Round = dict[str, Any]


class Notes:
    """What was seen of one generation."""

    def __init__(self, acceptance: Callable[[float], float]) -> None:
        self.acceptance = acceptance  # what a confidence was worth, by all verdicts so far
        self.begin()

    def begin(self) -> None:
        """Forget the last generation."""
        self._started = perf_counter()
        self._proposed: dict[int, tuple[int, float]] = {}  # position -> (id, confidence) of the latest draft there
        self._rounds: dict[tuple[str, int, int], Round] = {}  # (session, epoch, round)
        self.other_bytes = 0

    def ms(self) -> float:
        """Since `begin`."""
        return round(1000 * (perf_counter() - self._started), 3)

    def drafted(self, base: int, draft: Draft) -> None:
        """Tokens proposed for [base, ...)."""
        for offset, (token, confidence) in enumerate(zip(draft.ids, draft.confidences, strict=False)):
            self._proposed[base + offset] = (token, confidence)

    def sent(self, message: Message) -> None:
        """A message left for the worker."""
        size = len(encode(message))
        if not isinstance(message, VerifyJob):
            self.other_bytes += size
            return
        known = self._rounds.setdefault((message.session, message.epoch, message.round), self._round(message))
        known["sends"] += 1
        known["job_bytes"] += size

    def _round(self, job: VerifyJob) -> Round:
        places = range(job.base, job.base + len(job.draft))
        proposed = [self._proposed.get(place, (-1, 0.0)) for place in places]
        confidences = [
            round(confidence, 6) if token == drafted else None
            for (token, confidence), drafted in zip(proposed, job.draft, strict=True)
        ]
        known = [None if confidence is None else round(self.acceptance(confidence), 6) for confidence in confidences]
        return {
            "epoch": job.epoch, "round": job.round, "base": job.base, "drafted": len(job.draft),
            "continues": job.continue_tokens, "confidences": confidences, "estimates": known,
            "sent_ms": self.ms(), "answered_ms": None,
            "accepted": None, "refused": None, "sends": 0, "rows": 0, "steps": 0, "cached": 0,
            "engine_ms": 0.0, "queue_ms": 0.0, "job_bytes": 0, "reply_bytes": 0,
        }  # fmt: skip

    def heard(self, message: ToEdge | InvalidMessage) -> None:
        """A reply came."""
        if not isinstance(message, Verdict | Refusal):
            if not isinstance(message, InvalidMessage):
                self.other_bytes += len(encode(message))
            return
        if (known := self._rounds.get((message.session, message.epoch, message.round))) is None:
            return  # of the generation before
        known["reply_bytes"] += len(encode(message))
        if isinstance(message, Refusal):
            known["refused"] = message.code
            return
        if known["accepted"] is None:
            known |= {"accepted": message.accepted, "answered_ms": self.ms(), "queue_ms": message.queue_ms}
            known["cached"] = message.cached
        for name in ("rows", "steps", "engine_ms"):
            known[name] += getattr(message, name)

    @property
    def rounds(self) -> list[Round]:
        """Since `begin`, in the order they were sent."""
        return list(self._rounds.values())


class RecordingBroker(EdgeBroker):
    """An EdgeBroker whose messages are noted."""

    notes: Notes

    async def publish(self, target: str, worker: str, message: Message) -> bytes:
        """See EdgeBroker."""
        self.notes.sent(message)
        return await super().publish(target, worker, message)

    async def replies(self) -> AsyncGenerator[ToEdge | InvalidMessage, None]:
        """See EdgeBroker."""
        async for message in super().replies():
            self.notes.heard(message)
            yield message


class RecordingDrafter(WrappedDrafter):
    """Another drafter, whose proposals are noted."""

    def __init__(self, inner: Drafter, notes: Notes) -> None:
        super().__init__(inner)
        self.notes = notes

    def draft(
        self,
        session: str,
        ids: Sequence[int],
        k: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        proceed: Proceed | None = None,
    ) -> Draft:
        """See Drafter."""
        drafted = self.inner.draft(session, ids, k, sampling, stop_ids, proceed)
        self.notes.drafted(len(ids), drafted)
        return drafted
