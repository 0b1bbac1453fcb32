"""One generation against a cloud that a test makes up: it answers, is silent, late, wrong, away, or comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from rigs import PROMPT, TARGET, draws

from helpers import wait_until
from pilotfish.cloud_worker.engines.fake import fake_target
from pilotfish.edge_agent.drafters.base import Draft, Proceed
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.generation import Generation
from pilotfish.edge_agent.task import Task
from pilotfish.protocol.errors import BrokerUnreachable, DeadlineExceeded, JobRefused, NoWorker, PromptTooLong
from pilotfish.protocol.fleet import Target, Vocabulary
from pilotfish.protocol.messages import Close, Message, Refusal, RefusalCode, Sampling, Verdict, VerifyJob

FLEET = Target(TARGET, "fake", 4096, 16, Vocabulary(tuple(bytes([value]) for value in range(256))))
FOUR = {"drafting": "fixed", "draft_tokens": 4, "window": 1}  # tokens each round, whatever the clock says
Answer = Callable[[VerifyJob], "list[Verdict | Refusal]"]


def verdict(job: VerifyJob, ids: Sequence[int]) -> Verdict:
    """What an honest worker says that knows all `ids` before base."""
    out: list[int] = []
    for drafted in (*job.draft, None):
        out.append(fake_target([*ids, *out], job.base + len(out), job.sampling))
        if out[-1] != drafted:
            break
    fields: dict[str, Any] = {
        name: getattr(job, name) for name in ("boot", "session", "epoch", "round", "base", "digest")
    }
    return Verdict(**fields, draws=tuple(out), accepted=len(out) - 1, worker="w1", credit=1)


def refusal(job: VerifyJob, code: RefusalCode, sentence: str = "") -> Refusal:
    about: dict[str, Any] = {name: getattr(job, name) for name in ("boot", "session", "epoch", "round")}
    return Refusal(code=code, sentence=sentence, worker="w1", **about)


@dataclass
class Cloud:
    """A broker double. `script` holds what happens to the next jobs: an answer, or an error; then all are served."""

    script: list[Answer | Exception] = field(default_factory=list)
    always: Answer | Exception | None = None
    workers: int = 1
    agent: str = "edge1"
    boot: str = "boot1"
    jobs: list[VerifyJob] = field(default_factory=list)
    notes: list[Message] = field(default_factory=list)
    addressed: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    ids: dict[str, list[int]] = field(default_factory=dict)
    generation: Generation | None = None
    silent: bool = False
    patience: float = 0.12

    @property
    def pulse(self) -> Cloud:
        return self

    async def answers(self) -> bool:
        return not self.silent

    async def publish(self, target: str, worker: str, message: Message) -> bytes:
        if not isinstance(message, VerifyJob):
            self.notes.append(message)
            return b"1-0"
        self.jobs.append(message)
        self.addressed.append(worker)
        self.times.append(time.monotonic())
        act = self.script.pop(0) if self.script else self.always or self.serve
        if isinstance(act, Exception):
            raise act
        assert self.generation
        for reply in act(message):
            self.generation.inbox.put_nowait(reply)
        return b"1-0"

    def serve(self, job: VerifyJob) -> list[Verdict | Refusal]:
        """An honest worker."""
        known = self.ids.get(job.session, [])
        if job.offset > len(known):
            return [refusal(job, "need_prefix")]
        self.ids[job.session] = [*known[: job.offset], *job.ids]
        return [verdict(job, self.ids[job.session])]

    async def live_workers(self, target: str) -> int:
        return self.workers


def silent(job: VerifyJob) -> list[Verdict | Refusal]:
    return []


def start(cloud: Cloud, alpha: float = 0.7, *, draft: Any = None, **task: Any) -> Generation:
    drafter = FakeDrafter(fake_target, alpha=alpha)

    async def drafted(
        session: str, ids: Sequence[int], count: int, sampling: Sampling, stops: frozenset[int], proceed: Proceed
    ) -> Draft:
        assert count > 0, "a drafter was asked for nothing"
        await asyncio.sleep(0)
        return drafter.draft(session, ids, count, sampling, stops, proceed)

    fields = {"round_timeout_ms": 100, "deadline_ms": 20_000, "max_tokens": 24, **FOUR, **task}
    cloud.generation = Generation(Task(PROMPT, **fields), draft or drafted, cloud, FLEET, 256)  # type: ignore[arg-type]
    return cloud.generation


async def text(generation: Generation) -> list[int]:
    return [token.id async for tokens in generation.run() for token in tokens]


# --- in fair weather -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("drafting", ["auto", "always", "fixed"])
async def test_the_text_is_the_targets_whatever_is_drafted(window: int, alpha: float, drafting: str) -> None:
    generation = start(Cloud(), alpha, window=window, max_tokens=50, drafting=drafting, draft_tokens=None)
    assert await text(generation) == draws(PROMPT, 50)
    summary = generation.summary()
    assert summary.tokens == summary.accepted + summary.corrected + summary.continued == 50
    assert summary.resends == 0


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 6])
async def test_no_draft_is_longer_than_what_may_still_be_written(max_tokens: int) -> None:
    cloud = Cloud()
    assert await text(start(cloud, 1.0, max_tokens=max_tokens)) == draws(PROMPT, max_tokens)
    assert all(job.base - len(PROMPT) + len(job.draft) < max_tokens for job in cloud.jobs)


async def test_a_stop_id_ends_the_text_inside_a_draft_and_as_a_bonus() -> None:
    want = draws(PROMPT, 30)
    stop = want[7]
    first = want.index(stop)
    for draft_tokens in (1, 4, 16):
        generation = start(Cloud(), 1.0, draft_tokens=draft_tokens, max_tokens=30, stop_ids=frozenset({stop}))
        assert await text(generation) == want[: first + 1]
        assert generation.finish == "stop"


async def test_drafting_goes_on_while_a_verdict_is_away() -> None:
    cloud = Cloud(script=[silent, silent, silent])
    generation = start(cloud, 1.0, window=3)
    running = asyncio.create_task(text(generation))
    await wait_until(lambda: len(cloud.jobs) == 3, "three rounds in flight")
    assert [job.base for job in cloud.jobs] == [16, 20, 24], "each starts behind the drafts before it"
    assert await running == draws(PROMPT, 24)


async def test_a_draft_that_a_verdict_overtook_is_used_as_far_as_it_holds() -> None:
    """With acceptance 1 every draft made while a verdict was away is right, but for the bonus token it now overlaps."""
    cloud = Cloud()

    async def late(
        session: str, ids: Sequence[int], count: int, sampling: Sampling, stops: frozenset[int], proceed: Proceed
    ) -> Draft:
        if len(cloud.jobs) == 1 and generation.inbox.empty():
            cloud.ids["0"] = []
            generation.inbox.put_nowait(cloud.serve(cloud.jobs[0])[0])
        return Draft(draws(ids, count), [1.0] * count)

    cloud.script = [silent]
    generation = start(cloud, draft=late, window=2, max_tokens=12)
    assert await text(generation) == draws(PROMPT, 12)
    assert (cloud.jobs[1].base, cloud.jobs[1].draft) == (21, tuple(draws(PROMPT, 9)[5:])), "and is added to"


async def test_an_empty_draft_still_asks_for_a_token() -> None:
    async def full(*_: Any) -> Draft:
        return Draft()

    assert await text(start(Cloud(), draft=full, max_tokens=5)) == draws(PROMPT, 5)


async def test_a_drafter_that_has_no_more_to_give_is_not_asked_in_a_hot_loop() -> None:
    cloud, asked = Cloud(script=[silent]), 0

    async def once(session: str, ids: Sequence[int], count: int, *_: Any) -> Draft:
        nonlocal asked
        asked += 1
        return Draft(draws(ids, 1), [1.0]) if asked == 1 else Draft()

    generation = start(cloud, draft=once, window=4, draft_tokens=1, max_tokens=8)
    assert await text(generation) == draws(PROMPT, 8)
    assert asked < 12


async def test_the_worker_that_answered_is_asked_again_and_told_of_the_end() -> None:
    cloud = Cloud()
    generation = start(cloud)
    await text(generation)
    assert cloud.addressed[0] == ""
    assert set(cloud.addressed[1:]) == {"w1"}
    assert [type(note) for note in cloud.notes] == [Close]


async def test_a_cloud_that_is_faster_alone_writes_a_stretch_and_the_summary_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The drafter is slow and always wrong; a verdict says that a pass takes no time."""
    cloud = Cloud()

    def at_once(job: VerifyJob) -> list[Verdict | Refusal]:
        (reply,) = cloud.serve(job)
        assert isinstance(reply, Verdict)
        more = draws(list(cloud.ids[job.session]) + list(reply.draws), job.continue_tokens)
        return [reply.model_copy(update={"draws": (*reply.draws, *more), "engine_ms": 0.01})]

    async def wrong(session: str, ids: Sequence[int], count: int, *_: Any) -> Draft:
        await asyncio.sleep(0.01)
        return Draft([(draws(ids, 1)[0] + 1) % 256], [0.9], 10.0, 1)

    cloud.always = at_once
    generation = start(cloud, draft=wrong, max_tokens=60, drafting="auto", draft_tokens=None, window=8)
    with caplog.at_level("INFO", "pilotfish.agent"):
        assert await text(generation) == draws(PROMPT, 60)
    summary = generation.summary()
    assert 16 <= summary.ceded <= summary.continued < 60
    assert "the cloud alone" in caplog.text
    assert "it writes the next 16" in caplog.text
    first = next(at for at, job in enumerate(cloud.jobs) if job.continue_tokens)
    assert any(job.draft for job in cloud.jobs[first:]), "drafting was never tried again"


# --- in foul weather -----------------------------------------------------------------------------------------


async def test_lost_verdicts_are_asked_for_again_with_every_id_and_anyone_may_answer() -> None:
    cloud = Cloud()
    cloud.script = [cloud.serve, silent, silent, cloud.serve, silent]
    generation = start(cloud)
    assert await text(generation) == draws(PROMPT, 24)
    assert [job.epoch for job in cloud.jobs[1:4]] == [cloud.jobs[1].epoch + n for n in range(3)]
    assert [job.offset for job in cloud.jobs[2:4]] == [0, 0]
    assert cloud.addressed[2:4] == ["", ""]
    assert generation.summary().resends == 3


async def test_verdicts_that_come_late_or_twice_change_nothing() -> None:
    cloud = Cloud()
    kept: list[Verdict | Refusal] = []

    def twice_and_late(job: VerifyJob) -> list[Verdict | Refusal]:
        late, now = kept[:], cloud.serve(job)
        kept[:] = now
        return [*late, *now, *now]

    cloud.always = twice_and_late
    assert await text(start(cloud, window=3)) == draws(PROMPT, 24)


@pytest.mark.parametrize("code", ["stale", "overloaded", "engine_failed", "dead_letter", "expired", "cancelled"])
async def test_a_passing_refusal_is_tried_again_after_a_pause(code: RefusalCode) -> None:
    cloud = Cloud(script=[lambda job: [refusal(job, code)]])
    assert await text(start(cloud, round_timeout_ms=60_000)) == draws(PROMPT, 24)
    assert cloud.times[1] - cloud.times[0] > 0.08


async def test_a_worker_that_always_fails_is_not_asked_in_a_hot_loop() -> None:
    cloud = Cloud(always=lambda job: [refusal(job, "engine_failed", "out of memory")])
    with pytest.raises(DeadlineExceeded, match="worker w1 refused: out of memory"):
        await text(start(cloud, round_timeout_ms=60_000, deadline_ms=1500))
    assert 3 <= len(cloud.jobs) <= 6


@pytest.mark.parametrize("window", [1, 3])
async def test_a_worker_that_does_not_know_the_session_gets_every_id_at_once(window: int) -> None:
    cloud = Cloud()

    def forgetful(job: VerifyJob) -> list[Verdict | Refusal]:
        return [refusal(job, "need_prefix")] if job.offset else cloud.serve(job)

    cloud.always = forgetful
    began = time.monotonic()
    generation = start(cloud, 0.9, window=window, round_timeout_ms=5_000)
    assert await text(generation) == draws(PROMPT, 24)
    assert time.monotonic() - began < 4, "it waited for a round's timer"
    assert generation.session.epoch <= generation.summary().corrected + 10


async def test_a_worker_that_wants_every_id_for_ever_is_not_obeyed_for_ever() -> None:
    cloud = Cloud(always=lambda job: [refusal(job, "need_prefix")])
    with pytest.raises(DeadlineExceeded):
        await text(start(cloud, deadline_ms=800))
    assert len(cloud.jobs) < 20


@pytest.mark.parametrize("code", ["bad_request", "too_long", "invalid_message"])
async def test_a_final_refusal_ends_the_request_or_makes_it_local(code: RefusalCode) -> None:
    cloud = Cloud(always=lambda job: [refusal(job, code, "the draft is too long")])
    with pytest.raises(JobRefused, match="worker w1 refused: the draft is too long") as caught:
        await text(start(cloud))
    assert caught.value.wire_code == code
    alone = start(cloud, on_cloud_loss="local")
    assert len(await text(alone)) == 24
    assert alone.summary().degraded


# --- without a cloud -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [NoWorker("no worker serves target x"), BrokerUnreachable("no Redis answers")])
async def test_waiting_ends_at_the_deadline_with_the_cause(trouble: Exception) -> None:
    cloud = Cloud(always=trouble)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=f"no verdict within 700 ms \\({trouble}\\).*--on-cloud-loss local"):
        await text(start(cloud, deadline_ms=700))
    assert 0.6 < time.monotonic() - began < 4
    assert len(cloud.jobs) <= 7, "it asked in a hot loop"


async def test_silence_too_is_named() -> None:
    with pytest.raises(DeadlineExceeded, match="no answer from a worker"):
        await text(start(Cloud(always=silent), deadline_ms=500))


@pytest.mark.slow
async def test_a_cloud_that_comes_back_before_the_deadline_gives_the_same_text() -> None:
    cloud = Cloud()
    away = NoWorker("no worker")
    cloud.script = [cloud.serve, *[away] * 5]
    generation = start(cloud)
    assert await text(generation) == draws(PROMPT, 24)
    assert not generation.summary().degraded


@pytest.mark.parametrize("act", [NoWorker("none"), silent])
async def test_on_cloud_loss_local_the_device_writes_on_and_says_so(act: Any) -> None:
    cloud = Cloud(always=act, workers=0)
    generation = start(cloud, on_cloud_loss="local", alpha=0.5)
    origins = [token.origin async for tokens in generation.run() for token in tokens]
    assert origins == ["local"] * 24
    assert generation.summary().degraded
    assert len(cloud.jobs) == 3, "one try and two more"


async def test_who_may_go_on_alone_keeps_time_for_it_however_short_the_deadline() -> None:
    generation = start(Cloud(always=silent), on_cloud_loss="local", round_timeout_ms=60_000, deadline_ms=600)
    origins = [token.origin async for tokens in generation.run() for token in tokens]
    assert origins == ["local"] * 24


@pytest.mark.slow
async def test_when_a_worker_appears_what_follows_is_verified_again() -> None:
    cloud = Cloud(script=[NoWorker("none")] * 3)
    slow = FakeDrafter(fake_target, alpha=0.5, token_ms=5)

    async def drafted(
        session: str, ids: Sequence[int], count: int, sampling: Sampling, stops: frozenset[int], proceed: Proceed
    ) -> Draft:
        return await asyncio.to_thread(slow.draft, session, list(ids), count, sampling, stops, proceed)

    generation = start(cloud, draft=drafted, on_cloud_loss="local", max_tokens=600)
    out = [token async for tokens in generation.run() for token in tokens]
    verified = next(i for i, token in enumerate(out) if token.origin != "local")
    assert verified > 0
    written = [token.id for token in out]
    assert all(token.origin != "local" for token in out[verified:])
    assert written[verified:] == draws([*PROMPT, *written[:verified]], 600 - verified), "verified on another prefix"
    assert generation.summary().degraded
    assert not generation.degraded


async def test_a_full_draft_context_alone_is_an_error_and_no_endless_loop() -> None:
    async def full(*_: Any) -> Draft:
        return Draft()

    with pytest.raises(PromptTooLong, match="context is full after 16 tokens"):
        await text(start(Cloud(), draft=full, mode="edge_only"))


# --- the end -------------------------------------------------------------------------------------------------


async def test_a_cancel_is_noticed_while_waiting_and_the_worker_told() -> None:
    cloud = Cloud(always=silent)
    generation = start(cloud, round_timeout_ms=60_000)
    running = asyncio.create_task(text(generation))
    await wait_until(lambda: cloud.jobs, "a round in flight")
    generation.cancel()
    assert await asyncio.wait_for(running, 5) == []
    assert generation.finish == "cancelled"
    assert [type(note) for note in cloud.notes] == [Close], "nobody has answered yet, and somebody is still at work"


async def test_a_consumer_that_leaves_ends_the_session_in_the_cloud() -> None:
    cloud = Cloud()
    run = start(cloud).run()
    await anext(run)
    await run.aclose()
    assert [type(note) for note in cloud.notes] == [Close]


async def test_a_summary_may_be_read_before_anything_happened() -> None:
    assert start(Cloud()).summary().tokens == 0


# --- a Redis that is silent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_cloud_loss", ["local", "wait"])
async def test_who_may_go_on_alone_does_so_when_redis_is_silent(on_cloud_loss: Any) -> None:
    cloud = Cloud(always=silent, silent=True)
    generation = start(cloud, on_cloud_loss=on_cloud_loss, round_timeout_ms=60_000, deadline_ms=1_000, max_tokens=8)
    writing = asyncio.create_task(text(generation))
    await wait_until(lambda: cloud.jobs, "a job")
    generation.redis_is_silent()
    if on_cloud_loss == "local":
        assert len(await writing) == 8
        assert generation.summary().local == 8
    else:
        with pytest.raises(DeadlineExceeded):
            await writing
    assert generation.summary().degraded == (on_cloud_loss == "local")
