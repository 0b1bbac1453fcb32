from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from pilotfish.cli import redis_server
from pilotfish.cli.pair import AGENT_OPTIONS, arguments, secrets_of, some_redis, split_cores
from pilotfish.cli.processes import Child, Children, check_cancelled, run, stop_signals
from pilotfish.protocol.errors import Cancelled, PilotfishError
from pilotfish.protocol.settings import load

STAYS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def test_cores_are_shared_out() -> None:
    assert split_cores([0, 1]) == ("0", "1")
    assert split_cores([2, 4, 6, 7]) == ("2,4,6", "7")
    assert split_cores([3]) == ("3", "3")


def test_children_are_told_what_was_said_on_the_command_line_only() -> None:
    settings = load(
        {"engine": "fake", "draft_max": 8}, environ={"PILOTFISH_DTYPE": "float16", "REDIS_URL": "redis://:pw@h"}
    )
    told = arguments(settings, ("engine", "draft_max", "dtype", "redis_url"), cores="0")
    assert told == ["--engine", "fake", "--draft-max", "8", "--cores", "0"]


def test_keys_are_told_through_the_environment() -> None:
    settings = load({"api_key": "k3y", "serve_port": 0}, environ={"PILOTFISH_METRICS_KEY": "other"})
    assert secrets_of(settings) == {"PILOTFISH_API_KEY": "k3y", "PILOTFISH_METRICS_KEY": "other"}
    assert arguments(settings, AGENT_OPTIONS) == ["--serve-port", "0"]


def child(tmp_path: Path, code: str) -> Child:
    log = tmp_path / "worker.log"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=out, stderr=out)
    return Child("worker", "w", process, log)


async def test_a_child_that_ends_first_says_why(tmp_path: Path) -> None:
    failing = child(tmp_path, "import sys; print('pilotfish: no such model'); sys.exit(2)")
    children = Children("redis://", tmp_path)
    children.running.append(failing)

    async def never() -> str:
        return ""

    with pytest.raises(PilotfishError, match=r"the worker did not start: no such model \(log: ") as told:
        await children.ready(failing, never)
    assert told.value.exit_code == 2
    await children.stop()
    assert failing.ended


async def test_one_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from helpers import wait_until

    monkeypatch.setattr("pilotfish.cli.processes.STOP_SECONDS", 0.2)
    stubborn = child(tmp_path, STAYS)
    await wait_until(lambda: stubborn.log.read_text() == "up\n", "the child")
    async with Children("redis://", tmp_path) as children:
        children.running.append(stubborn)
    assert stubborn.process.returncode == -signal.SIGKILL


async def test_a_signal_is_a_future() -> None:
    async with stop_signals() as told:
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(told, 5) == signal.SIGTERM


async def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        async with stop_signals() as told:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await asyncio.wait_for(told, 5) == signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_swallowed_cancellation_is_noticed() -> None:
    """What redis-py does with every command on Python 3.11."""
    ended: list[str] = []

    async def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        try:
            check_cancelled()
            await asyncio.sleep(10)
        finally:
            ended.append("told")

    with pytest.raises(Cancelled):
        run(work())
    assert ended == ["told"]


async def test_nothing_is_noticed_without_a_cancellation() -> None:
    check_cancelled()


def test_a_child_ends_with_its_parent() -> None:
    code = "from pilotfish.cli.processes import end_with_parent; import time; end_with_parent(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdin
    process.stdin.close()
    assert process.wait(30) == -signal.SIGTERM


# --- which Redis ---------------------------------------------------------------------------------------------


def test_a_redis_that_is_set_is_used_and_named_without_its_password() -> None:
    settings = load(environ={"REDIS_URL": "redis://:secret@h:1/0"})
    with some_redis(settings) as (url, words):
        assert (url, words) == ("redis://:secret@h:1/0", "redis://:***@h:1/0 (env REDIS_URL)")


def test_a_private_one_is_started_found_and_stopped() -> None:
    with some_redis(load(environ={})) as (url, words):
        assert words.startswith("private, ")
        found = redis_server.find()
        assert found
        assert found.url == url
        with some_redis(load(environ={})) as (again, words):
            assert again == url
            assert "already runs" in words
        with some_redis(load(environ={}), own=True) as (other, _):
            assert other != url
            assert redis_server.find() == found
    assert redis_server.find() is None
