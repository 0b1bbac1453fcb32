"""`bench soak --minutes N`: hours in small. A worker and an agent at steady load must not grow.

Real Redis and real processes, the fake engine; own generations and submitted prompts take turns. Resident memory, file
descriptors and metric series of every process are sampled; the first quarter is warming up. Afterwards no key may be
left without a time to live or an owner.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import redis as sync_redis

from pilotfish.bench.chaos_plan import wish
from pilotfish.bench.chaos_process import Process
from pilotfish.bench.children import own_redis
from pilotfish.bench.conditions import conditions, load_average
from pilotfish.bench.leaks import ownerless
from pilotfish.bench.report import Report, Target, target
from pilotfish.protocol import keys
from pilotfish.protocol.broker import connect
from pilotfish.protocol.errors import EngineError, PilotfishError
from pilotfish.protocol.messages import Prompt
from pilotfish.protocol.shell import ShellBroker

MINUTES: Final = 30.0
QUICK_MINUTES: Final = 0.5
AT_ONCE: Final = 4
SUBMITTED: Final = 2  # lanes of prompts that go through Redis
PACE_SECONDS: Final = 0.05  # between two generations of a lane: steady, not as fast as it goes
HUNG_SECONDS: Final = 180.0  # longer than any deadline
SAMPLES: Final = 60
TOLD_AT_LEAST: Final = 54  # a process hears two signals that come at once as one
GOOD_ENDS: Final = frozenset({"length", "submitted, finished"})
STEP_MS: Final = 2.0


@dataclass(slots=True)
class Series:
    """Samples of one process."""

    rss_kb: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    metrics: list[int] = field(default_factory=list)


def run(*, quick: bool = False, minutes: float | None = None) -> Report:
    """The whole soak, `minutes` long."""
    minutes = minutes or (QUICK_MINUTES if quick else MINUTES)
    return asyncio.run(_Soak(minutes * 60).run())


class _Soak:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.series: dict[str, Series] = {}
        self.done: Counter[str] = Counter()
        self.waiting: dict[int, asyncio.Future[str]] = {}
        self.over = False

    async def run(self) -> Report:
        stated = conditions(minutes=round(self.seconds / 60, 2), at_once=AT_ONCE + SUBMITTED, engine="fake")
        with own_redis() as server:
            arguments = ["chaos_child", "worker", server.url, "w0", f"step_ms={STEP_MS}"]
            self.worker = Process("worker", arguments, said=lambda line: self._heard("worker", line))
            self.agent = Process(
                "agent", ["chaos_child", "agent", server.url, "a0"], said=lambda line: self._heard("agent", line)
            )
            try:
                await self.worker.start()
                await self.agent.start()
                await self._load(server.url, server.pid)
                left = await asyncio.to_thread(_ownerless, server.url)
                codes = {one.name: await one.end() for one in (self.agent, self.worker)}
            finally:
                await self.agent.kill()
                await self.worker.kill()
        crashes = {one.name: one.crashes for one in (self.agent, self.worker)}
        broken = [*ends(self.done), *gaps(self.series), *(f"{name} {why}" for name in crashes for why in crashes[name])]
        broken += [f"{name} ended with {code} at SIGTERM" for name, code in codes.items() if code]
        return self._report(stated | {"load_average_after": load_average()}, left, broken)

    # --- load ------------------------------------------------------------------------------------------------

    async def _load(self, url: str, redis_pid: int) -> None:
        lanes = [self._own(lane) for lane in range(AT_ONCE)] + [self._submitted(url) for _ in range(SUBMITTED)]
        pids = {
            "worker": self.worker.pid,
            "engine": self.worker.children()[0],
            "agent": self.agent.pid,
            "redis": redis_pid,
        }
        try:
            async with asyncio.TaskGroup() as group:  # one lane that hangs ends the soak
                for lane in lanes:
                    group.create_task(lane)
                for _ in range(SAMPLES):
                    await asyncio.sleep(self.seconds / SAMPLES)
                    self._sample(pids)
                self.over = True
        except BaseExceptionGroup as group:
            first = group.exceptions[0]
            if isinstance(first, TimeoutError):
                raise EngineError(f"a generation of the soak did not end within {HUNG_SECONDS:g} s") from None
            raise first from None

    async def _own(self, lane: int) -> None:
        number = lane
        while not self.over:
            one = wish(lane, number)
            ended = self.waiting[number] = asyncio.get_running_loop().create_future()
            asked = {"number": number, "prompt": one.prompt, "mode": one.mode, "max_tokens": one.max_tokens}
            self.agent.write(json.dumps({**asked, "window": one.window, "sampling": one.sampling.model_dump()}))
            async with asyncio.timeout(HUNG_SECONDS):
                self.done[await ended] += 1
            number += AT_ONCE
            await asyncio.sleep(PACE_SECONDS)

    async def _submitted(self, url: str) -> None:
        async with connect(url) as client:
            shell = ShellBroker(client, keys.DEFAULT_TENANT)
            while not self.over:
                prompt = Prompt(request=secrets.token_hex(16), text=secrets.token_hex(20), raw=True, max_tokens=50)
                try:
                    await shell.submit(prompt)
                    async with asyncio.timeout(HUNG_SECONDS):
                        async for message in shell.output(prompt.request, follow=True):
                            if message.type in ("finished", "failed"):
                                self.done[f"submitted, {message.type}"] += 1
                except PilotfishError as error:  # such as an agent whose beat is late: told in the end
                    self.done[f"submitted, {error.code}"] += 1
                await client.delete(keys.output(keys.DEFAULT_TENANT, prompt.request))  # else an hour's worth stays
                await asyncio.sleep(PACE_SECONDS)

    def _heard(self, name: str, line: str | None) -> None:
        if line is None:
            why = f"the soak's {name} ended by itself: CHAOS_LOG=1 shows what it says"
            for ended in self.waiting.values():
                if not ended.done():
                    ended.set_exception(EngineError(why))
            return
        said: dict[str, Any] = json.loads(line)
        if "series" in said:
            self.series[name].metrics.append(said["series"])
        elif "end" in said and not (ended := self.waiting.pop(said["number"])).done():
            ended.set_result(said["end"])

    # --- samples ---------------------------------------------------------------------------------------------

    def _sample(self, pids: dict[str, int]) -> None:
        for name, pid in pids.items():
            series = self.series.setdefault(name, Series())
            with suppress(OSError):
                series.rss_kb.append(resident_kb(pid))
                series.descriptors.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))
        for process in (self.worker, self.agent):
            process.send(signal.SIGUSR1)  # tells how many metric series it has

    def _report(self, stated: dict[str, Any], left: list[str], broken: list[str]) -> Report:
        enough = self.seconds >= MINUTES * 60
        growth = {name: grown(series.rss_kb) for name, series in self.series.items()}
        figures = {
            "generations": dict(self.done),
            "rss_mb": {name: round(median(series.rss_kb) / 1024, 1) for name, series in self.series.items()},
            "rss_growth": {name: round(value, 4) for name, value in growth.items()},
            "descriptors": {name: late(series.descriptors) for name, series in self.series.items()},
            "metric_series": {name: late(series.metrics) for name, series in self.series.items() if series.metrics},
            "keys_without_owner": left,
            "broken": broken,
        }
        return Report("soak", stated, figures, targets(self.series, growth, left, broken, enough=enough))


def ends(done: Mapping[str, int]) -> list[str]:
    """Generations that came to another end than a calm day's."""
    return [f"{count} generations ended with {end}" for end, count in done.items() if end not in GOOD_ENDS]


def gaps(series: Mapping[str, Series]) -> list[str]:
    """Who was not sampled to the end: a process that is gone, or deaf, does not grow."""
    found = [f"{name}: {len(one.rss_kb)} samples" for name, one in series.items() if len(one.rss_kb) < SAMPLES]
    told = {name: len(series[name].metrics) if name in series else 0 for name in ("worker", "agent")}
    return found + [f"{name} told its series {count} times" for name, count in told.items() if count < TOLD_AT_LEAST]


def targets(
    series: dict[str, Series], growth: dict[str, float], left: Sequence[str], broken: Sequence[str], *, enough: bool
) -> list[Target]:
    """What must not grow, nor break."""
    descriptors = max(abs(risen(one.descriptors)) for one in series.values())
    metrics = max((risen(one.metrics) for one in series.values() if one.metrics), default=0)
    return [
        target("rss_growth", max(growth.values()), "of itself", "<= 0.05", enough=enough),
        target("broken", len(broken), "", "== 0"),
        target("keys_without_owner", len(left), "keys", "== 0"),
        target("descriptors_growth", descriptors, "descriptors", "<= 1", enough=enough),
        target("metric_series_growth", metrics, "series", "<= 0", enough=enough),
    ]


def grown(samples: Sequence[int]) -> float:
    """By which share the last quarter's median exceeds that of the second; the first is warming up."""
    quarter = max(1, len(samples) // 4)
    return median(samples[-quarter:]) / median(samples[quarter : 2 * quarter]) - 1


def risen(samples: Sequence[int]) -> float:
    """The same in units."""
    quarter = max(1, len(samples) // 4)
    return median(samples[-quarter:]) - median(samples[quarter : 2 * quarter])


def late(samples: Sequence[int]) -> list[int]:
    """Least and most after warming up."""
    rest = samples[len(samples) // 4 :]
    return [min(rest), max(rest)]


def resident_kb(pid: int) -> int:
    """VmRSS. Raises OSError when the process is gone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def _ownerless(url: str) -> list[str]:
    with sync_redis.Redis.from_url(url) as client:
        return ownerless(client)
