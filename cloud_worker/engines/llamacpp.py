"""The verifier on llama.cpp: the rounds of several sessions as rows of shared forward passes.

A session is a sequence of one context, kept between rounds: a round computes what its prefix lacks plus K + 1 rows.
The settings are the exact ones (F32 KV, no flash attention, padding as `cache/llama_sequences.py` says): a round and a
plain continuation compute the same bits, so there are no near-ties to explain. Knows nothing of jobs or replies.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pilotfish.cache.llama_context import LlamaContext, LlamaModel, Logits
from pilotfish.cache.llama_library import library_version
from pilotfish.cache.llama_sequences import SPARE, Part, Sequences, Slot
from pilotfish.cloud_worker.engines.base import EngineInfo, Verifier, VerifyEvent, VerifyRequest, check_request
from pilotfish.protocol.errors import EngineError, ModelError
from pilotfish.protocol.sampling import draw, log_probabilities

_BATCH = 512  # rows of one pass at most
_CHUNK = 64  # prefill rows per pass while other requests wait


@dataclass(slots=True, eq=False)
class _Round:
    """A request in progress. `ids` grow as draws are accepted; the last `wanted` of them need logits."""

    request: VerifyRequest
    ids: list[int]
    wanted: int
    left: int  # tokens still to continue with
    slot: Slot | None = None
    first: bool = True
    rows: int = 0
    steps: int = 0
    cached: int = 0


class LlamaCppVerifier(Verifier):
    """A GGUF target. Raises ModelError if the file cannot be used, EngineError if memory is short."""

    def __init__(
        self, model_path: Path, *, context: int, draft_max: int, max_sessions: int, threads: int, resident: bool = True
    ) -> None:
        self.model, self._resident = LlamaModel(model_path), resident
        try:
            self._context = self._open(context, draft_max, max_sessions, threads)
        except (EngineError, ModelError):
            self.model.close()
            raise
        self._sequences = Sequences(self._context, exact=True)
        self._rounds: dict[str, _Round] = {}
        self._chunk = max(_CHUNK, draft_max + 2)
        version = library_version()
        mark = hashlib.sha256(f"llama.cpp {version} f32 {self.model.digest}".encode()).hexdigest()
        self.info = EngineInfo(
            "llama.cpp", version, mark, self.model.vocab_size, context, draft_max, self.model.name, logprobs=True
        )

    def _open(self, context: int, draft_max: int, max_sessions: int, threads: int) -> LlamaContext:
        if not self.model.rolls_back:
            raise ModelError(
                f"{self.model.name} is recurrent ({self.model.architecture}): its state cannot forget rejected tokens; "
                "choose a target with attention only."
            )
        batch = max(_BATCH, draft_max + 2)
        outputs = min(batch, max_sessions * (draft_max + 2))
        return LlamaContext(
            self.model, n_ctx=context + SPARE, sequences=max_sessions, n_batch=batch, outputs=outputs, threads=threads
        )

    @property
    def passes(self) -> int:
        """Forward passes since the start."""
        return self._context.passes

    @property
    def busy(self) -> bool:
        """True while some request waits for a step."""
        return bool(self._rounds)

    def submit(self, request: VerifyRequest) -> None:
        """Queue one request. Raises RequestRefused (with the sentence) if it can never be served."""
        check_request(request, self.info, self._rounds)
        ids = [*request.prefix, *request.draft]
        self._rounds[request.request_id] = _Round(request, ids, len(request.draft) + 1, request.continue_tokens)

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored. What it computed stays with its session, if anything does."""
        round_ = self._rounds.pop(request_id, None)
        if round_ and not self._resident:
            self.forget(round_.request.session)

    def forget(self, session: str) -> None:
        """Free a session's sequence; one with a request in progress gives it up when another session needs it."""
        if not any(r.request.session == session and r.slot for r in self._rounds.values()):
            self._sequences.forget(session)

    def step(self) -> list[VerifyEvent]:
        """Advance every request that has a sequence by one forward pass; some may share theirs."""
        active = self._active()
        parts = {self._next_part(round_, len(active)): round_ for round_ in active}
        events = (self._advance(parts[part], part, logits) for part, logits in self._sequences.evaluate(list(parts)))
        return [event for event in events if event is not None]

    def _active(self) -> list[_Round]:
        """The oldest request of each session that has, or now gets, a sequence."""
        chosen: dict[str, _Round] = {}
        for round_ in self._rounds.values():
            chosen.setdefault(round_.request.session, round_)
        busy = {s for s, r in chosen.items() if r.slot is not None}
        for session, round_ in chosen.items():
            if round_.slot is None:
                round_.slot = self._sequences.hold(session, busy)
                if round_.slot is not None:
                    busy.add(session)
                    kept = self._sequences.fit(round_.slot, round_.ids[: len(round_.request.prefix)])
                    round_.cached = kept
        return [r for r in chosen.values() if r.slot is not None]

    def _next_part(self, round_: _Round, n_active: int) -> Part:
        """All that is missing, or a chunk of the prefix: short rounds must not wait for a long prefill."""
        assert round_.slot is not None
        missing = round_.ids[len(round_.slot.ids) :]
        limit = self._context.n_batch if n_active == 1 else self._chunk
        if len(missing) > limit:
            return Part(round_.slot, missing[: min(limit, len(missing) - round_.wanted)], 0)
        return Part(round_.slot, missing, round_.wanted)

    def _advance(self, round_: _Round, part: Part, logits: Logits) -> VerifyEvent | None:
        """Count what was computed; draw, accept and roll back if the round's own rows were in it."""
        if part.error:
            return self._fail(round_, part.error)
        round_.rows += part.computed
        round_.steps += 1
        if not part.wanted:
            return None
        base = len(round_.ids) - round_.wanted + 1
        try:
            draws = draw(logits, np.arange(base, base + round_.wanted), round_.request.sampling).tolist()
        except ValueError as error:  # NaN: what is cached of this session is not to be trusted
            self._sequences.trim(part.slot, 0)
            return self._fail(round_, f"The target's logits are unusable ({error}); try again.")
        likely = log_probabilities(logits, draws) if round_.request.logprobs else []
        return self._emit(round_, base, draws, likely)

    def _emit(self, round_: _Round, base: int, target: list[int], likely: list[float]) -> VerifyEvent:
        request, slot = round_.request, round_.slot
        assert slot is not None
        draft = round_.ids[base:]
        accepted = next((i for i, (a, b) in enumerate(zip(draft, target, strict=False)) if a != b), len(draft))
        kept = len(draft) if request.score else accepted
        draws = target[: kept + 1]
        self._sequences.trim(slot, base + kept)
        round_.ids = [*round_.ids[: base + kept], draws[-1]]
        round_.left -= 0 if round_.first else 1
        done = round_.left == 0 or any(t in request.stop_ids for t in draws)
        event = VerifyEvent(
            request.request_id, draws, accepted, round_.rows, round_.steps, round_.cached, done,
            logprobs=likely[: accepted + 1],
        )  # fmt: skip
        round_.first, round_.wanted, round_.rows, round_.steps, round_.cached = False, 1, 0, 0, 0
        if done:
            del self._rounds[request.request_id]
            if not self._resident:
                self._sequences.forget(request.session)
        return event

    def _fail(self, round_: _Round, sentence: str) -> VerifyEvent:
        del self._rounds[round_.request.request_id]
        return VerifyEvent(round_.request.request_id, [], rows=round_.rows, steps=round_.steps, error=sentence)

    def close(self) -> None:
        """Free the KV memory, then the weights."""
        self._context.close()
        self.model.close()
