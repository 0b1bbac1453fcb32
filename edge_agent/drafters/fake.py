"""A drafter that agrees with a known target as often as it is told to: chosen acceptance, and honest confidence.

The target is a function given by the caller, so this module needs neither a model nor the cloud's side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from time import perf_counter, sleep

from pilotfish.edge_agent.drafters.base import Draft, Drafter, DrafterInfo, Proceed
from pilotfish.protocol.errors import RequestRefused
from pilotfish.protocol.messages import Sampling

Target = Callable[[Sequence[int], int, Sampling], int]  # (prefix ids, position, sampling) -> the target's draw


class FakeDrafter(Drafter):
    """Proposes the target's draw with probability `alpha` per token, else another id; the same for the same seed.

    `spread` in [0, 1] varies that probability from token to token around `alpha`; the confidence is the
    probability used. `token_ms` is how long a token takes.
    """

    def __init__(
        self,
        target: Target,
        *,
        alpha: float = 0.8,
        spread: float = 0.0,
        vocab_size: int = 256,
        context: int = 4096,
        seed: int = 0,
        token_ms: float = 0.0,
    ) -> None:
        self._target, self._alpha, self._seed, self._token_ms = target, alpha, seed, token_ms
        self._swing = spread * min(alpha, 1 - alpha)
        mark = hashlib.sha256(f"fake drafter {vocab_size}".encode()).hexdigest()
        self.info = DrafterInfo("fake", "1", mark, vocab_size, context, "fake")

    def draft(
        self,
        session: str,
        ids: Sequence[int],
        k: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        proceed: Proceed | None = None,
    ) -> Draft:
        """See `Drafter.draft`; sessions do not matter here."""
        if not ids:
            raise RequestRefused("There is nothing to draft after; send at least one token.")
        start = perf_counter()
        prefix, confidences = list(ids), list[float]()
        for _ in range(min(k, self.info.context - len(ids))):
            sleep(self._token_ms / 1000)
            token, confidence = self._propose(prefix, sampling)
            prefix.append(token)
            confidences.append(confidence)
            if token in stop_ids or (proceed is not None and not proceed(token, confidence)):
                break
        return Draft(prefix[len(ids) :], confidences, 1e3 * (perf_counter() - start))

    def _propose(self, prefix: Sequence[int], sampling: Sampling) -> tuple[int, float]:
        right = self._target(prefix, len(prefix), sampling)
        confidence = self._alpha + self._swing * (2 * self._uniform("confidence", prefix, right) - 1)
        if self._uniform("accept", prefix, right) < confidence:
            return right, confidence
        other = int(self._uniform("other", prefix, right) * (self.info.vocab_size - 1))
        return other + (other >= right), confidence

    def _uniform(self, what: str, prefix: Sequence[int], right: int) -> float:
        text = f"{what}|{self._seed}|{len(prefix)}|{prefix[-1]}|{right}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") / 2**64
