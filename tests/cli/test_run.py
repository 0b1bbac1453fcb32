"""`worker` and `up` as processes on the fake engine: when they are ready, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rigs import agent, text_of

from pilotfish.cli.run import _code
from pilotfish.edge_agent.task import Task

PROGRAM = [sys.executable, "-m", "pilotfish.cli.main"]


@contextmanager
def started(*args: str, redis_url: str, ready: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said `ready`; killed at the end if the test did not end it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would inherit "ignored"
    environment = {**os.environ, "REDIS_URL": redis_url}
    process = subprocess.Popen([*PROGRAM, *args], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    try:
        for line in process.stderr:
            if ready in line:
                break
        else:
            raise AssertionError(f"it ended without {ready!r}")
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("when", ["loading", "Redis: "])
@pytest.mark.usefixtures("redis")
def test_a_worker_ends_as_it_is_told(redis_url: str, when: str, number: signal.Signals, code: int) -> None:
    with started("worker", "--engine", "fake", redis_url=redis_url, ready=when) as worker:
        worker.send_signal(number)
        assert worker.wait(30) == code
        assert worker.stderr
        assert "Traceback" not in worker.stderr.read()


@pytest.mark.usefixtures("redis")
def test_what_others_can_reach_wants_a_key(redis_url: str) -> None:
    words = ["worker", "--engine", "fake", "--metrics-port", "17842", "--serve-host", "0.0.0.0"]
    ended = subprocess.run(
        [*PROGRAM, *words], env={**os.environ, "REDIS_URL": redis_url}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("pilotfish: 0.0.0.0 can be reached from other machines, and there is no key")
    assert "PILOTFISH_API_KEY" in last


@pytest.mark.slow
async def test_every_line_of_a_json_log_is_an_object_and_none_holds_a_prompt(redis_url: str) -> None:
    words = ("worker", "--engine", "fake", "--log-format", "json", "--log-level", "info")
    with started(*words, redis_url=redis_url, ready='"message": "worker ready: ') as process:
        async with agent(redis_url) as running:
            text, _ = await text_of(running, Task(tuple(b"canary-7f3a"), max_tokens=30))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr
        lines = process.stderr.read().splitlines()
    assert {"time", "level", "logger", "message"} <= json.loads(lines[-1]).keys()
    assert all(json.loads(line) for line in lines)
    assert not any("canary" in line or bytes(text).decode("latin-1") in line for line in lines)


def test_what_ends_a_process_is_an_object_too() -> None:
    words = ("worker", "--engine", "fake", "--log-format", "json", "--log-level", "error")
    ended = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3
    (line,) = ended.stderr.splitlines()
    told = json.loads(line)
    assert (told["level"], told["message"][:27]) == ("error", "pilotfish: there is no Redi")


@pytest.mark.slow
@pytest.mark.usefixtures("redis")
@pytest.mark.parametrize("command", ["agent", "chat"])
def test_one_that_waits_for_a_worker_can_be_stopped(redis_url: str, command: str) -> None:
    with started(command, redis_url=redis_url, ready="no worker yet") as waiting:
        waiting.send_signal(signal.SIGINT)
        assert waiting.wait(30) == 130
        assert waiting.stderr
        assert not waiting.stderr.read()


@pytest.mark.slow
@pytest.mark.usefixtures("redis")
def test_up_stops_the_worker_it_started_when_the_agent_cannot_start(redis_url: str) -> None:
    """The fake target speaks bytes, which no draft does."""
    ended = subprocess.run(
        [*PROGRAM, "up", "--engine", "fake", "--draft-model", "none.gguf"],
        env={**os.environ, "REDIS_URL": redis_url}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    told = ended.stderr.splitlines()
    assert told[-1].startswith("pilotfish: the agent did not start: ")
    assert "none.gguf" in told[-1]
    (pid,) = (int(line.rpartition(" ")[2]) for line in told if ", process " in line)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_ctrl_c_is_130_and_sigterm_a_service_that_ended() -> None:
    assert (_code(signal.SIGINT), _code(signal.SIGTERM)) == (130, 0)
