from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable

import pytest
from http_rigs import api

from pilotfish.cli.health import address
from pilotfish.protocol.settings import load

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, "http://127.0.0.1:8787/health"),
        ({"serve_host": "0.0.0.0", "metrics_port": 9787}, "http://127.0.0.1:9787/health"),
        ({"serve_host": "10.0.0.7", "serve_port": 1}, "http://10.0.0.7:1/health"),
    ],
)
def test_it_asks_where_this_machine_serves(given: dict[str, object], url: str) -> None:
    assert address(load(given, environ={}), "health") == url


@pytest.mark.slow
async def test_a_living_agent_is_healthy_and_ready(redis_url: str, cli: Cli) -> None:
    async with api(redis_url) as served:
        port = served.url.rpartition(":")[2]
        for question in ([], ["--ready"]):
            told = await asyncio.to_thread(cli, "health", "--serve-port", port, *question)
            assert told.returncode == 0, told.stderr
            assert '"status": "ok"' in told.stdout


def test_where_nothing_answers_it_says_so(cli: Cli) -> None:
    told = cli("health", "--serve-port", "9")
    assert told.returncode == 3
    assert "nothing answers at http://127.0.0.1:9/health" in told.stderr
    assert "start it with --metrics-port or --serve" in told.stderr
