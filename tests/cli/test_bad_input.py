"""Whatever is wrong: one sentence on stderr that tells the fix, the right exit code, nothing on stdout."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from contracts.tiny_gguf import write_tiny_gguf

Cli = Callable[..., subprocess.CompletedProcess[str]]
NOBODY = "redis://127.0.0.1:1/0"


def refused(ended: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    told = ended.stderr.splitlines()[-1]
    assert ended.returncode == code, ended.stderr
    assert told.startswith("pilotfish: ")
    assert all(word in told for word in words), told
    assert not ended.stdout
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "command", [("submit", "hi"), ("worker", "--engine", "fake"), ("agent",), ("queue", "ls"), ("chat",)]
)
def test_no_redis(cli: Cli, command: tuple[str, ...]) -> None:
    refused(cli(*command), 3, "there is no Redis", "pilotfish up", "REDIS_URL")
    refused(cli(*command, env={"REDIS_URL": NOBODY}), 3, "127.0.0.1:1", "pilotfish up")


@pytest.mark.parametrize("command", [("submit", "hi"), ("worker", "--engine", "fake"), ("agent",), ("queue", "peek")])
def test_a_wrong_password(cli: Cli, redis_url: str, command: tuple[str, ...]) -> None:
    wrong = f"redis://:wrong-secret@{redis_url.rpartition('@')[2]}"
    ended = cli(*command, env={"REDIS_URL": wrong})
    refused(ended, 3, "password", "REDIS_URL")
    assert "wrong-secret" not in ended.stderr


def test_a_url_that_is_none(cli: Cli) -> None:
    refused(cli("submit", "hi", env={"REDIS_URL": "localhost:6379"}), 2, "redis://")


def test_no_agent(cli: Cli, redis_url: str) -> None:
    refused(cli("submit", "hi", "--redis-url", redis_url), 3, "no agent", "pilotfish agent")


@pytest.mark.slow
def test_no_worker(cli: Cli, redis_url: str) -> None:
    ended = cli("agent", "--redis-url", redis_url)
    refused(ended, 3, "no live worker", "pilotfish worker")
    assert "waiting 10 s" in ended.stderr


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_prompt(cli: Cli, redis_url: str, text: str) -> None:
    refused(cli("submit", text, "--redis-url", redis_url), 2, "the prompt is empty")
    refused(cli("submit", "-", "--redis-url", redis_url, input=text), 2, "the prompt is empty")


def test_a_prompt_longer_than_a_message(cli: Cli, redis_url: str) -> None:
    refused(cli("submit", "-", "--redis-url", redis_url, input="x" * 1_000_001), 2, "Shorten")


@pytest.mark.parametrize("path", ["/nowhere/notes.txt", "./notes.txt", "/"])
def test_a_path_without_a_file(path: str) -> None:
    from pilotfish.cli.submit import prompt_text
    from pilotfish.protocol.errors import UsageError

    with pytest.raises(UsageError, match="there is no file .*: check the path, or add --text"):
        prompt_text(path, literal=False)
    assert prompt_text(path, literal=True) == path


@pytest.mark.parametrize(
    ("command", "env"),
    [
        (("chat", "--draft-model", "~nosuchuser/x"), {}),
        (("models", "check-pair", "~nosuchuser/x"), {}),
        (("queue", "ls"), {"XDG_RUNTIME_DIR": "", "XDG_CACHE_HOME": "~nosuchuser/x"}),
    ],
    ids=["a setting", "an argument", "the private Redis"],
)
def test_the_home_of_an_unknown_user(cli: Cli, command: tuple[str, ...], env: dict[str, str]) -> None:
    refused(cli(*command, env=env), 2, "no home directory '~nosuchuser'", "out from /")


def test_a_file_that_is_no_text(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    refused(cli("submit", "picture.png"), 2, "picture.png is not UTF-8")


@pytest.mark.llamacpp
def test_a_model_file_that_is_none(cli: Cli, redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("once upon a time")
    worker = ("worker", "--engine", "llamacpp", "--redis-url", redis_url)
    refused(cli(*worker, "--target-model", "model.gguf"), 2, "GGUF")
    refused(cli(*worker, "--target-model", "none.gguf"), 2, "none.gguf does not exist")
    refused(cli(*worker, "--target-model", "."), 2, "folder", "--engine vllm")
    refused(cli("chat", "--mode", "edge_only", "--draft-model", "model.gguf"), 2, "GGUF")


@pytest.mark.llamacpp
def test_a_pair_that_does_not_fit(cli: Cli, tmp_path: Path) -> None:
    tiny = write_tiny_gguf(tmp_path / "tiny.gguf")
    fits = cli("models", "check-pair", str(tiny), str(tiny))
    assert (fits.returncode, fits.stdout) == (0, "ok, 320 tokens alike\n")
    other = tmp_path / "other"
    other.mkdir()
    vocabulary = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}}
    for name, body in (("tokenizer", vocabulary), ("config", {"vocab_size": 2}), ("tokenizer_config", {})):
        (other / f"{name}.json").write_text(json.dumps(body))
    refused(
        cli("models", "check-pair", str(tiny), str(other)), 2, "differ at token 0", "choose a draft of the target's"
    )
    (tmp_path / "none").mkdir()
    refused(cli("models", "check-pair", "none", str(tiny)), 2, "tokenizer.json")
