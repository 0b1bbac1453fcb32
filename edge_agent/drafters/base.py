"""What the agent wants from a small model on the device: the next tokens it would draw, and how sure it is.

A drafter serves several generations at once; it is synchronous and has one owner thread. It keeps, per session, the KV
of the ids it saw last: the caller just passes the ids as they now stand, whatever was rejected in between. A drafter
changes speed and never text. Knows nothing of policies, verdicts or the cloud.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pilotfish.protocol.messages import Sampling

Proceed = Callable[[int, float], bool]  # (id, confidence) of the token just drafted -> draft another?
Confidence = Callable[[NDArray[np.float32], int, int, Sampling], float]  # (logits [vocab], id, position, sampling)


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """What the agent must know about a drafter; `fingerprint` covers weights, KV type, engine and version (hex)."""

    engine: str
    version: str
    fingerprint: str
    vocab_size: int
    context: int  # tokens of one session, prompt and answer together
    model: str  # a name for people


@dataclass(frozen=True, slots=True)
class Draft:
    """Drafted ids, each with a confidence in [0, 1]; `ms` is wall time, `prefilled` the prefix ids evaluated for it."""

    ids: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    ms: float = 0.0
    prefilled: int = 0


class Drafter(ABC):
    """A draft model that proposes by the coupled draw, so that agreement with the target is acceptance."""

    info: DrafterInfo

    @abstractmethod
    def draft(
        self,
        session: str,
        ids: Sequence[int],
        k: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        proceed: Proceed | None = None,
    ) -> Draft:
        """Up to k tokens after `ids` (one at least); fewer after a stop id, a full context or a no from `proceed`.

        Raises EngineError if the model fails, RequestRefused if the ids can never be drafted for.
        """

    def sync(self, session: str, ids: Sequence[int]) -> int:
        """Prefill a session ahead of its next draft; returns the ids evaluated."""
        return 0

    def prefill(self, session: str, ids: Sequence[int], rows: int) -> bool:
        """Evaluate at most `rows` of what the session lacks of `ids`; True once a draft would find all of it there.

        So that a long prompt does not hold the model's thread while short drafts of others wait.
        """
        return True

    def close_session(self, session: str) -> None:  # noqa: B027
        """Drop what is kept for a session; unknown sessions are ignored."""

    @property
    def beat(self) -> dict[str, str]:
        """What an agent's beat says of its drafter: field -> text that people read. Asked for on any thread."""
        return {}

    def close(self) -> None:  # noqa: B027
        """Release the model."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def drawn_probability(logits: NDArray[np.float32], token: int, position: int, sampling: Sampling) -> float:
    """The probability the model gives to the token drawn, at the request's temperature (1 if that is 0), unfiltered."""
    scaled = logits / np.float32(sampling.temperature or 1.0)
    weights = np.exp(scaled - scaled.max())
    return float(weights[token] / weights.sum())
