"""`up` with llama.cpp on both sides, and everything a shell can ask of it. One `up` for the whole page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from contracts.tiny_gguf import write_tiny_gguf

from helpers import wait_until_sync
from pilotfish.cli import redis_server

pytestmark = [pytest.mark.llamacpp, pytest.mark.slow]
Cli = Callable[..., subprocess.CompletedProcess[str]]
PROGRAM = [sys.executable, "-m", "pilotfish.cli.main"]


def read_until(lines: IO[str], word: str) -> list[str]:
    seen: list[str] = []
    for line in lines:
        seen.append(line.rstrip())
        if word in line:
            return seen
    raise AssertionError(f"ended without {word!r}: {seen}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def models(home: Path) -> list[str]:
    target, draft = (write_tiny_gguf(home / f"{name}.gguf", seed=7) for name in ("target", "draft"))
    return ["--engine", "llamacpp", "--target-model", str(target), "--draft-model", str(draft), "--context", "1000"]


@pytest.fixture(scope="module")
def up(home: Path, models: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Everything running; its private Redis is the one commands find in `home`."""
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    environment |= {"XDG_RUNTIME_DIR": str(home), "HOME": str(home)}
    process = subprocess.Popen([*PROGRAM, "up", *models], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    try:
        read_until(process.stderr, "ready: ")
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) == 0, rest


@pytest.fixture(autouse=True)
def same_home(home: Path, bare_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home))


@pytest.mark.usefixtures("up")
def test_an_answer_is_streamed(cli: Cli) -> None:
    ended = cli("submit", "hello", "--max-tokens", "30")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("\n")
    assert "rows and" in ended.stderr
    assert "seed " in ended.stderr


@pytest.mark.usefixtures("up")
def test_drafts_change_nothing_but_the_speed(cli: Cli) -> None:
    ask = ("submit", "hello", "--max-tokens", "40", "--seed", "3", "--temperature", "1", "--json", "--trace")
    exact, cloud = (json.loads(cli(*ask, "--mode", mode).stdout) for mode in ("exact", "cloud_only"))
    assert exact["text"] == cloud["text"]
    assert [token["id"] for token in exact["tokens"]] == [token["id"] for token in cloud["tokens"]]
    assert exact["summary"]["rounds"] > cloud["summary"]["rounds"] == 1
    assert {token["origin"] for token in cloud["tokens"]} == {"continued"}


@pytest.mark.usefixtures("up")
def test_detach_then_result(cli: Cli) -> None:
    sent = cli("submit", "hello", "--detach", "--max-tokens", "20")
    followed = cli("result", sent.stdout.strip(), "--wait")
    assert followed.returncode == 0, followed.stderr
    assert cli("result", sent.stdout.strip()).stdout == followed.stdout


@pytest.mark.usefixtures("up")
def test_a_prompt_from_standard_input_and_from_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "question.txt").write_text("hello there")
    texts = [json.loads(cli("submit", *args, "--json", "--max-tokens", "9", input=given).stdout)["text"]
             for args, given in ((["-"], "hello there"), (["question.txt"], ""), (["hello there"], ""))]  # fmt: skip
    assert len(set(texts)) == 1
    assert json.loads(cli("submit", "question.txt", "--text", "--json", "--max-tokens", "9").stdout)["text"] != texts[0]


@pytest.mark.usefixtures("up")
def test_a_prompt_longer_than_the_context(cli: Cli) -> None:
    ended = cli("submit", "hello " * 500, "--json")
    assert ended.returncode == 2
    assert "exceed the context of 1000" in ended.stderr
    assert json.loads(ended.stdout)["error"]["code"] == "too_long"


def running_submit() -> subprocess.Popen[str]:
    """A long answer of which the first text has arrived."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would inherit "ignored"
    process = subprocess.Popen(
        [*PROGRAM, "submit", "count", "--raw", "--max-tokens", "900", "--draft-tokens", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.read(1)
    return process


@pytest.mark.usefixtures("up")
def test_ctrl_c_stops_it_everywhere(cli: Cli) -> None:
    process = running_submit()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in told

    def idle() -> bool:
        found = json.loads(cli("queue", "ls", "--json").stdout)
        peers = [*found["agents"], *found["targets"][0]["workers"]]
        return all(peer["beat"]["running"] == "0" for peer in peers)

    wait_until_sync(idle, "nothing running")


@pytest.mark.usefixtures("up")
def test_queue_names_who_serves(cli: Cli) -> None:
    found = json.loads(cli("queue", "ls", "--json").stdout)
    assert found["targets"][0]["workers"][0]["beat"]["engine"].startswith("llama.cpp")
    assert found["agents"][0]["alive"]


@pytest.mark.usefixtures("up")
def test_chat_remembers(cli: Cli, models: list[str]) -> None:
    draft = models[models.index("--draft-model") :]
    ended = cli("chat", *draft, "--max-tokens", "12", input="hello\nhello\n/new\nhello\n/what\n/exit\n")
    assert ended.returncode == 0, ended.stderr
    first, second, again = [line for line in ended.stderr.splitlines() if " tokens: " in line]
    assert "seed" in first + second + again
    assert "/new and /exit" in ended.stderr


def test_chat_alone_needs_no_redis(cli: Cli, models: list[str]) -> None:
    draft = models[models.index("--draft-model") :]
    ended = cli("chat", *draft, "--mode", "edge_only", "--max-tokens", "12", input="hello\n")
    assert ended.returncode == 0, ended.stderr
    assert "12 tokens: 12 local" in ended.stderr


def test_the_demo_leaves_nothing_running(cli: Cli, models: list[str], tmp_path: Path) -> None:
    before = redis_server.find()
    ended = cli("demo", *models, "--prompts", "2", "--max-tokens", "8", "--json")
    assert ended.returncode == 0, ended.stderr
    body = json.loads(ended.stdout)
    assert body["equal"]
    assert body["exact"]["tokens"] == body["cloud_only"]["tokens"] > 0
    assert redis_server.find() == before
    pids = [int(line.rpartition(" ")[2]) for line in ended.stderr.splitlines() if ", process " in line]
    assert len(pids) == 2
    assert not any(redis_server.started_at(pid) for pid in pids)
