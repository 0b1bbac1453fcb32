"""From a job to its answer, with an engine that a test steps by hand."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
from rigs import PROMPT, TARGET, draws, job

from helpers import wait_until
from pilotfish.cloud_worker import functions
from pilotfish.cloud_worker.engines.base import VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.fake import FakeVerifier
from pilotfish.cloud_worker.verify import AHEAD_MS, Ticket, Verification, coalesced
from pilotfish.protocol.delivery import Delivery
from pilotfish.protocol.errors import EngineError, RequestRefused
from pilotfish.protocol.history import History
from pilotfish.protocol.messages import Message, Refusal, Sampling, ScoreJob, Scores, Verdict, VerifyJob

OTHER = "f" * 32


@dataclass
class ManualEngine:
    """The fake engine in this process; a request waits until its gate opens, and `trouble` is raised instead."""

    verifier: FakeVerifier = field(default_factory=FakeVerifier)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    trouble: Exception | None = None
    asked: list[VerifyRequest] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    cancelled: set[str] = field(default_factory=set)
    ready: list[VerifyEvent] = field(default_factory=list)  # of requests that share steps

    def __post_init__(self) -> None:
        self.info = self.verifier.info
        self.gate.set()

    async def stream(self, request: VerifyRequest) -> AsyncGenerator[VerifyEvent, None]:
        self.asked.append(request)
        try:
            if self.trouble:
                raise self.trouble
            self.verifier.submit(request)
            done = False
            while not done and request.request_id not in self.cancelled:
                await self.gate.wait()
                self.ready += self.verifier.step()
                for event in [event for event in self.ready if event.request_id == request.request_id]:
                    self.ready.remove(event)
                    yield event
                    done = event.done
                await asyncio.sleep(0)
        finally:
            self.verifier.cancel(request.request_id)
            self.closed.append(request.request_id)

    async def cancel(self, request_id: str) -> None:
        self.cancelled.add(request_id)

    async def forget(self, session: str) -> None:
        self.forgotten.append(session)


class Desk:
    """A Verification with everything it answered, by request id."""

    def __init__(self) -> None:
        self.engine = ManualEngine()
        self.verification = Verification(self.engine, "w1", lambda tenant: 3)
        self.answers: dict[str, list[tuple[Any, bool]]] = {}
        self.finished: list[str] = []

    async def handle(
        self, request_id: str, wanted: VerifyJob | ScoreJob, *, tenant: str = "default", age_ms: int = 1
    ) -> Any:
        """The last answer; it must be the only one marked so."""
        said = self.answers.setdefault(request_id, [])

        async def answer(message: Message, last: bool) -> None:
            said.append((message, last))

        await self.verification.handle(Ticket(tenant, wanted, age_ms, request_id), answer)
        self.finished.append(request_id)
        assert [last for _, last in said] == [False] * (len(said) - 1) + [True]
        return said[-1][0]

    def begin(self, request_id: str, wanted: VerifyJob | ScoreJob, **about: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.handle(request_id, wanted, **about))

    async def running(self, count: int) -> None:
        await wait_until(lambda: len(self.engine.asked) == count, f"{count} requests in the engine")


@pytest.fixture
def desk() -> Desk:
    return Desk()


def later(ids: list[int], offset: int, draft: tuple[int, ...] = (), /, **changes: Any) -> VerifyJob:
    """A job after `ids` that carries only those from `offset` on."""
    return job(ids, draft, **{"offset": offset, "ids": tuple(ids[offset:]), "round": 1, **changes})


# --- verdicts ------------------------------------------------------------------------------------------------


async def test_a_draft_is_accepted_as_far_as_it_is_what_the_target_draws(desk: Desk) -> None:
    right = draws(PROMPT, 4)
    verdict = await desk.handle("r", job(draft=(*right[:2], (right[2] + 1) % 256)))
    assert (verdict.draws, verdict.accepted, verdict.base) == (tuple(right[:3]), 2, len(PROMPT))
    assert verdict.digest == History(TARGET, Sampling(), PROMPT).digest(len(PROMPT))
    assert (verdict.worker, verdict.credit, verdict.last, verdict.queue_ms) == ("w1", 3, True, 1.0)


async def test_the_next_job_carries_only_what_is_new(desk: Desk) -> None:
    await desk.handle("a", job())
    ids = [*PROMPT, *draws(PROMPT, 1)]
    verdict = await desk.handle("b", later(ids, len(PROMPT)))
    assert verdict.draws == (draws(ids, 1)[0],)


async def test_a_continuation_comes_in_chunks_that_join_on(desk: Desk) -> None:
    await desk.handle("r", job(continue_tokens=40))
    said = [message for message, _ in desk.answers["r"]]
    assert [chunk.seq for chunk in said] == list(range(len(said)))
    ids = list(PROMPT)
    for chunk in said:
        assert chunk.digest == History(TARGET, Sampling(), ids).digest(chunk.base)
        ids += chunk.draws
    assert ids == [*PROMPT, *draws(PROMPT, 41)]


async def test_the_chunks_of_a_continuation_share_its_time_and_do_not_add_it_up(desk: Desk) -> None:
    desk.engine.verifier = FakeVerifier(step_ms=30)
    clock = asyncio.get_running_loop().time
    began = clock()
    await desk.handle("r", job(PROMPT, continue_tokens=4))
    passed_ms = (clock() - began) * 1000
    chunks = [said for said, _ in desk.answers["r"]]
    assert len(chunks) > 2
    assert 100 < sum(chunk.engine_ms for chunk in chunks) <= passed_ms


# --- refusals that never reach the engine --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"draft": (1,) * 17}, "bad_request", "a draft of 17 exceeds the engine's 16"),
        ({"draft": (256,)}, "bad_request", "outside the vocabulary of 256"),
        ({"ids": (*PROMPT[:-1], 300)}, "bad_request", "outside the vocabulary of 256"),
        ({"continue_tokens": 4090}, "too_long", "exceed the context of 4096"),
        ({"offset": 1}, "bad_request", r"ids \[1, 17\) do not end at 16"),
        ({"offset": 4, "ids": PROMPT[4:]}, "need_prefix", "does not know the session"),
        ({"digest": b"x" * 16}, "bad_request", "digest and ids differ"),
        ({"sampling": Sampling(temperature=1.0), "digest": job().digest}, "bad_request", "digest and ids differ"),
    ],
)
async def test_limits_come_before_the_engine(desk: Desk, changes: dict[str, Any], code: str, sentence: str) -> None:
    refusal = await desk.handle("r", job(**changes))
    assert isinstance(refusal, Refusal)
    assert refusal.code == code
    assert re.search(sentence, refusal.sentence)
    assert (refusal.session, refusal.boot, refusal.epoch, refusal.round) == ("0" * 32, "boot1", 0, 0)
    assert desk.engine.asked == []


@pytest.mark.parametrize(
    ("changes", "age_ms", "hops", "placed"),
    [({}, 1, 0, 1), ({"continue_tokens": 4090}, 1, 0, 0), ({"deadline_ms": 100}, 101, 0, 0), ({}, -60_000, 0, 0),
     ({"deadline_ms": 100}, 101, 1, 1)],
)  # fmt: skip
async def test_limits_come_before_a_place_is_looked_for(
    desk: Desk, changes: dict[str, Any], age_ms: int, hops: int, placed: int
) -> None:
    """One that was passed on has its place already, and gives it back when it is refused."""
    asked: list[Delivery] = []

    class Front:
        router, ingress, worker = property(lambda self: self), property(lambda self: self), "w1"

        async def place(self, delivery: Delivery, job: VerifyJob) -> None:
            asked.append(delivery)

        def age_ms(self, delivery: Delivery) -> int:
            return age_ms

        def under_way(self, tenant: str, job: VerifyJob) -> AbstractContextManager[None]:
            return nullcontext()

        async def reply(self, delivery: Delivery, message: Message, *, last: bool) -> None:
            """Heard by nobody."""

    delivery = Delivery("pf:x:jobs:default:any", "5-0", "default", "edge1", b"", 1, hops=hops)
    context = {"worker": Front(), "delivery": delivery, "verification": desk.verification}
    await functions.verify(context, job(**changes))
    assert len(asked) == placed


async def test_ages_are_redis_own(desk: Desk) -> None:
    late = await desk.handle("late", job(deadline_ms=100), age_ms=101)
    assert (late.code, late.sentence) == ("expired", "the job is 101 ms old, its deadline was 100 ms")
    invented = await desk.handle("invented", job(), age_ms=-AHEAD_MS - 1)
    assert invented.code == "bad_request"
    assert "ahead of Redis' clock" in invented.sentence
    assert isinstance(await desk.handle("just", job(), age_ms=-AHEAD_MS), Verdict)
    assert len(desk.engine.asked) == 1


async def test_ids_that_are_not_those_of_the_session_ask_for_all_of_them(desk: Desk) -> None:
    await desk.handle("a", job())
    other = [9, *PROMPT[1:], 7]
    assert (await desk.handle("b", later(other, len(PROMPT)))).code == "need_prefix"
    assert isinstance(await desk.handle("c", later(other, 0)), Verdict)


async def test_tenants_and_agents_do_not_share_sessions(desk: Desk) -> None:
    await desk.handle("a", job())
    ids = [*PROMPT, *draws(PROMPT, 1)]
    assert (await desk.handle("b", later(ids, len(PROMPT)), tenant="acme")).code == "need_prefix"
    assert (await desk.handle("c", later(ids, len(PROMPT), agent="edge2"))).code == "need_prefix"


async def test_what_follows_a_rejected_draft_is_stale_without_the_engine(desk: Desk) -> None:
    wrong = ((draws(PROMPT, 1)[0] + 1) % 256,)
    await desk.handle("a", job(draft=wrong))
    behind = later([*PROMPT, *wrong], len(PROMPT))
    assert (await desk.handle("b", behind)).code == "stale"
    assert len(desk.engine.asked) == 1
    fixed = [*PROMPT, *draws(PROMPT, 1)]
    assert isinstance(await desk.handle("c", later(fixed, len(PROMPT), epoch=1)), Verdict)


async def test_a_verdict_that_could_not_leave_changes_nothing(desk: Desk) -> None:
    """Its job is delivered again, perhaps to this worker, and must not find itself stale."""
    wrong = job(draft=((draws(PROMPT, 1)[0] + 1) % 256,))

    async def fails(message: Message, last: bool) -> None:
        raise ConnectionError("Redis is away")

    with pytest.raises(ConnectionError):
        await desk.verification.handle(Ticket("default", wrong, 1, "a"), fails)
    assert isinstance(await desk.handle("b", wrong), Verdict)


# --- order ---------------------------------------------------------------------------------------------------


async def test_jobs_of_one_session_run_in_order_and_of_two_at_once(desk: Desk) -> None:
    desk.engine.gate.clear()
    ids = [*PROMPT, *draws(PROMPT, 1)]
    tasks = [
        desk.begin("a1", job()),
        desk.begin("a2", later(ids, len(PROMPT))),
        desk.begin("b1", job(session=OTHER)),
    ]
    await desk.running(2)
    assert [request.request_id for request in desk.engine.asked] == ["a1", "b1"]
    desk.engine.gate.set()
    await asyncio.gather(*tasks)
    assert [name for name in desk.finished if name[0] == "a"] == ["a1", "a2"]
    assert all(isinstance(task.result(), Verdict) for task in tasks)


async def test_a_job_of_a_later_epoch_does_not_queue_behind_a_long_continuation(desk: Desk) -> None:
    desk.engine.gate.clear()
    long = desk.begin("a", job(continue_tokens=4000))
    await desk.running(1)
    waiting = desk.begin("b", job(continue_tokens=4000, round=1))
    again = desk.begin("c", job(epoch=1, round=2))
    await asyncio.sleep(0)
    desk.engine.gate.set()
    assert isinstance(await again, Verdict)
    assert (await long).code == "stale"
    assert len(desk.answers["a"]) == 2, "the first draws were computed, so they are told"
    assert (await waiting).code == "stale"
    assert [request.request_id for request in desk.engine.asked] == ["a", "c"]


# --- cancel and close ----------------------------------------------------------------------------------------


async def test_a_cancel_ends_the_continuation_and_what_waits_behind_it(desk: Desk) -> None:
    running = desk.begin("a", job(continue_tokens=4000))
    await wait_until(lambda: desk.answers.get("a"), "the first chunk")
    waiting = desk.begin("b", job(continue_tokens=10, round=1))
    await asyncio.sleep(0)
    await desk.verification.cancel("default", "edge1", "0" * 32, close=False)
    assert (await running).code == "cancelled"
    assert (await waiting).code == "cancelled"
    assert desk.engine.closed == ["a"]
    assert not desk.engine.verifier.busy
    assert isinstance(await desk.handle("c", job()), Verdict), "a cancel is no ban"


async def test_a_close_forgets_the_session_and_another_tenants_does_not(desk: Desk) -> None:
    await desk.handle("a", job())
    ids = [*PROMPT, *draws(PROMPT, 1)]
    await desk.verification.cancel("acme", "edge1", "0" * 32, close=True)
    assert isinstance(await desk.handle("b", later(ids, len(PROMPT))), Verdict)
    await desk.verification.cancel("default", "edge1", "0" * 32, close=True)
    assert desk.engine.forgotten == [f"default/edge1/{'0' * 32}"]
    assert (await desk.handle("c", later(ids, len(PROMPT)))).code == "need_prefix"


async def test_a_task_that_is_cancelled_stops_the_engines_work(desk: Desk) -> None:
    desk.engine.gate.clear()
    task = desk.begin("a", job(continue_tokens=4000))
    await desk.running(1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert desk.engine.closed == ["a"]


# --- an engine that fails ------------------------------------------------------------------------------------


async def test_a_failed_engine_is_an_answer_and_the_next_job_runs(desk: Desk) -> None:
    desk.engine.trouble = EngineError("the engine process died: try again")
    refusal = await desk.handle("a", job())
    assert (refusal.code, refusal.sentence) == ("engine_failed", "the engine process died: try again")
    desk.engine.trouble = None
    assert isinstance(await desk.handle("b", job()), Verdict)


async def test_one_request_the_engine_will_not_take_is_a_bad_request(desk: Desk) -> None:
    desk.engine.trouble = RequestRefused("the prompt holds an image")
    refusal = await desk.handle("a", job())
    assert (refusal.code, refusal.sentence) == ("bad_request", "the prompt holds an image")


# --- coalescing ----------------------------------------------------------------------------------------------


async def test_events_merge_until_a_pause_has_passed_and_the_first_and_last_leave_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)

    async def events() -> AsyncGenerator[VerifyEvent, None]:
        nonlocal now
        for token in range(7):
            yield VerifyEvent("r", [token], rows=1, steps=1, cached=5 if token == 0 else 0, done=token == 6)
            now += 0.01

    merged = [event async for event in coalesced(events(), 0.025)]
    assert [event.draws for event in merged] == [[0], [1, 2, 3], [4, 5, 6]]
    assert [(event.rows, event.steps, event.done) for event in merged] == [(1, 1, False), (3, 3, False), (3, 3, True)]
    assert merged[0].cached == 5


async def test_events_before_a_cancel_are_not_lost() -> None:
    async def events() -> AsyncGenerator[VerifyEvent, None]:
        for token in range(3):
            yield VerifyEvent("r", [token], done=False)

    merged = [event async for event in coalesced(events(), 1000.0)]
    assert [event.draws for event in merged] == [[0], [1, 2]]
    assert not merged[-1].done


# --- audits --------------------------------------------------------------------------------------------------


def audit(ids: tuple[int, ...], draft: list[int], /, **changes: Any) -> ScoreJob:
    wanted = job(ids, draft, **changes)
    fields = {name: getattr(wanted, name) for name in ScoreJob.model_fields if name != "type"}
    return ScoreJob(**fields)


async def test_an_audit_gets_every_draw_along_its_text(desk: Desk) -> None:
    right = draws(PROMPT, 4)
    text = [right[0], (right[1] + 1) % 256, 9]
    scores = await desk.handle("a", audit(PROMPT, text))
    assert isinstance(scores, Scores)
    assert list(scores.draws) == [draws([*PROMPT, *text[:at]], 1)[0] for at in range(4)]
    assert (scores.base, scores.worker, scores.credit) == (len(PROMPT), "w1", 3)
    assert desk.verification.counts["scored"] == 1
    assert desk.verification.counts["verified"] == desk.verification.counts["tokens"] == 0


async def test_an_audit_goes_on_where_the_last_one_ended(desk: Desk) -> None:
    text = [5, 6, 7, 8]
    await desk.handle("a", audit(PROMPT, text[:2]))
    whole = (*PROMPT, *text[:3])
    next_one = audit(whole, text[3:], offset=len(PROMPT) + 2, ids=whole[len(PROMPT) + 2 :])
    assert list((await desk.handle("b", next_one)).draws) == [draws(whole, 1)[0], draws([*whole, 8], 1)[0]]


async def test_an_audit_is_never_stale_and_rejects_nothing(desk: Desk) -> None:
    """It is about committed text: a rejected epoch does not matter to it, and its wrong tokens reject none."""
    await desk.handle("wrong", job(PROMPT, [(draws(PROMPT, 1)[0] + 1) % 256], epoch=4))
    assert isinstance(await desk.handle("a", audit(PROMPT, [1, 2], epoch=4)), Scores)
    assert isinstance(await desk.handle("b", job(PROMPT, [], epoch=5)), Verdict)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"offset": 3, "ids": PROMPT[3:]}, "need_prefix"), ({"digest": b"x" * 16}, "bad_request")],
)
async def test_an_audit_is_checked_like_any_job(desk: Desk, changes: dict[str, Any], code: str) -> None:
    refused = await desk.handle("a", audit(PROMPT, [1], **changes))
    assert (refused.code, refused.round) == (code, 0)


async def test_sessions_of_a_revoked_tenant_are_dropped_here_and_in_the_engine(desk: Desk) -> None:
    await desk.handle("a", job(), tenant="gone")
    await desk.handle("b", job(), tenant="default")
    await desk.verification.keep(["default"])
    assert [tenant for tenant, _, _ in desk.verification.known] == ["default"]
    assert desk.engine.forgotten == [f"gone/edge1/{'0' * 32}"]
