from __future__ import annotations

import json
from pathlib import Path

import pytest

from pilotfish.cli import doctor
from pilotfish.cli.doctor import Check
from pilotfish.cli.main import run_command
from pilotfish.protocol.settings import Settings


def test_every_setting_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["config", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(Settings.model_fields)


def test_origins_are_told_and_the_password_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:secret@localhost/0")
    Path("pilotfish.toml").write_text("window = 3")
    assert run_command(["config", "show", "--origin", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines()}
    assert rows["redis_url"] == ["redis://:***@localhost/0", "env REDIS_URL"]
    assert rows["window"] == ["3", "file pilotfish.toml"]
    assert rows["seed"] == ["5", "cli"]
    assert "secret" not in out


def test_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["config", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "exact"
    assert run_command(["config", "show", "--json", "--origin"]) == 0
    assert json.loads(capsys.readouterr().out)["mode"] == {"value": "exact", "origin": "default"}


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (None, 0), (False, 1)])
def test_doctor_ends_with_what_it_found(
    ok: bool | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "checks", lambda settings: [Check("python", ok, "3.11", "" if ok else "install it")])
    assert run_command(["doctor"]) == code
    assert "python" in capsys.readouterr().out
    assert run_command(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["checks"][0]["name"] == "python"
