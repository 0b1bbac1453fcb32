"""Our verifier in a child process, driven without queue or front end: plain decoding, and rounds of replayed drafts.

Every draw is compared with the text it must be: a benchmark of wrong draws is none. Times are of this process alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pilotfish.bench.piped import serve
from pilotfish.cloud_worker.engines.base import Verifier, VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.spec import EngineSpec, open_verifier
from pilotfish.protocol import cores
from pilotfish.protocol.errors import EngineError

MODULE = "pilotfish.bench.verifier_child"


@dataclass(slots=True)
class Edge:
    """One simulated edge: its prompt, the text its target writes, and where its drafts agree with that."""

    session: str
    prompt: list[int]
    text: list[int]
    agrees: list[bool]
    vocab: int
    done: int = 0  # tokens of `text` committed
    sent_at: float = 0.0
    round_seconds: list[float] = field(default_factory=list)
    round_drafts: list[int] = field(default_factory=list)
    round_rows: list[int] = field(default_factory=list)

    def request(self, number: int, k: int) -> VerifyRequest:
        """Its next round: up to k drafts, wrong where it does not agree."""
        at = range(self.done, min(self.done + k, len(self.text) - 1))
        draft = [self.text[i] if self.agrees[i] else (self.text[i] + 1) % self.vocab for i in at]
        self.round_drafts.append(len(draft))
        self.sent_at = time.perf_counter()
        return VerifyRequest(f"{self.session}/{number}", self.session, self.prompt + self.text[: self.done], draft)

    def apply(self, event: VerifyEvent) -> None:
        """Take a verdict. Raises EngineError for draws that are not the text's."""
        self.round_seconds.append(time.perf_counter() - self.sent_at)
        self.round_rows.append(event.rows)
        right = self.text[self.done : self.done + len(event.draws)]
        if event.error or event.draws != right:
            raise EngineError(f"session {self.session} drew {event.draws} at {self.done}, not {right} {event.error}")
        self.done += len(event.draws)


def replay(engine: Verifier, edges: list[Edge], k: int) -> dict[str, Any]:
    """Closed loop: every edge sends its next round as soon as it has its verdict. Rows, steps, seconds, batch sizes."""
    rounds, batches = dict[str, Edge](), list[int]()
    start = time.perf_counter()
    for edge in edges:
        rounds[_submit(engine, edge, 0, k)] = edge
    number = 0
    while rounds:
        batches.append(len(rounds))
        for event in engine.step():
            edge = rounds.pop(event.request_id)
            edge.apply(event)
            if edge.done < len(edge.text):
                rounds[_submit(engine, edge, number := number + 1, k)] = edge
    seconds = time.perf_counter() - start
    for edge in edges:
        engine.forget(edge.session)
    per_round = ("round_seconds", "round_drafts", "round_rows")
    return {
        "seconds": seconds,
        "steps": len(batches),
        "batches": batches,
        "tokens": sum(edge.done for edge in edges),
        **{name: [value for edge in edges for value in getattr(edge, name)] for name in per_round},
    }


def _submit(engine: Verifier, edge: Edge, number: int, k: int) -> str:
    request = edge.request(number, k)
    engine.submit(request)
    return request.request_id


def decode(engine: Verifier, prompts: list[list[int]], lengths: list[int]) -> dict[str, Any]:
    """`lengths` tokens after the prompts, one row a step, side by side; `step_seconds` of the later half."""
    texts: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    start, step_seconds = time.perf_counter(), list[float]()
    for name, prompt, length in zip(texts, prompts, lengths, strict=True):
        engine.submit(VerifyRequest(name, f"decode {name}", prompt, [], continue_tokens=length - 1))
    while engine.busy:
        began = time.perf_counter()
        events = engine.step()
        step_seconds.append(time.perf_counter() - began)
        for event in events:
            texts[event.request_id] += event.draws
    seconds = time.perf_counter() - start
    for name in texts:
        engine.forget(f"decode {name}")
    return {"seconds": seconds, "texts": list(texts.values()), "step_seconds": step_seconds[len(step_seconds) // 2 :]}


class Child:
    """Opens its engine with the first question."""

    def __init__(self) -> None:
        self.engine: Verifier | None = None

    def handle(self, question: dict[str, Any]) -> Any:
        """open {spec} · decode {prompts, lengths} · replay {edges, k}"""
        do = question.pop("do")
        if self.engine is None:
            cores.bind(question["cores"])
            self.engine, _ = open_verifier(EngineSpec(**question))
            return self.engine.info.vocab_size
        if do == "decode":
            return decode(self.engine, **question)
        vocab = self.engine.info.vocab_size
        return replay(self.engine, [Edge(vocab=vocab, **edge) for edge in question["edges"]], question["k"])


if __name__ == "__main__":
    serve(Child().handle)
