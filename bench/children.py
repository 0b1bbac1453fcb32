"""Other processes of a benchmark: started as modules of ours, ready when they say so, ended by their id."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pilotfish.cli.redis_server import PrivateRedis, private_redis
from pilotfish.protocol.errors import EngineError

START_SECONDS = 300.0  # an engine loads its model
STOP_SECONDS = 10.0
READY = "ready"


@contextmanager
def own_redis() -> Iterator[PrivateRedis]:
    """A Redis of this benchmark alone: it is not the one other commands find."""
    with tempfile.TemporaryDirectory() as folder, private_redis(Path(folder) / "redis.json") as server:
        yield server


@dataclass(frozen=True, slots=True)
class Child:
    """A running child; `said` is what followed "ready" on its first line."""

    pid: int
    said: str


def say_ready(text: object = "") -> None:
    """What a child prints once it serves."""
    print(f"{READY} {text}".strip(), flush=True)


@contextmanager
def child(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Child]:
    """`python -m pilotfish.bench.<module>` for as long as the block runs. Secrets go by `environment`."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"pilotfish.bench.{module}", *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})},
    )  # fmt: skip
    assert process.stdout
    try:
        if not select.select([process.stdout], [], [], START_SECONDS)[0]:
            raise EngineError(f"the benchmark's {module} process is not ready after {START_SECONDS:g} s")
        word, _, said = process.stdout.readline().strip().partition(" ")
        if word != READY:
            raise EngineError(f"the benchmark's {module} process ended before it was ready: its errors are above")
        yield Child(process.pid, said)
    finally:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """Ask, wait, kill."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(BrokenPipeError):  # it died before it read what we had written
                pipe.close()
