"""What an agent learns while it serves: one `Learned` per kind of draw, loaded from and saved to the store.

The thin shell around `calibration.py` and `gate.py`: it knows which generation teaches what, and files. A broken file
or a full disk is told in one sentence, and serving goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pilotfish.edge_agent.calibration import Calibration, Labelled, Sums
from pilotfish.edge_agent.gate import Evidence, Gate, Watch
from pilotfish.edge_agent.learned import Key, Store
from pilotfish.protocol import metrics
from pilotfish.protocol.errors import StoreError
from pilotfish.protocol.messages import Sampling

log = logging.getLogger("pilotfish.learning")

GATES_MOST = 64  # budgets at a time: every request may bring its own


@dataclass(slots=True)
class Lesson:
    """What one generation teaches at its end. `weight`: 1 over the chance that its local tokens' labels became known.

    `budget` is that of the gate whose tokens were audited, None without an audit. `whole`: its drafted tokens all have
    labels, and whether they would was settled before it began, by a shut gate or by the coin. Only then is it evidence:
    see `gate.py`.
    """

    labels: Sequence[Labelled]
    whole: bool
    weight: float = 1.0
    budget: float | None = None


@dataclass(slots=True)
class Learned:
    """Map, evidence and gates of one kind of draw; `saved`: what of it the store has."""

    calibration: Calibration = field(default_factory=Calibration)
    evidence: Evidence = field(default_factory=Evidence)
    gates: dict[float, Gate] = field(default_factory=dict)
    saved: Sums = field(default_factory=dict)

    def gate(self, budget: float) -> Gate:
        """The gate of a budget; all share the evidence."""
        if budget not in self.gates:
            while len(self.gates) >= GATES_MOST:
                self.gates.pop(next(iter(self.gates)))
            self.gates[budget] = Gate(self.evidence, budget)
        return self.gates[budget]

    def judged(self, labels: Iterable[Labelled]) -> None:
        """Labels of a verdict, as it comes: the map follows within an answer."""
        for label in labels:
            self.calibration.observe(label.score, label.agreed)

    def learn(self, lesson: Lesson) -> bool:
        """Take in one generation. True if its audit shut the gate: the budget was being passed."""
        for label in lesson.labels:
            if label.local:  # the others were learnt when they were judged
                self.calibration.observe(label.score, label.agreed, lesson.weight)
        if lesson.whole and lesson.labels:
            self.evidence.observe(lesson.labels)
        alarmed = lesson.budget is not None and self._watch(lesson.budget, lesson.labels)
        if alarmed:
            self.forget()
        for gate in self.gates.values():
            gate.refresh()
        return alarmed

    def _watch(self, budget: float, labels: Sequence[Labelled]) -> bool:
        watch = self.gate(budget).watch
        watch.observe(labels)
        return watch.alarmed

    def forget(self) -> None:
        """The text has changed: what was learnt before says nothing of what comes. The store forgets it as well."""
        for name in self.evidence.sums():
            getattr(self.evidence, name)[:] = 0
        for gate in self.gates.values():
            gate.watch = Watch(gate.budget)

    # --- keeping ---------------------------------------------------------------------------------------------

    def sums(self) -> Sums:
        """All of it."""
        return {**self.calibration.sums(), **self.evidence.sums()}

    def fresh(self) -> Sums:
        """What the store does not have yet; less than nothing where it was forgotten."""
        return {name: now - self.saved.get(name, 0.0) for name, now in self.sums().items()}

    def add(self, sums: Sums) -> None:
        """Take in what the store has."""
        self.calibration.add(sums)
        self.evidence.add(sums)
        self.saved = self.sums()


class Learner:
    """Everything one agent has learnt of its pair."""

    def __init__(self, draft: str, target: str, strategy: str, store: Store | None = None) -> None:
        self.draft, self.target, self.strategy, self.store = draft, target, strategy, store
        self._known: dict[Key, Learned] = {}

    def of(self, sampling: Sampling) -> Learned:
        """What is known of draws like these; from the store, the first time."""
        key = Key(self.draft, self.target, round(sampling.temperature, 2), self.strategy)
        if key not in self._known:
            self._known[key] = self._load(key)
        return self._known[key]

    def learn(self, sampling: Sampling, lesson: Lesson) -> None:
        """Take in one generation."""
        if lesson.budget is not None:
            metrics.AUDITED.inc(sum(label.local for label in lesson.labels))
            metrics.AUDIT_DISAGREED.inc(sum(label.local and not label.agreed for label in lesson.labels))
        if self.of(sampling).learn(lesson):
            metrics.GATE_ALARMS.inc()
            log.warning(
                "audits say that more than %.3g of the tokens differ from the target's: the gate is shut, and "
                "everything is verified until enough is learnt anew", lesson.budget,
            )  # fmt: skip

    def _load(self, key: Key) -> Learned:
        learned = Learned()
        if self.store is None:
            return learned
        try:
            sums = self.store.load(key)
            if sums:
                learned.add(sums)
        except StoreError as error:
            log.warning("%s", error)
        except (KeyError, ValueError) as error:
            log.warning("what was learnt in %s does not fit (%r): learning starts anew", key.file_name, error)
            return Learned()
        return learned

    def save(self) -> None:
        """Add to the store what it does not have. Raises StoreError; nothing is lost then, and the next call tries."""
        if self.store is None:
            return
        for key, learned in self._known.items():
            fresh = learned.fresh()
            if any(sums.any() for sums in fresh.values()):
                self.store.add(key, fresh)
                learned.saved = learned.sums()
