"""The engine in its child process: shared steps, cancelled requests, and children that die, hang or do not start."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from rigs import PROMPT, children, draws, engine_child

from helpers import wait_until
from pilotfish.cloud_worker.engine_process import EngineProcess
from pilotfish.cloud_worker.engines.base import VerifyEvent, VerifyRequest
from pilotfish.cloud_worker.engines.spec import EngineSpec, fake_switches
from pilotfish.protocol.errors import EngineError, ModelError, RequestRefused
from pilotfish.protocol.tasks import end_tasks


def ask(name: str = "r", **changes: Any) -> VerifyRequest:
    return VerifyRequest(**{"request_id": name, "session": name, "prefix": list(PROMPT), **changes})


async def events(engine: EngineProcess, request: VerifyRequest) -> list[VerifyEvent]:
    return [event async for event in engine.stream(request)]


async def written(engine: EngineProcess, request: VerifyRequest) -> list[int]:
    return [draw for event in await events(engine, request) for draw in event.draws]


def _gone(pid: int) -> bool:
    return pid not in children(os.getpid())


async def opened(model: str = "", **spec: Any) -> EngineProcess:
    engine = EngineProcess(EngineSpec("fake", model, **spec))
    await engine.start()
    return engine


@pytest.fixture
async def engine() -> AsyncIterator[EngineProcess]:
    running = await opened("step_ms=5")
    yield running
    await running.stop()


async def test_it_answers_and_says_who_it_is(engine: EngineProcess) -> None:
    assert engine.info.vocab_size == len(engine.vocabulary) == 256
    assert await written(engine, ask(continue_tokens=9)) == draws(PROMPT, 10)


async def test_concurrent_requests_share_its_steps(engine: EngineProcess) -> None:
    got = await asyncio.gather(*(events(engine, ask(f"r{n}", continue_tokens=20)) for n in range(8)))
    assert all([draw for event in one for draw in event.draws] == draws(PROMPT, 21) for one in got)


async def test_one_refused_request_leaves_the_others_alone(engine: EngineProcess) -> None:
    good = asyncio.create_task(written(engine, ask("good", continue_tokens=20)))
    with pytest.raises(RequestRefused, match="not in the target's vocabulary"):
        await events(engine, ask("bad", prefix=[999]))
    assert await good == draws(PROMPT, 21)
    assert engine.restarts == 0


async def test_a_cancelled_stream_ends_without_done(engine: EngineProcess) -> None:
    task = asyncio.create_task(events(engine, ask(continue_tokens=4000)))
    other = asyncio.create_task(written(engine, ask("other", continue_tokens=5)))
    assert await other
    await engine.cancel("r")
    assert not any(event.done for event in await task)


async def test_a_stream_that_is_closed_stops_the_engines_work(engine: EngineProcess) -> None:
    stream = engine.stream(ask(continue_tokens=4000))
    await anext(stream)
    await stream.aclose()
    behind = written(engine, ask("behind", session="r", continue_tokens=3))
    assert await asyncio.wait_for(behind, 10) == draws(PROMPT, 4), "it waits for 4000 tokens that nobody reads"


async def test_a_killed_child_fails_its_requests_and_the_next_one_finds_a_new_child(engine: EngineProcess) -> None:
    task = asyncio.create_task(events(engine, ask(continue_tokens=4000)))
    stream = engine.stream(ask("other", continue_tokens=4000))
    await anext(stream)
    os.kill(engine_child(), signal.SIGKILL)
    with pytest.raises(EngineError, match="try again"):
        await task
    with pytest.raises(EngineError, match="try again"):
        async for _ in stream:
            pass
    many = await asyncio.gather(*(written(engine, ask(f"r{n}")) for n in range(5)))
    assert many == [draws(PROMPT, 1)] * 5
    assert engine.restarts == 1, "several jobs restarted it several times"


async def test_a_job_that_gives_up_does_not_abort_the_restart_others_wait_for(engine: EngineProcess) -> None:
    os.kill(engine_child(), signal.SIGKILL)
    await wait_until(lambda: not engine.alive, "the death to be noticed")
    impatient = asyncio.create_task(written(engine, ask("impatient")))
    patient = asyncio.create_task(written(engine, ask("patient")))
    await wait_until(lambda: engine.restarts == 1, "the restart")
    impatient.cancel()
    assert await patient == draws(PROMPT, 1)


async def test_a_cancel_reaches_a_job_that_waits_for_the_restart(engine: EngineProcess) -> None:
    os.kill(engine_child(), signal.SIGKILL)
    await wait_until(lambda: not engine.alive, "the death to be noticed")
    waiting = asyncio.create_task(events(engine, ask("gone", continue_tokens=2_000)))
    await wait_until(lambda: engine.restarts == 1, "the restart")
    await engine.cancel("gone")
    assert await waiting == []
    assert await written(engine, ask()) == draws(PROMPT, 1)


async def test_a_child_that_hangs_is_killed_and_replaced() -> None:
    engine = await opened(silence_seconds=0.3)
    try:
        os.kill(engine_child(), signal.SIGSTOP)
        with pytest.raises(EngineError, match="try again"):
            await events(engine, ask())
        assert await written(engine, ask()) == draws(PROMPT, 1)
    finally:
        await engine.stop()


async def test_an_idle_child_is_not_taken_for_a_hung_one() -> None:
    engine = await opened("step_ms=100", silence_seconds=0.2)
    try:
        await written(engine, ask(continue_tokens=4))
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.6
        await wait_until(lambda: loop.time() > until, "some idle time")
        assert await written(engine, ask()) == draws(PROMPT, 1)
        assert engine.restarts == 0
    finally:
        await engine.stop()


@pytest.mark.parametrize("unread_bytes", [0, 1 << 22])
async def test_stopping_leaves_no_child_even_one_that_hangs(unread_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it waited for until it has read what it was sent: it never will."""
    monkeypatch.setattr("pilotfish.cloud_worker.engine_process.STOP_SECONDS", 0.2)
    engine = await opened()
    pid = engine_child()
    os.kill(pid, signal.SIGSTOP)
    await engine.forget("s" * unread_bytes)
    await asyncio.wait_for(engine.stop(), 5)
    assert _gone(pid)
    await engine.stop()


async def test_stopping_is_finished_however_often_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pilotfish.cloud_worker.engine_process.STOP_SECONDS", 0.3)
    engine = await opened()
    pid = engine_child()
    os.kill(pid, signal.SIGSTOP)  # it does not leave by itself
    stopping = asyncio.create_task(engine.stop())
    await asyncio.sleep(0)
    await end_tasks([stopping])
    assert stopping.cancelled()
    assert _gone(pid)


async def test_a_signal_for_the_whole_group_leaves_the_child_to_its_parent(engine: EngineProcess) -> None:
    pid = engine_child()
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    assert await written(engine, ask()) == draws(PROMPT, 1)
    assert engine.restarts == 0


@pytest.mark.parametrize(
    ("spec", "kind", "sentence"),
    [
        (EngineSpec("gpt", ""), ModelError, "choose vllm, llamacpp or fake"),
        (EngineSpec("llamacpp", "/nowhere.gguf"), ModelError, "nowhere"),
        (EngineSpec("fake", "speed=9"), ModelError, "give step_ms, flip_rate, flip_seed"),
        (EngineSpec("fake", "", context=0, draft_max=-1, cores="x"), EngineError, "ValueError"),
    ],
)
async def test_an_engine_that_cannot_open_says_why(spec: EngineSpec, kind: type[Exception], sentence: str) -> None:
    engine = EngineProcess(spec)
    with pytest.raises(kind, match=f"did not start: .*{sentence}"):
        await engine.start()
    assert not engine.alive


async def test_the_fake_engines_switches_are_its_model() -> None:
    assert fake_switches("step_ms=20,flip_rate=0.5,flip_seed=3") == {"step_ms": 20.0, "flip_rate": 0.5, "flip_seed": 3}
    assert fake_switches("") == fake_switches(".") == {}
    flipping = await opened("flip_rate=1")
    try:
        assert await written(flipping, ask()) == [(draws(PROMPT, 1)[0] + 1) % 256]
    finally:
        await flipping.stop()
