"""One generation as a pure state machine: what is committed, what is in flight, what a verdict changes.

    history    prompt + committed ids; only these are ever shown or kept
    flight     micro-batches published and not yet answered, oldest first; their drafts extend the history by assumption
    epoch      bumped whenever that assumption breaks; verdicts of an older epoch are dropped

A verdict applies iff its epoch is the session's and its digest is that of the session's own history at its base. It
asserts draws for [base, base + n): the part that overlaps committed ids must agree, the rest extends them. One whose
base lies ahead waits in a reorder buffer no longer than the window. Every input is a method, every output a value:
no clock, no I/O, no drafter. Follows DESIGN section 3; the coupled draw is what makes dropping and repeating safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest

from pilotfish.protocol.history import History
from pilotfish.protocol.messages import FinishReason, Origin, Refusal, Sampling, ScoreJob, Verdict, VerifyJob


@dataclass(frozen=True, slots=True)
class Committed:
    """A token that is final, and who wrote it."""

    id: int
    origin: Origin
    logprob: float | None = None  # the target's, at temperature 1, where the job asked for it


@dataclass(frozen=True, slots=True)
class Round:
    """A published micro-batch that awaits its verdict. `continues` ids are expected beyond draft and bonus."""

    number: int
    base: int
    draft: tuple[int, ...]
    continues: int = 0
    attempt: int = 0
    whole: bool = False  # its job carried every id from 0

    @property
    def reach(self) -> int:
        """End of what its verdict can assert."""
        return self.base + len(self.draft) + 1 + self.continues


@dataclass(slots=True)
class Counts:
    """What the session saw, for the summary and the metrics; each dropped verdict is counted under its reason."""

    rounds: int = 0
    resends: int = 0
    drafted: int = 0
    applied: int = 0
    stale: int = 0
    duplicate: int = 0
    disagreed: int = 0
    invalid: int = 0
    reordered: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """When a generation ends, and how much may be in flight."""

    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    window: int = 1
    resends: int = 2

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.window < 1:
            raise ValueError(f"a generation of {self.max_tokens} tokens and a window of {self.window} can never move")


@dataclass(slots=True)
class Session:
    """See the module docstring. `finish` is None while the generation goes on; nothing changes once it is set."""

    id: str
    history: History
    limits: Limits
    vocab_size: int
    epoch: int = 0
    flight: list[Round] = field(default_factory=list)
    finish: FinishReason | None = None
    counts: Counts = field(default_factory=Counts)
    prompt_tokens: int = 0
    unsent: int = 0  # local tokens behind everything that a job carried
    credit: int = 1  # jobs that the worker which answered last would take now
    _waiting: list[Verdict] = field(default_factory=list)
    _next_round: int = 0
    _served_to: int = 0

    @classmethod
    def start(
        cls, id: str, target: str, sampling: Sampling, prompt: Sequence[int], limits: Limits, vocab_size: int
    ) -> Session:
        """A session about to write the first token after `prompt` (at least one id, else ValueError)."""
        if not prompt:
            raise ValueError("a session needs at least one id to go on from")
        session = cls(id, History(target, sampling, prompt), limits, vocab_size)
        session.prompt_tokens = len(prompt)
        return session

    # --- questions -------------------------------------------------------------------------------------------

    @property
    def committed(self) -> int:
        """Length of prompt and committed ids."""
        return len(self.history)

    @property
    def generated(self) -> Sequence[int]:
        """Committed ids after the prompt."""
        return self.history.ids[self.prompt_tokens :]

    @property
    def remaining(self) -> int:
        """Tokens that may still be committed."""
        return self.limits.max_tokens - (self.committed - self.prompt_tokens)

    def assumed(self) -> list[int]:
        """Committed ids followed by every draft in flight: what the drafter goes on from."""
        return self._between(0, None)

    @property
    def flying(self) -> int:
        """Drafted ids in flight beyond the committed end."""
        return len(self._ahead())

    @property
    def window(self) -> int:
        """Rounds that may be in flight now: a worker that is full is not sent the next before it answered the last."""
        return self.limits.window if self.credit else 1

    def room(self) -> int:
        """How many ids a further micro-batch may draft; 0 when it could assert nothing that the flight does not.

        That is: the window is full, a round without a draft is out (what follows it is unknown until its verdict), or
        the drafts out already end the answer, counting the bonus token of the last.
        """
        if self.finish or len(self.flight) >= self.window or not all(r.draft for r in self.flight):
            return 0
        ahead = self._ahead()
        left = self.remaining - len(ahead)
        ends = left <= 1 if self.flight else left < 1
        return 0 if ends or self.limits.stop_ids.intersection(ahead) else left

    def _ahead(self) -> list[int]:
        """Ids in flight beyond the committed end; rounds are contiguous, the first may overlap what is committed."""
        ahead: list[int] = []
        for flying in self.flight:
            ahead += flying.draft[max(0, self.committed + len(ahead) - flying.base) :]
        return ahead

    def _between(self, start: int, stop: int | None) -> list[int]:
        """Ids [start, stop) of the history as the flight assumes it."""
        ids = self.history.ids[start:stop].tolist()
        if stop is None or stop > self.committed:
            ahead = self._ahead()
            ids += ahead[max(0, start - self.committed) : None if stop is None else stop - self.committed]
        return ids

    # --- outputs: jobs ---------------------------------------------------------------------------------------

    def publish(self, draft: Sequence[int], continues: int = 0) -> Round:
        """Open a round over `draft`, which continues `assumed()`. The caller checked `room()`.

        A round either drafts or continues: a correction ends its epoch, and would orphan the chunks that follow.
        """
        if draft and continues:
            raise ValueError("a round either drafts or continues")
        ahead = self._ahead()
        flying = Round(self._next_round, self.committed + len(ahead), tuple(draft), continues)
        self._next_round += 1
        self.flight.append(flying)
        self.counts.rounds += 1
        self.counts.drafted += len(flying.draft)
        return flying

    def job(self, flying: Round, *, agent: str, boot: str, deadline_ms: int) -> VerifyJob:
        """The message of a round. It carries the ids that earlier jobs of this session have not carried."""
        offset = 0 if flying.whole else min(self._served_to, flying.base)
        self._served_to, self.unsent = flying.base, 0
        return VerifyJob(
            agent=agent,
            boot=boot,
            session=self.id,
            epoch=self.epoch,
            round=flying.number,
            base=flying.base,
            digest=self._digest_at(flying.base),
            offset=offset,
            ids=tuple(self._between(offset, flying.base)),
            draft=flying.draft,
            continue_tokens=flying.continues,
            sampling=self.sampling,
            stop_ids=tuple(sorted(self.limits.stop_ids)),
            deadline_ms=deadline_ms,
        )

    def score_job(self, start: int, end: int, *, whole: bool, agent: str, boot: str, deadline_ms: int) -> ScoreJob:
        """An audit of the committed tokens [start, end); `whole`: with every id before them."""
        offset = 0 if whole else min(self._served_to, start)
        self._served_to, self.unsent = end, 0
        self._next_round += 1
        return ScoreJob(
            agent=agent,
            boot=boot,
            session=self.id,
            epoch=self.epoch,
            round=self._next_round - 1,
            base=start,
            digest=self.history.digest(start),
            offset=offset,
            ids=tuple(self.history.ids[offset:start]),
            draft=tuple(self.history.ids[start:end]),
            sampling=self.sampling,
            deadline_ms=deadline_ms,
        )

    @property
    def sampling(self) -> Sampling:
        """The parameters every draw of this session uses."""
        return self.history.sampling

    def _knows(self, base: int) -> bool:
        """False beyond the last draft in flight: a continuation's chunk whose predecessors are still to come."""
        return base <= self.committed + len(self._ahead())

    def _digest_at(self, base: int) -> bytes:
        own = min(base, self.committed)
        return self.history.digest(own, self._between(own, base))

    # --- inputs: verdicts ------------------------------------------------------------------------------------

    def on_verdict(self, verdict: Verdict) -> list[Committed]:
        """Apply a verdict, and any that waited for it. Returns what became final, in order; [] for one dropped."""
        out = self._consider(verdict)
        while out and self._waiting and not self.finish:
            ready = [v for v in self._waiting if v.base <= self.committed]
            if not ready:
                break
            for late in ready:
                if late in self._waiting:  # an epoch bump clears the buffer
                    self._waiting.remove(late)
                    out += self._consider(late)
        return out

    def _consider(self, verdict: Verdict) -> list[Committed]:
        if self.finish or verdict.session != self.id or verdict.epoch != self.epoch:
            self.counts.stale += 1
            return []
        if not self._plausible(verdict):
            self.counts.invalid += 1
            return []
        if self._knows(verdict.base) and verdict.digest != self._digest_at(verdict.base):
            self.counts.stale += 1
            return []
        if verdict.base > self.committed:
            self._wait(verdict)
            return []
        return self._apply(verdict)

    def _plausible(self, verdict: Verdict) -> bool:
        """A verdict from a worker that knows this vocabulary, about tokens that were ours to ask for."""
        return (
            verdict.base >= self.prompt_tokens
            and 0 <= verdict.accepted <= len(verdict.draws)
            and all(draw < self.vocab_size for draw in verdict.draws)
            and len(verdict.logprobs) in (0, len(verdict.draws))
        )

    def _wait(self, verdict: Verdict) -> None:
        """Two workers finish out of order: keep it until what lies before it is committed."""
        known = any(v.base == verdict.base and v.round == verdict.round for v in self._waiting)
        if self._flies(verdict.round) and not known and len(self._waiting) < self.limits.window:
            self._waiting.append(verdict)
            self.counts.reordered += 1

    def _flies(self, number: int) -> bool:
        return any(flying.number == number for flying in self.flight)

    def _apply(self, verdict: Verdict) -> list[Committed]:
        overlap = self.committed - verdict.base
        if tuple(self.history.ids[verdict.base : verdict.base + len(verdict.draws)]) != verdict.draws[:overlap]:
            self._disagree(verdict)
            return []
        self.credit = verdict.credit
        fresh = self._with_origins(verdict.draws[overlap:], verdict.logprobs[overlap:])
        self.counts.applied += bool(fresh)
        self.counts.duplicate += not fresh
        self.history.extend(token.id for token in fresh)
        if self.finish or any(token.origin == "corrected" for token in fresh):
            self.bump()
        self._land(verdict)
        return fresh

    def _disagree(self, verdict: Verdict) -> None:
        """An honest near-tie: the first valid verdict stands. A round that cannot join on to it is asked afresh."""
        self.counts.disagreed += 1
        if self._flies(verdict.round):
            self.bump()

    def _with_origins(self, draws: Sequence[int], logprobs: Sequence[float]) -> list[Committed]:
        """Draws beyond the committed end, cut where the generation ends; past a correction nothing was drafted."""
        ahead, fresh = self._ahead(), list[Committed]()
        for token, logprob in zip_longest(draws, logprobs):
            drafted = ahead[len(fresh)] if len(fresh) < len(ahead) else None
            fresh.append(Committed(token, _origin(token, drafted), logprob))
            if fresh[-1].origin == "corrected":
                ahead = []
            if self._ends(token, len(fresh)):
                break
        return fresh

    def _ends(self, token: int, fresh: int) -> bool:
        if token in self.limits.stop_ids:
            self.finish = "stop"
        elif fresh >= self.remaining:
            self.finish = "length"
        return self.finish is not None

    def _land(self, verdict: Verdict) -> None:
        """Rounds that said their last word, or can say nothing new, are no longer in flight."""
        self.flight = [
            r for r in self.flight if not (verdict.last and r.number == verdict.round) and r.reach > self.committed
        ]
        if self.flight and self.flight[0].base > self.committed:
            self.bump()  # a round was verified in part: what was drafted behind it no longer joins on

    def bump(self) -> None:
        """The assumption broke: a new epoch, nothing in flight, nothing waiting."""
        self.epoch += 1
        self.flight.clear()
        self._waiting.clear()
        self._served_to = min(self._served_to, self.committed)

    # --- inputs: everything else -----------------------------------------------------------------------------

    def on_silence(self) -> Round | None:
        """The oldest round's timer fired, or its job was refused for now: publish it again in a new epoch.

        Returns the round to send (with whatever of its draft is still ahead), or None when its resends are used up.
        A round that got somewhere (a continuation's chunks) has them all again.
        """
        if not self.flight:
            return None
        oldest = self.flight[0]
        attempt = oldest.attempt if self.committed == oldest.base else 0
        if attempt >= self.limits.resends:
            return None
        draft = oldest.draft[max(0, self.committed - oldest.base) :]
        continues = max(0, oldest.reach - self.committed - len(draft) - 1) if oldest.continues else 0
        self.bump()
        again = Round(self._next_round, self.committed, draft, continues, attempt + 1, whole=True)
        return self._republish(again)

    def on_need_prefix(self, number: int) -> Round | None:
        """The worker does not know the session: send the round once more with every id, in the same epoch.

        None if it carried every id already, which an honest worker never answers so.
        """
        for index, flying in enumerate(self.flight):
            if flying.number == number and not flying.whole:
                self.flight[index] = replace(flying, whole=True)
                self.counts.resends += 1
                return self.flight[index]
        return None

    def _republish(self, flying: Round) -> Round:
        self._next_round += 1
        self.flight.append(flying)
        self.counts.resends += 1
        return flying

    def concerns(self, refusal: Refusal) -> bool:
        """True if the refusal is about a round still in flight in this epoch."""
        return refusal.session == self.id and refusal.epoch == self.epoch and self._flies(refusal.round)

    def commit_local(self, ids: Sequence[int]) -> list[Committed]:
        """Commit drafted ids without the cloud. Whatever was in flight is abandoned.

        So a gate commits only while nothing is in flight: behind an outstanding verdict its tokens are provisional.
        """
        if self.flight:
            self.bump()
        out: list[Committed] = []
        for token in ids:
            if self.finish:
                break
            out.append(Committed(token, "local"))
            self._ends(token, len(out))
        self.history.extend(token.id for token in out)
        self.unsent += len(out)
        return out

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        """The generation ends here: the user stopped it, or its text met a stop string (`reason` "stop")."""
        if not self.finish:
            self.finish = reason
            self.bump()


def _origin(token: int, drafted: int | None) -> Origin:
    if drafted is None:
        return "continued"
    return "accepted" if drafted == token else "corrected"
