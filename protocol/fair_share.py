"""Whose turn it is when places are scarce: weighted virtual token counters, one per tenant. Pure.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (VTC): a counter grows by what its tenant was
served, divided by its weight; the next place goes to the smallest. A tenant that comes back from being idle is lifted
to the smallest of the active ones, so that silence earns no credit. Between two tenants that always wait, the served
rows never differ, by weight, by more than twice the largest job. Knows names and rows; no jobs, no clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable
from typing import Final

_MEMORY: Final = 0.125  # of the newest job in a tenant's mean
RESERVE: Final = 8  # one place in so many is kept for tenants of whom nothing is held


class FairShare:
    """The counters of one worker; `weight` is a tenant's part against others'."""

    def __init__(self, weight: Callable[[str], float]) -> None:
        self.weight = weight
        self._counters: dict[str, float] = {}
        self._mean_rows: dict[str, float] = {}  # of one job
        self._served: dict[str, int] = {}  # when it was served last, in jobs: equals take turns
        self._jobs = 0

    def keep(self, tenants: Collection[str]) -> None:
        """Forget all others."""
        for gone in self._counters.keys() - set(tenants):
            del self._counters[gone]
            self._mean_rows.pop(gone, None)
            self._served.pop(gone, None)

    def lift(self, tenant: str, active: Iterable[str]) -> None:
        """A tenant that was idle asks again, beside those that are active: what it did not use is gone."""
        floor = min((self._counters.get(name, 0.0) for name in active if name != tenant), default=0.0)
        self._counters[tenant] = max(self._counters.get(tenant, 0.0), floor)

    def charge(self, tenant: str, rows: float) -> None:
        """It was served so many rows."""
        self._counters[tenant] = self._counters.get(tenant, 0.0) + rows / self.weight(tenant)
        self._jobs += 1
        self._served[tenant] = self._jobs
        mean = self._mean_rows.get(tenant, float(rows))
        self._mean_rows[tenant] = mean + _MEMORY * (rows - mean)

    def order(self, tenants: Iterable[str]) -> list[str]:
        """Who is owed most comes first, among equals who was served longest ago."""
        return sorted(tenants, key=self._owed)

    def _owed(self, tenant: str) -> tuple[float, int, str]:
        return self._counters.get(tenant, 0.0), self._served.get(tenant, 0), tenant

    def turns(self, tenants: Iterable[str], count: int) -> list[str]:
        """Whose jobs the next `count` places are for, should all of them wait, by what their jobs usually cost."""
        heap = [self._owed(tenant) for tenant in tenants]
        heapq.heapify(heap)
        found: list[str] = []
        while heap and len(found) < count:
            counter, _, tenant = heap[0]
            found.append(tenant)
            step = max(1.0, self._mean_rows.get(tenant, 1.0)) / self.weight(tenant)
            heapq.heapreplace(heap, (counter + step, self._jobs + len(found), tenant))
        return found


def reserved(places: int, idle: int) -> int:
    """Of `places`, how many are kept for the `idle` tenants of whom nothing is held."""
    return min(idle, max(1, places // RESERVE))
