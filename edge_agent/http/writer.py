"""One choice of an answer: a generation whose tokens become text, up to a stop string.

Text is given out when no later token can change it: no character is cut in two, no stop string leaks. A token goes out
with the last of its text. Knows the agent; nothing of HTTP, of bodies, or of how the text is shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from pilotfish.edge_agent.agent import Agent
from pilotfish.edge_agent.drafters.base import Draft
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.http.stop_strings import StopStrings
from pilotfish.edge_agent.session import Committed
from pilotfish.edge_agent.task import Task
from pilotfish.edge_agent.text import Decoder
from pilotfish.protocol.messages import Origin, Summary


@dataclass(frozen=True, slots=True)
class Token:
    """A final token as a reader sees it; `confidence` is the drafter's, of the token it proposed there."""

    id: int
    text: str
    raw: bytes
    origin: Origin
    logprob: float | None = None
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class Correction:
    """The target drew another token than the draft, and what was drafted behind it (`withdrawn` tokens) falls."""

    at: int  # index in the answer
    was: str
    now: str
    withdrawn: int


@dataclass(frozen=True, slots=True)
class Drafted:
    """Provisional tokens from index `start` of the answer on."""

    start: int
    texts: list[str]
    confidences: list[float]


@dataclass(slots=True)
class Written:
    """What is new and final: its text, and the tokens whose text is out with it."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)

    def add(self, more: Written) -> None:
        """Append what came after."""
        self.text += more.text
        self.tokens += more.tokens


Watch = Callable[[Drafted | Correction], None]


class Writer:
    """Iterate `run()`; afterwards `finish` and `summary` say how it went."""

    def __init__(self, agent: Agent, task: Task, stops: Sequence[str] = (), watch: Watch | None = None) -> None:
        self.agent, self.task, self._watch = agent, task, watch
        self.finish, self.summary = "stop", Summary()
        self._decoder, self._stops = Decoder(agent.tokenizer.piece, agent.stop_ids), StopStrings(stops)
        self._owed: deque[tuple[Token, int]] = deque()  # token, where its text ends
        self._read = self._given = 0  # characters: decoded, and given out
        self._count = 0
        self._drafted: dict[int, tuple[int, float]] = {}  # index in the answer -> provisional id, confidence

    async def run(self) -> AsyncGenerator[Written, None]:
        """What becomes final, in order. Raises what the generation does. Closing it stops edge and cloud."""
        generation = self.agent.open(self.task, self._on_draft)
        try:
            async with aclosing(generation.run()) as run:
                async for tokens in run:
                    if new := self._write(tokens):
                        yield new
                    if self._stops.stopped:
                        generation.cancel("stop")  # the loop ends by itself, and says so to the worker
            if rest := self._end():
                yield rest
        finally:
            self._close(generation)

    def _close(self, generation: Generation) -> None:
        self.finish = "stop" if self._stops.stopped else generation.finish  # its last token may have ended both
        self.summary = generation.summary()
        self.agent.close(generation)

    def _write(self, tokens: Sequence[Committed]) -> Written | None:
        out = Written()
        for token in tokens:
            if not self._stops.stopped:
                out.add(self._give(self._stops.feed(self._take(token))))
        return out if out.text or out.tokens else None

    def _take(self, token: Committed) -> str:
        """The text that is complete with this token; the token waits until it is out."""
        text, raw = self._decoder.feed(token.id), self.agent.tokenizer.piece(token.id)
        self._read += len(text)
        confidence = self._compare(token, text)
        seen = Token(token.id, text, raw, token.origin, token.logprob, confidence)
        self._owed.append((seen, self._read))
        self._count += 1
        return text

    def _give(self, text: str) -> Written:
        self._given += len(text)
        out = Written(text)
        while self._owed and (self._owed[0][1] <= self._given or self._straddles(self._owed[0])):
            out.tokens.append(self._owed.popleft()[0])
        return out

    def _straddles(self, owed: tuple[Token, int]) -> bool:
        """Whether a stop string begins inside this token: its first part is out, the rest never will be."""
        token, end = owed
        return self._stops.stopped and end - len(token.text) < self._given

    def _end(self) -> Written | None:
        if self._stops.stopped:
            return None
        tail = self._decoder.end()
        self._read += len(tail)
        out = self._give(self._stops.feed(tail))
        if not self._stops.stopped:
            out.add(self._give(self._stops.end()))
        return out if out.text or out.tokens else None

    # --- what is drafted and corrected -----------------------------------------------------------------------

    def _on_draft(self, position: int, draft: Draft) -> None:
        start = position - len(self.task.prompt)
        for offset, (token, confidence) in enumerate(zip(draft.ids, draft.confidences, strict=True)):
            self._drafted[start + offset] = token, confidence
        if self._watch and draft.ids:
            self._watch(Drafted(start, self._texts(draft.ids), draft.confidences))

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return [self.agent.tokenizer.piece(token).decode(errors="replace") for token in ids]

    def _compare(self, token: Committed, text: str) -> float | None:
        """The confidence of what was drafted here; tells the watcher where the target drew something else."""
        drafted, confidence = self._drafted.pop(self._count, (None, None))
        if drafted is not None and drafted != token.id:
            withdrawn = len(self._drafted)
            self._drafted.clear()
            if self._watch:
                was = self.agent.tokenizer.piece(drafted).decode(errors="replace")
                self._watch(Correction(self._count, was, text, withdrawn))
        return confidence
