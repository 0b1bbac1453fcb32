from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer

from pilotfish.cli import main
from pilotfish.cli.docs import helps, page
from pilotfish.protocol.errors import NoWorker

HEAVY = {"numpy", "vllm", "llama_cpp", "torch", "pydantic", "redis", "rich"}
HELP_SECONDS = 0.3


def commands() -> list[list[str]]:
    root = typer.main.get_command(main.app)
    return [path.split()[1:] for path, _ in helps(root, "pilotfish", None)]


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command) or "pilotfish")
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run_command([*command, "--help"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"Usage: {' '.join(['pilotfish', *command])}")
    assert not told.err


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from pilotfish.cli.main import run_command
for command in {commands()}:
    run_command([*command, "--help"])
print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert told.stderr.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("command", [[], ["submit"]], ids=["root", "submit"])
def test_help_is_instant(command: list[str]) -> None:
    """The fastest of ten: other tests may hold the cores."""
    line = [sys.executable, "-m", "pilotfish.cli.main", *command, "--help"]

    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run(line, check=True, capture_output=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(10)) < HELP_SECONDS


def test_the_page_of_the_docs_is_fresh() -> None:
    written = Path(main.__file__).parent.parent / "docs" / "cli.md"
    assert written.read_text() == page(), "stale: python -m pilotfish.cli.docs > docs/cli.md"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"{version('pilotfish')}\n"


# --- how commands end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["submti"], "No such command 'submti'. Did you mean 'submit'?"),
        (["submit", "x", "--sed", "3"], "--seed"),
        (["submit"], "Missing argument"),
        (["submit", "x", "--seed", "three"], "--seed"),
        (["submit", "x", "--mode", "exakt"], "exact, gated, cloud_only or edge_only"),
        (["submit", "x", "--config", "none.toml"], "none.toml"),
        (["demo", "--prompts", "0"], "--prompts"),
        (["queue", "peak"], "Did you mean 'peek'?"),
        (["result", "12"], "no request id"),
        (["bench", "speed"], "no benchmark 'speed'"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_2(
    args: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run_command(args) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert told.err.startswith("pilotfish: ")
    assert told.err.count("\n") == 1
    assert not told.out


def raising(error: BaseException) -> Any:
    def command(*_: Any, **__: Any) -> None:
        raise error

    return command


@pytest.mark.parametrize("group", [[], ["queue"], ["models"], ["config"]])
def test_a_group_alone_shows_its_help(group: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run_command(group) == 2
    assert capsys.readouterr().err.startswith("Usage: pilotfish")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (NoWorker("no worker: start one"), 3, "pilotfish: no worker: start one\n"),
        (KeyboardInterrupt(), 130, ""),
        (ValueError("odd"), 1, "pilotfish: unexpected ValueError: odd. Run `pilotfish --debug ...` to see where\n"),
    ],
)
def test_every_end_has_its_code(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "app", raising(error))
    assert main.run_command([]) == code
    assert capsys.readouterr().err == told


def test_debug_shows_where_an_error_came_from(cli: Any) -> None:
    ended = cli("--debug", "submit", "x")
    assert ended.returncode == 3
    assert "Traceback" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("pilotfish: there is no Redis")


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pilotfish.cli.main", "config", "show"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout
    process.stdout.close()
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (0, b"")
