from __future__ import annotations

import logging
from typing import Any

import pytest
import typer

from pilotfish.cli.options import OPTIONS, takes
from pilotfish.protocol.settings import Settings, allowed


@pytest.fixture(autouse=True)
def logger() -> Any:
    yield
    logging.getLogger("pilotfish").setLevel("NOTSET")


def test_every_setting_is_an_option_and_says_the_same() -> None:
    assert {name: words for name, (_, words, *_) in OPTIONS.items()} == {
        name: field.description for name, field in Settings.model_fields.items()
    }


@pytest.mark.parametrize("name", [name for name, (*_, last) in OPTIONS.items() if "|" in last])
def test_choices_are_those_of_the_settings(name: str) -> None:
    words = OPTIONS[name][2].split("|")
    assert allowed(name) == f"{', '.join(words[:-1])} or {words[-1]}"


@pytest.mark.parametrize("name", OPTIONS)
def test_types_are_those_of_the_settings(name: str) -> None:
    word = {int: "an integer", float: "a number"}.get(OPTIONS[name][0])
    assert allowed(name).startswith(word) if word else not allowed(name).startswith(("an integer", "a number"))


def run(command: Any, *args: str) -> None:
    app = typer.Typer()
    app.command()(command)
    app(list(args), standalone_mode=False)


def test_a_command_gets_settings_and_its_own_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, Any] = {}

    @takes("seed", "tenant")
    def command(settings: Settings, word: str, loud: bool = False) -> None:
        got.update(seed=settings.seed, tenant=settings.tenant, word=word, loud=loud, origins=settings.origins())

    monkeypatch.setenv("PILOTFISH_TENANT", "acme")
    run(command, "hi", "--seed", "7", "--loud")
    origins = got.pop("origins")
    assert got == {"seed": 7, "tenant": "acme", "word": "hi", "loud": True}
    assert (origins["seed"], origins["tenant"], origins["mode"]) == ("cli", "env PILOTFISH_TENANT", "default")


def test_a_settings_file_is_read(tmp_path: Any) -> None:
    got: list[int | None] = []

    @takes("seed")
    def command(settings: Settings) -> None:
        got.append(settings.seed)

    file = tmp_path / "mine.toml"
    file.write_text("seed = 5")
    run(command, "--config", str(file))
    assert got == [5]


@pytest.mark.parametrize(("args", "level"), [([], "INFO"), (["--log-level", "error"], "ERROR")])
def test_the_log_level_is_set(args: list[str], level: str) -> None:
    @takes()
    def command(settings: Settings) -> None: ...

    run(command, *args)
    assert logging.getLevelName(logging.getLogger("pilotfish").level) == level
