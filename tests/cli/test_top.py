from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from pilotfish.cli.fleet_view import Glimpse, View, screen, view
from pilotfish.cli.requests import shell
from pilotfish.cli.submit import new_prompt
from pilotfish.protocol.inspection import Peer, Queue, Served, Stream
from pilotfish.protocol.settings import Settings

Cli = Callable[..., subprocess.CompletedProcess[str]]


def queue(*, alive: bool = True, **sums: int) -> Queue:
    beat = {"state": "serving", **{name: str(value) for name, value in sums.items()}}
    worker, agent = Peer("w1", alive, beat), Peer("edge1", True, beat)
    streams = [Stream("jobs:any", "jobs", 5, 2, 40), Stream("dlq", "dead letters", 1, 0, 9000)]
    return Queue([Served("t" * 16, "demo", [worker])], [agent], streams)


def drawn(seen: View, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(screen(seen))
    return console.export_text()


def test_two_looks_make_rates() -> None:
    before = Glimpse(10.0, queue(tokens=100, rows=500, steps=100, accepted_tokens=10, corrected_tokens=0))
    now = Glimpse(
        12.0, queue(tokens=300, rows=900, steps=160, accepted_tokens=40, corrected_tokens=10, local_tokens=50)
    )
    seen = view(before, now)
    (worker,), (agent,) = seen.workers, seen.agents
    assert (worker.tokens_per_second, worker.rows_per_token, worker.steps_per_token) == (100, 2.0, 0.3)
    assert (agent.tokens_per_second, agent.acceptance, agent.local_share) == (45, 0.8, 0.5)
    assert (seen.waiting, seen.oldest_ms, seen.dead_letters, seen.tokens_per_second) == (3, 40, 1, 45)
    assert (agent.disagreement, agent.cache_hits, agent.rtt_ms) == (None, None, None)


def test_disagreement_is_of_all_tokens_and_stands_beside_its_budget() -> None:
    found = queue(accepted_tokens=50, local_tokens=50, audited_tokens=20, audit_disagreements=1, cache_hits=3,
                  cache_misses=1)  # fmt: skip
    found.agents[0].beat.update(max_disagreement="0.02", rtt_ms="20.31")
    seen = view(Glimpse(0.0, found), Glimpse(1.0, found))
    (agent,) = seen.agents
    assert (agent.disagreement, agent.max_disagreement, agent.cache_hits, agent.rtt_ms) == (0.025, 0.02, 0.75, 20.31)
    text = drawn(seen, width=140)
    assert all(words in text for words in ("2.5/2.0 %", "75 %", "20.3 ms"))


def test_a_narrow_screen_cuts_names_and_no_figure() -> None:
    found = queue(accepted_tokens=912_345, corrected_tokens=100_000, local_tokens=50, audited_tokens=20, cache_hits=3)
    found.agents[0].beat.update(max_disagreement="0.02", rtt_ms="120.31")
    text = drawn(view(Glimpse(0.0, found), Glimpse(1.0, found)), width=80)
    assert "…" not in text.replace("t…", "").replace("demo…", "")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "120.3 ms" in text


def test_a_process_that_began_anew_counts_from_nothing() -> None:
    seen = view(Glimpse(0.0, queue(tokens=1000)), Glimpse(1.0, queue(tokens=30)))
    assert seen.workers[0].tokens_per_second == 30


def test_a_peer_that_was_not_there_before_did_nothing_yet() -> None:
    seen = view(Glimpse(0.0, Queue([], [], [])), Glimpse(1.0, queue(tokens=30)))
    assert seen.workers[0].tokens_per_second == 0


def test_the_dead_are_gone_and_an_odd_beat_is_zero() -> None:
    odd = queue(alive=False, tokens=5)
    odd.agents[0].beat.update(running="\x1b[31m", rtt_ms="nan", max_disagreement="1e9")
    seen = view(Glimpse(0.0, odd), Glimpse(1.0, odd))
    (agent,) = seen.agents
    assert (seen.workers[0].state, agent.running, agent.rtt_ms, agent.max_disagreement) == ("gone", 0, None, None)


@pytest.mark.parametrize("found", [queue(tokens=1), Queue([], [], [])])
def test_a_screen_can_be_drawn_of_anything(found: Queue) -> None:
    text = drawn(view(Glimpse(0.0, found), Glimpse(1.0, found)), width=140)
    assert "worker" in text
    assert ("w1" in text) == bool(found.targets)


async def test_the_fleet_is_seen_from_redis_alone(rig: Settings, cli: Cli) -> None:
    async with shell(rig) as broker:
        await broker.submit(new_prompt(rig, "hello", raw=False))
        ended = await asyncio.to_thread(cli, "top", "--json", "--every", "0.6", env={"REDIS_URL": rig.redis_url or ""})
    told: dict[str, Any] = json.loads(ended.stdout)
    (worker,), (agent,) = told["workers"], told["agents"]
    assert (worker["name"], worker["state"], agent["name"]) == ("w1", "serving", "edge1")
    assert agent["rtt_ms"] > 0
    assert agent["max_disagreement"] == 0.02
    plain = await asyncio.to_thread(cli, "top", "--every", "0.6", env={"REDIS_URL": rig.redis_url or ""})
    assert "tokens/s" in plain.stdout
    assert "…" not in plain.stdout, "nothing is cut where there is no terminal"
    assert "edge1" in plain.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("redis")
def test_on_a_terminal_it_stays_until_it_is_stopped(redis_url: str) -> None:
    ours, theirs = pty.openpty()
    watching = subprocess.Popen(
        [sys.executable, "-m", "pilotfish.cli.main", "top", "--every", "0.1"],
        stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "REDIS_URL": redis_url, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while said.count(b"tokens/s") < 3:
        said += os.read(ours, 65536)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(20) == 130
    os.close(ours)
    assert b"Traceback" not in said
