"""The API with llama.cpp on both sides, as a person starts it: `up --serve`, and `agent --serve` alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from contracts.tiny_gguf import write_tiny_gguf

pytestmark = [pytest.mark.llamacpp, pytest.mark.slow]
PROGRAM = [sys.executable, "-m", "pilotfish.cli.main"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@contextmanager
def started(home: Path, *words: str, ready: str, key: str = "") -> Iterator[str]:
    """A process that serves an API; gives its URL, and sees it end well."""
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    environment |= {"XDG_RUNTIME_DIR": str(home), "HOME": str(home), "PILOTFISH_API_KEY": key}
    process = subprocess.Popen(
        [*PROGRAM, *words, "--serve-port", "0"], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr
    said = ""
    try:
        for line in process.stderr:
            said += line
            if line.startswith(ready):
                break
        found = re.search(r"API: (http://\S+)/v1", said)
        assert found, said
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        said += process.stderr.read()
        process.stderr.close()
        assert process.wait(60) == 0, said


def model(home: Path, name: str) -> str:
    return str(write_tiny_gguf(home / f"{name}.gguf", seed=7))


def test_a_chat_is_answered_by_both_models_and_the_text_is_the_targets(home: Path) -> None:
    words = ["up", "--serve", "--engine", "llamacpp", "--target-model", model(home, "target"), "--draft-model",
             model(home, "draft"), "--context", "1000"]  # fmt: skip
    with started(home, *words, ready="ready: ", key="s3cret") as url:
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as client:
            name = client.models.list().data[0].id
            assert name == "target"
            wish = {"model": name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40, "seed": 3,
                    "temperature": 1, "logprobs": True}  # fmt: skip
            answers = [
                client.chat.completions.create(**wish, extra_body={"pilotfish": {"mode": mode}})  # type: ignore[call-overload]
                for mode in ("exact", "cloud_only")
            ]
        exact, cloud = (answer.choices[0] for answer in answers)
        assert exact.message.content == cloud.message.content
        assert (exact.pilotfish["mode"], exact.pilotfish["accepted"] > 0) == ("exact", True)
        assert cloud.pilotfish["continued"] == cloud.pilotfish["tokens"] > 5
        assert "".join(token.token for token in exact.logprobs.content) == exact.message.content
        ours, theirs = ([token.logprob for token in choice.logprobs.content] for choice in (exact, cloud))
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert max(ours) <= 0 > min(ours)
        assert httpx.get(f"{url}/ready", headers={"authorization": "Bearer s3cret"}).json()["workers"] == 1


def test_a_device_alone_needs_no_redis(home: Path) -> None:
    words = ["agent", "--serve", "--mode", "edge_only", "--draft-model", model(home, "lonely"), "--context", "500"]
    with started(home, *words, ready="agent ready") as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            name = client.models.list().data[0].id
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "hello"}], max_tokens=10
            )
            assert answer.choices[0].pilotfish["local"] == answer.usage.completion_tokens  # type: ignore[attr-defined, union-attr]
            running = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "hello"}], max_tokens=400, stream=True
            )
            next(running)
            assert httpx.post(f"{url}/drain").status_code == 202
            *_, last = running
        assert last.choices[0].finish_reason in ("stop", "length"), "what runs is finished"
        assert last.choices[0].pilotfish["tokens"] > 0  # type: ignore[attr-defined]
