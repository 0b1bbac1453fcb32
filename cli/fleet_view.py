"""What `top` shows: two looks at the fleet become rates and shares, and those a screen.

A beat holds sums since its process began; a sum that fell belongs to a process that began anew, and counts from 0.
`view` is pure; `screen` knows rich.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pilotfish.cli.queue import age
from pilotfish.cli.render import counted
from pilotfish.protocol.inspection import Peer, Queue, Stream

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

ORIGINS = ("accepted", "corrected", "continued", "local")


@dataclass(frozen=True, slots=True)
class Glimpse:
    """A look, and when it was taken (seconds, monotonic)."""

    at: float
    queue: Queue


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker between two looks; ratios are None where nothing was done."""

    target: str
    name: str
    state: str
    engine: str
    running: int
    credit: int
    tokens_per_second: float
    rows_per_token: float | None
    steps_per_token: float | None
    cached_share: float | None  # of the prefixes' tokens, since the worker began
    refused: int
    restarts: int


@dataclass(frozen=True, slots=True)
class AgentRow:
    """An agent between two looks; shares are over all it has done.

    `disagreement`: of all its tokens, those the target would not have drawn, as audits estimate it; None without any.
    """

    name: str
    target: str
    running: int
    tokens_per_second: float
    acceptance: float | None
    local_share: float | None
    disagreement: float | None
    max_disagreement: float | None
    cache_hits: float | None  # of the drafts that began without their KV
    rtt_ms: float | None
    generations: int
    resends: int


@dataclass(frozen=True, slots=True)
class View:
    """Everything `top` shows."""

    workers: list[WorkerRow]
    agents: list[AgentRow]
    streams: list[Stream]
    waiting: int
    oldest_ms: int | None
    dead_letters: int

    @property
    def tokens_per_second(self) -> float:
        """Of all agents."""
        return sum(row.tokens_per_second for row in self.agents)

    def as_json(self) -> dict[str, Any]:
        """Plain maps and lists."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def view(before: Glimpse, now: Glimpse) -> View:
    """The fleet as it is now, with what happened since the look before."""
    seconds = now.at - before.at
    olds = _workers(before.queue)
    workers = [_worker(key, peer, olds.get(key), seconds) for key, peer in _workers(now.queue).items()]
    agents = {peer.name: peer for peer in before.queue.agents}
    rows = [_agent(peer, agents.get(peer.name), seconds) for peer in now.queue.agents]
    jobs = [stream for stream in now.queue.streams if stream.kind != "dead letters"]
    ages = [stream.oldest_ms for stream in jobs if stream.oldest_ms is not None]
    dead = sum(stream.length for stream in now.queue.streams if stream.kind == "dead letters")
    waiting = sum(max(0, stream.length - stream.pending) for stream in jobs)
    return View(workers, rows, [s for s in now.queue.streams if s.length], waiting, max(ages, default=None), dead)


def _workers(queue: Queue) -> dict[tuple[str, str], Peer]:
    return {(target.name, peer.name): peer for target in queue.targets for peer in target.workers}


def _worker(key: tuple[str, str], peer: Peer, old: Peer | None, seconds: float) -> WorkerRow:
    tokens = _since(peer, old, "tokens")
    return WorkerRow(
        *key,
        state=peer.beat.get("state", "starting") if peer.alive else "gone",
        engine=peer.beat.get("engine", ""),
        running=_sum(peer, "running"),
        credit=_sum(peer, "credit"),
        tokens_per_second=tokens / seconds if seconds else 0.0,
        rows_per_token=_share(_since(peer, old, "rows"), tokens),
        steps_per_token=_share(_since(peer, old, "steps"), tokens),
        cached_share=_share(_sum(peer, "cached"), _sum(peer, "prefix")),
        refused=_sum(peer, "refused"),
        restarts=_sum(peer, "restarts"),
    )


def _agent(peer: Peer, old: Peer | None, seconds: float) -> AgentRow:
    written = {origin: _sum(peer, f"{origin}_tokens") for origin in ORIGINS}
    new = sum(_since(peer, old, f"{origin}_tokens") for origin in ORIGINS)
    local_share = _share(written["local"], sum(written.values()))
    wrong = _share(_sum(peer, "audit_disagreements"), _sum(peer, "audited_tokens"))
    return AgentRow(
        name=peer.name,
        target=peer.beat.get("target", ""),
        running=_sum(peer, "running"),
        tokens_per_second=new / seconds if seconds else 0.0,
        acceptance=_share(written["accepted"], written["accepted"] + written["corrected"]),
        local_share=local_share,
        disagreement=None if wrong is None or local_share is None else wrong * local_share,
        max_disagreement=_number(peer, "max_disagreement"),
        cache_hits=_share(_sum(peer, "cache_hits"), _sum(peer, "cache_hits") + _sum(peer, "cache_misses")),
        rtt_ms=_number(peer, "rtt_ms"),
        generations=_sum(peer, "generations"),
        resends=_sum(peer, "resends"),
    )


def _sum(peer: Peer, name: str) -> int:
    value = peer.beat.get(name, "0") if peer.alive else "0"
    return int(value) if value.isdecimal() else 0


def _number(peer: Peer, name: str) -> float | None:
    value = peer.beat.get(name, "") if peer.alive else ""
    return float(value) if value.replace(".", "", 1).isdecimal() else None


def _since(peer: Peer, old: Peer | None, name: str) -> int:
    was, now = _sum(old, name) if old else _sum(peer, name), _sum(peer, name)
    return now - was if now >= was else now


def _share(part: int, of: int) -> float | None:
    return part / of if of else None


# --- the screen ----------------------------------------------------------------------------------------------


def screen(seen: View) -> Group:
    """Totals, workers, agents, and the streams that hold something."""
    from rich.console import Group
    from rich.text import Text

    queued = f"{seen.waiting} waiting" + (f", oldest {age(seen.oldest_ms)}" if seen.waiting else "")
    dead = f" · {counted(seen.dead_letters, 'dead letter')}" if seen.dead_letters else ""
    head = Text(f"{seen.tokens_per_second:.0f} tokens/s · {queued}{dead}", style="bold")
    streams: list[Text | Table] = [Text(), _stream_table(seen.streams)] if seen.streams else []
    return Group(head, Text(), _worker_table(seen.workers), Text(), _agent_table(seen.agents), *streams)


def _worker_table(rows: list[WorkerRow]) -> Table:
    return _table(
        ("worker", "target", "state"),
        ["tok/s", "rows/tok", "steps/tok", "cached", "jobs", "credit", "starts"],
        ((row.name, row.target, row.state, f"{row.tokens_per_second:.0f}", _ratio(row.rows_per_token),
          _ratio(row.steps_per_token), _percent(row.cached_share), row.running, row.credit, row.restarts + 1)
         for row in rows),
        "no workers: start one with `pilotfish worker`",
    )  # fmt: skip


def _agent_table(rows: list[AgentRow]) -> Table:
    return _table(
        ("agent", "target"),
        ["tok/s", "accept", "local", "differ/max", "cached", "RTT", "jobs", "done", "resent"],
        ((row.name, row.target[:8], f"{row.tokens_per_second:.0f}", _percent(row.acceptance), _percent(row.local_share),
          _against_budget(row), _percent(row.cache_hits), _ms(row.rtt_ms), row.running, row.generations, row.resends)
         for row in rows),
        "no agents: start one with `pilotfish agent`",
    )  # fmt: skip


def _stream_table(streams: list[Stream]) -> Table:
    rows = ((one.key, one.kind, one.length, one.pending, age(one.oldest_ms)) for one in streams)
    return _table(("stream", "kind"), ["length", "taken", "oldest"], rows, "")


def _table(words: tuple[str, ...], numbers: list[str], rows: Iterable[tuple[Any, ...]], nothing: str) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    columns = [Column(name, justify="right", no_wrap=True) for name in numbers]  # names are what a narrow screen cuts
    table = Table(*words, *columns, box=None, pad_edge=False, collapse_padding=True)
    for row in rows:
        table.add_row(*(Text(str(cell), style="red" if cell in ("gone", "draining") else "") for cell in row))
    if not table.row_count:
        table.add_row(Text(nothing))
    return table


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def _against_budget(row: AgentRow) -> str:
    most = "" if row.max_disagreement is None else f"/{100 * row.max_disagreement:.1f}"
    return "-" if row.disagreement is None else f"{100 * row.disagreement:.1f}{most} %"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
