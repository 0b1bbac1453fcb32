"""`bench broker --quick` runs, and what it reports hangs together. Timings are not judged: the machine is shared."""

from __future__ import annotations

from typing import Any

import pytest

from pilotfish.bench import broker_phases as phases
from pilotfish.bench.broker_edge import TAIL_TOKENS, K, Lane
from pilotfish.bench.noop_worker import TARGET
from pilotfish.bench.registry import run
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.codec import decode
from pilotfish.protocol.messages import ToEdge, ToWorker

TARGETS = ["p50_ratio_to_echo", "p99_ms", "commands_per_round", "wan_rtts", "idle_cpu_percent"]


def test_messages_have_the_sizes_of_real_ones() -> None:
    first, later, verdict = phases.payloads()
    assert len(decode(first, ToWorker).ids) == 400
    assert len(decode(later, ToWorker).ids) == TAIL_TOKENS
    assert len(decode(verdict, ToEdge).draws) == K + 1
    assert phases.message_bytes() == {
        "first_job_bytes": len(first), "job_bytes": len(later), "verdict_bytes": len(verdict),
    }  # fmt: skip


async def test_rounds_of_ours_pass_the_real_worker(redis_url: str) -> None:
    with phases.noop_worker(redis_url):
        async with phases.edge(redis_url, lanes=4) as edge:
            seconds = await phases.block(edge.round, 4, 240)  # 60 a lane: a session ends and another begins
            async with connect(redis_url) as control:
                assert await control.exists(f"pf:{TARGET}:pair")
    assert len(seconds) == 240
    assert all(lane.worker == phases.WORKER for lane in edge.lanes)


def test_a_lane_sends_what_a_session_would() -> None:
    lane = Lane(EdgeBroker(connect("redis://localhost"), "default", "a", "b"), 1)
    job = lane.job()
    assert (job.offset, len(job.ids), len(job.draft)) == (0, job.base, K)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return run("broker", quick=True)


@pytest.mark.slow
def test_the_report_has_the_targets_that_are_followed_over_time(report: dict[str, Any]) -> None:
    assert [one["name"] for one in report["targets"]] == TARGETS
    assert all(one["value"] > 0 for one in report["targets"])
    assert {"redis_server", "job_bytes", "load_average_after"} <= report["conditions"].keys()


@pytest.mark.slow
def test_what_does_not_depend_on_the_machine_is_as_promised(report: dict[str, Any]) -> None:
    found = {one["name"]: one for one in report["targets"]}
    assert found["commands_per_round"]["met"] is True
    assert found["wan_rtts"]["value"] >= 1


@pytest.mark.slow
def test_every_phase_was_measured(report: dict[str, Any]) -> None:
    figures = report["figures"]
    for name in ("echo_1_in_flight", "ours_1_in_flight", "echo_16_in_flight", "ours_16_in_flight"):
        assert figures[name]["n"] >= 1000
        assert figures[name]["p10_ms"] <= figures[name]["p50_ms"] <= figures[name]["p99_ms"] <= figures[name]["max_ms"]
    assert figures["wan"]["ours"]["p10_ms"] >= figures["wan"]["rtt_ms"]
    assert figures["stock_arq"]["poll_default"]["p50_ms"] > 400  # both sides poll every half second
    assert 10 <= figures["stock_arq"]["poll_10_ms"]["p50_ms"] < figures["stock_arq"]["poll_default"]["p50_ms"]
