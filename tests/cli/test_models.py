"""`pilotfish models` against a hub of this machine, and the two sides on what it fetched."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from contracts.tiny_gguf import write_tiny_gguf

import pilotfish
from fake_hub import Hub, Repository, fake_hub
from pilotfish.cache.presets import PRESETS
from pilotfish.cli.main import app
from pilotfish.demo import pair

Cli = Callable[..., subprocess.CompletedProcess[str]]
PAGE = Path(pilotfish.__file__).parent / "docs/models.md"
DRAFT = "hf://acme/draft-GGUF/draft.gguf"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    target = {path.name: path.read_bytes() for path in pair.TARGET_DIR.iterdir()}
    with fake_hub({"acme/draft-GGUF": Repository({"draft.gguf": b"GGUF"}), "acme/Target": Repository(target)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield hub


@pytest.mark.slow
def test_pull_prints_where_the_model_is_and_ls_lists_it(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    assert "no models in" in cli("models", "ls").stdout
    pulled = cli("models", "pull", DRAFT)
    assert pulled.returncode == 0, pulled.stderr
    assert Path(pulled.stdout.strip()).read_bytes() == b"GGUF"
    assert "acme/draft-GGUF  main  0.00 GB  draft.gguf" in cli("models", "ls").stdout
    (listed,) = json.loads(cli("models", "ls", "--json").stdout)
    assert listed["files"]["draft.gguf"]["bytes"] == 4
    Path(pulled.stdout.strip()).write_bytes(b"GGUX")
    checked = cli("models", "ls", "--check")
    assert (checked.returncode, checked.stdout) == (2, "")
    assert "is not what was fetched" in checked.stderr


@pytest.mark.slow
def test_a_terminal_sees_how_far_it_is_and_a_file_does_not(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """huggingface_hub's own bar; a log would be full of it."""
    assert "%|" not in cli("models", "pull", DRAFT).stderr
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    command = [sys.executable, "-m", "pilotfish.cli.main", "models", "pull", DRAFT, "--cache-dir", str(tmp_path / "b")]
    ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=slave, timeout=60)
    os.close(slave)
    shown = os.read(master, 65_536).decode()
    os.close(master)
    assert ended.returncode == 0, shown
    assert re.search(r"draft\.gguf: +100%\|", shown)


@pytest.mark.slow
def test_a_pair_of_a_hub_is_fetched_and_checked(hub: Hub, cli: Cli) -> None:
    checked = cli("models", "check-pair", "", "hf://acme/Target")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith("ok, ")


@pytest.mark.slow
@pytest.mark.parametrize("switch", [["--offline"], []])
def test_offline_is_an_option_and_huggingfaces_variable(hub: Hub, cli: Cli, switch: list[str]) -> None:
    told = cli("models", "pull", DRAFT, *switch, env={} if switch else {"HF_HUB_OFFLINE": "1"})
    assert told.returncode == 2
    assert "is not here in full and --offline forbids to fetch it" in told.stderr
    assert hub.asked == []


def test_nothing_to_pull_is_said(cli: Cli) -> None:
    told = cli("models", "pull")
    assert told.returncode == 2
    assert "say what to fetch" in told.stderr


def test_presets_are_listed(cli: Cli) -> None:
    assert set(json.loads(cli("models", "presets", "--json").stdout)) == set(PRESETS)
    assert PRESETS["qwen3-8b"].draft in cli("models", "presets").stdout


@pytest.mark.slow
@pytest.mark.parametrize("role", [["worker", "--engine", "vllm", "--target-model"], ["agent", "--draft-model"]])
def test_both_sides_refuse_a_name_the_hub_has_not(hub: Hub, cli: Cli, redis_url: str, role: list[str]) -> None:
    told = cli(*role, "hf://acme/nothing/x.gguf", "--redis-url", redis_url)
    assert told.returncode == 2
    assert "the hub has no model acme/nothing" in told.stderr


def test_the_worker_serves_a_folder_of_the_hub_under_its_name(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pilotfish.cloud_worker.launch import worker_spec
    from pilotfish.protocol.settings import load

    settings = load({"engine": "vllm", "target_model": "hf://acme/Target", "cache_dir": str(tmp_path)}, environ={})
    spec = worker_spec(settings, "redis://127.0.0.1:1")
    assert spec.model_name == "Target"
    assert Path(spec.engine.model).name == f"Target@{'a' * 12}"


@pytest.mark.slow
def test_doctor_tells_whether_the_draft_is_here(hub: Hub, cli: Cli) -> None:
    assert f"`pilotfish models pull {DRAFT}` does so now" in cli("doctor", "--json", "--draft-model", DRAFT).stdout
    cli("models", "pull", DRAFT)
    checks = json.loads(cli("doctor", "--json", "--draft-model", DRAFT).stdout)["checks"]
    assert next(check for check in checks if check["name"] == "draft_model")["ok"]


@pytest.mark.parametrize(
    ("file", "name"), [("m.gguf", "m"), ("q4-00001-of-00002.gguf", "q4"), ("Qwen2.5-7B", "Qwen2.5-7B")]
)
def test_a_target_is_called_after_its_file_or_folder(tmp_path: Path, file: str, name: str) -> None:
    from pilotfish.cloud_worker.launch import worker_spec
    from pilotfish.protocol.settings import load

    (tmp_path / file).touch() if file.endswith(".gguf") else (tmp_path / file).mkdir()
    engine = "llamacpp" if file.endswith(".gguf") else "vllm"
    settings = load({"engine": engine, "target_model": str(tmp_path / file)}, environ={})
    assert worker_spec(settings, "redis://127.0.0.1:1").model_name == name


@pytest.mark.parametrize("line", re.findall(r"(?m)^pilotfish (.+?)(?: +#.*)?$", PAGE.read_text()))
def test_the_commands_of_the_page_are_commands(line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = line.split()
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    assert command.make_context("pilotfish", words)


@pytest.mark.slow
@pytest.mark.llamacpp
def test_up_fetches_both_models_and_answers_with_them(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    """A draft in one file and a target in three, from the hub to an answer."""
    hub.repositories["acme/draft-GGUF"].files["draft.gguf"] = write_tiny_gguf(tmp_path / "d.gguf", seed=7).read_bytes()
    write_tiny_gguf(tmp_path / "t.gguf", seed=7, split=12)
    parts = {path.name: path.read_bytes() for path in tmp_path.glob("t-*.gguf")}
    hub.repositories["acme/target-GGUF"] = Repository(parts)
    target = "hf://acme/target-GGUF/t-00001-of-00003.gguf"
    options = ["--engine", "llamacpp", "--draft-model", DRAFT, "--target-model", target, "--context", "1000"]
    command = [sys.executable, "-m", "pilotfish.cli.main", "up", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as up:
        assert up.stderr
        told = []
        try:
            for line in up.stderr:
                told.append(line)
                if line.startswith("ready: "):
                    break
            answer = cli("submit", "hello", "--max-tokens", "8", "--json")
        finally:
            up.terminate()
            told += up.stderr.readlines()
    assert answer.returncode == 0, [answer.stderr, *told]
    assert up.returncode == 0
