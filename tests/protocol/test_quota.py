"""A quota as Redis keeps it, and what a job counts for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs import PROMPT, job

from pilotfish.protocol import quota
from pilotfish.protocol.messages import VerifyJob
from pilotfish.protocol.quota import UNLIMITED, Quota, parse

QUOTAS = st.builds(
    Quota,
    weight=st.integers(1, 1000).map(lambda n: n / 8),
    rows_per_second=st.integers(0, 10**9).map(float),
    tokens_in_flight=st.integers(0, 10**12),
    since_ms=st.integers(0, 10**14),
)


@given(QUOTAS)
def test_what_is_written_is_read(granted: Quota) -> None:
    assert parse(granted.text()) == granted


@pytest.mark.parametrize(
    "text", ["", "nonsense", "weight=0", "weight=-1", "weight=nan", "weight=inf", "weight=1e9", "rows_per_second=many"]
)
def test_what_cannot_be_read_counts_as_not_said(text: str) -> None:
    assert parse(text) == UNLIMITED


@given(st.text(max_size=80))
def test_no_text_stops_a_worker(text: str) -> None:
    granted = parse(text)
    assert 0 < granted.weight <= quota.WEIGHT_MAX
    assert granted.rows_per_second >= 0


def test_a_job_counts_for_what_it_asks_to_compute_and_for_the_context_it_holds() -> None:
    first = job(draft=[1, 2, 3], continue_tokens=5)
    assert (quota.rows(first), quota.tokens(first)) == (len(PROMPT) + 3 + 5 + 1,) * 2
    later = VerifyJob(**{**first.model_dump(), "offset": len(PROMPT) - 2, "ids": first.ids[-2:]})
    assert (quota.rows(later), quota.tokens(later)) == (2 + 3 + 5 + 1, len(PROMPT) + 3 + 5 + 1)
