"""Another drafter, with something in between: what a benchmark overrides, everything else passes through."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from pilotfish.edge_agent.drafters.base import Draft, Drafter, Proceed
from pilotfish.protocol.messages import Sampling


class WrappedDrafter(Drafter):
    """`inner`, unchanged."""

    def __init__(self, inner: Drafter) -> None:
        self.inner, self.info = inner, inner.info

    def draft(
        self,
        session: str,
        ids: Sequence[int],
        k: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        proceed: Proceed | None = None,
    ) -> Draft:
        """See `Drafter.draft`."""
        return self.inner.draft(session, ids, k, sampling, stop_ids, proceed)

    def sync(self, session: str, ids: Sequence[int]) -> int:
        """See `Drafter.sync`."""
        return self.inner.sync(session, ids)

    def prefill(self, session: str, ids: Sequence[int], rows: int) -> bool:
        """See `Drafter.prefill`."""
        return self.inner.prefill(session, ids, rows)

    def close_session(self, session: str) -> None:
        """See `Drafter.close_session`."""
        self.inner.close_session(session)

    @property
    def beat(self) -> dict[str, str]:
        """See `Drafter.beat`."""
        return self.inner.beat

    def close(self) -> None:
        """See `Drafter.close`."""
        self.inner.close()


class PacedDrafter(WrappedDrafter):
    """Slowed down to `token_ms` per token, as a larger draft or a smaller device would be."""

    token_ms = 0.0

    def draft(
        self,
        session: str,
        ids: Sequence[int],
        k: int,
        sampling: Sampling,
        stop_ids: Collection[int] = (),
        proceed: Proceed | None = None,
    ) -> Draft:
        """See `Drafter.draft`; what is prefilled takes no longer than it does."""
        began, drafted = time.perf_counter(), 0

        def paced(token: int, score: float) -> bool:
            nonlocal drafted
            drafted += 1
            self._until(began, drafted)
            return proceed is None or proceed(token, score)

        found = self.inner.draft(session, ids, k, sampling, stop_ids, paced)
        self._until(began, len(found.ids))
        return Draft(found.ids, found.confidences, 1000 * (time.perf_counter() - began), found.prefilled)

    def _until(self, began: float, drafted: int) -> None:
        time.sleep(max(0.0, began + drafted * self.token_ms / 1000 - time.perf_counter()))
