"""The drafter on llama.cpp: sessions are sequences of one context, the least recently used one makes room.

Speed matters here and last bits do not (a draft is checked): one row per token, no padding, F16 KV.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

import numpy as np

from pilotfish.cache.edge_cache import EdgeCache
from pilotfish.cache.llama_context import LlamaContext, LlamaModel, Logits
from pilotfish.cache.llama_library import library_version
from pilotfish.cache.llama_sequences import Part, Sequences, Slot
from pilotfish.cache.model_build import ModelBuild
from pilotfish.edge_agent.drafters.base import Confidence, Draft, Drafter, DrafterInfo, Proceed, drawn_probability
from pilotfish.protocol.errors import EngineError, RequestRefused
from pilotfish.protocol.messages import Sampling
from pilotfish.protocol.sampling import draw

KV = "f16"  # half the memory and disk of f32


class LlamaCppDrafter(Drafter):
    """A GGUF draft model. Raises ModelError if the file cannot be used, EngineError if memory is short.

    `sessions` bounds the sequences kept at once. More sessions are served, and a closed one may be followed by its next
    turn: with a `cache` what they had is restored, without one it is prefilled again. The drafter closes the cache.
    Unless `resident`, it forgets a session's KV with every draft.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        context: int = 4096,
        sessions: int = 4,
        threads: int = 1,
        kv: str = KV,
        cache: EdgeCache | None = None,
        resident: bool = True,
        confidence: Confidence = drawn_probability,
    ) -> None:
        self.model = LlamaModel(model_path)
        try:
            self._context = LlamaContext(
                self.model, n_ctx=context, sequences=sessions, threads=threads, kv=kv, outputs=8
            )
        except EngineError:
            self.model.close()
            raise
        self._sequences = Sequences(self._context, exact=False, cache=cache)
        self._confidence, self._resident = confidence, resident
        mark = ModelBuild.of(model_path, kv).fingerprint
        self.info = DrafterInfo("llama.cpp", library_version(), mark, self.model.vocab_size, context, self.model.name)

    def draft(
        self,
        session: str,
        ids: Sequence[int],
        k: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        proceed: Proceed | None = None,
    ) -> Draft:
        """See `Drafter.draft`. `ms` includes the prefill of whatever the session's KV lacked."""
        start = perf_counter()
        self._check(ids)
        k = min(k, self.info.context - len(ids))
        if k <= 0:
            return Draft()
        slot, prefilled = self._prefill(session, ids)
        drafted: list[int] = []
        confidences: list[float] = []
        token = ids[-1]
        while len(drafted) < k:
            logits = self._evaluate(slot, [token], wanted=1)
            token, confidence = self._draw(slot, logits, len(ids) + len(drafted), sampling)
            drafted.append(token)
            confidences.append(confidence)
            if token in stop_ids or (proceed is not None and not proceed(token, confidence)):
                break
        if not self._resident:
            self._sequences.trim(slot, 0)
        return Draft(drafted, confidences, 1e3 * (perf_counter() - start), prefilled)

    def _draw(self, slot: Slot, logits: Logits, position: int, sampling: Sampling) -> tuple[int, float]:
        try:
            token = int(draw(logits, np.array([position], np.int64), sampling)[0])
        except ValueError as error:  # NaN: what is computed is not to be trusted, nor saved
            self._sequences.trim(slot, 0)
            raise EngineError(f"The draft's logits are unusable ({error}); try again.") from error
        return token, self._confidence(logits[0], token, position, sampling)

    def sync(self, session: str, ids: Sequence[int]) -> int:
        """Roll the session's KV back to what it shares with `ids` and evaluate the rest, all but the last id."""
        self._check(ids)
        return self._prefill(session, ids)[1]

    def prefill(self, session: str, ids: Sequence[int], rows: int) -> bool:
        """See `Drafter.prefill`."""
        self._check(ids)
        slot = self._sequences.hold(session)
        assert slot is not None
        kept = self._sequences.fit(slot, ids)
        end = min(len(ids) - 1, kept + min(rows, self._context.n_batch))
        if end > kept:
            self._evaluate(slot, ids[kept:end], wanted=0)
        return end == len(ids) - 1

    def _prefill(self, session: str, ids: Sequence[int]) -> tuple[Slot, int]:
        slot = self._sequences.hold(session)
        assert slot is not None  # nothing is ever busy between calls
        kept = self._sequences.fit(slot, ids)
        for at in range(kept, len(ids) - 1, self._context.n_batch):
            self._evaluate(slot, ids[at : min(at + self._context.n_batch, len(ids) - 1)], wanted=0)
        return slot, len(ids) - kept

    def _evaluate(self, slot: Slot, ids: Sequence[int], wanted: int) -> Logits:
        part = Part(slot, ids, wanted)
        ((_, logits),) = self._sequences.evaluate([part])
        if part.error:
            raise EngineError(part.error)
        return logits

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise RequestRefused("There is nothing to draft after; send at least one token.")
        if len(ids) > self.info.context:
            raise RequestRefused(
                f"{len(ids)} tokens exceed the drafter's context of {self.info.context}; raise --context."
            )
        bad = next((i for i in ids if not 0 <= i < self.info.vocab_size), None)
        if bad is not None:
            raise RequestRefused(f"Token id {bad} is not in the draft model's vocabulary of {self.info.vocab_size}.")

    def close_session(self, session: str) -> None:
        """Free the session's sequence; a cache keeps its state for whoever begins as it did."""
        self._sequences.forget(session)

    @property
    def beat(self) -> dict[str, str]:
        """See `Drafter.beat`: the cache's statistics, nothing without one."""
        cache = self._sequences.cache
        return {f"cache_{name}": str(value) for name, value in asdict(cache.statistics).items()} if cache else {}

    def close(self) -> None:
        """Free the sessions and the cache, the KV memory, then the weights."""
        self._sequences.close()
        self._context.close()
        self.model.close()
