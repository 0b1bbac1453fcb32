from __future__ import annotations

import json
from typing import Any

import pytest

from pilotfish.bench import registry
from pilotfish.cli.main import run_command


def report(name: str, met: bool | None) -> dict[str, Any]:
    target = {"name": "p50", "value": None if met is None else 1.25, "unit": "ms", "goal": "<= 1.4", "met": met}
    return {"schema": "s", "name": name, "conditions": {}, "figures": {"rounds": 3}, "targets": [target]}


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool | None]:
    """Two benchmarks that measure nothing."""
    found: dict[str, bool | None] = {"one": True, "two": None}
    monkeypatch.setattr(registry, "NAMES", {"one": "m:f", "two": "m:f"})
    monkeypatch.setattr(registry, "run", lambda name, quick: report(name, found[name]))
    return found


@pytest.mark.parametrize(("met", "code"), [(True, 0), (None, 0), (False, 1)])
def test_a_missed_target_is_1(
    met: bool | None, code: int, outcomes: dict[str, bool | None], capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes["one"] = met
    assert run_command(["bench", "one", "--json", "--quick"]) == code
    assert json.loads(capsys.readouterr().out)["targets"][0]["met"] is met


def test_all_of_them_one_object_per_line(outcomes: dict[str, bool | None], capsys: pytest.CaptureFixture[str]) -> None:
    outcomes["one"] = False
    assert run_command(["bench", "all", "--json"]) == 1
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == ["one", "two"]


def test_minutes_are_the_soaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[dict[str, object]] = []

    def remember(name: str, quick: bool, **options: object) -> dict[str, Any]:
        asked.append(options)
        return report(name, True)

    monkeypatch.setattr(registry, "run", remember)
    assert run_command(["bench", "soak", "--minutes", "0.2", "--json"]) == 0
    assert asked == [{"minutes": 0.2}]
    assert run_command(["bench", "broker", "--minutes", "3"]) == 2
    assert run_command(["bench", "soak", "--minutes", "0"]) == 2


def test_for_people(outcomes: dict[str, bool | None], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "one"]) == 0
    out = capsys.readouterr().out
    assert "p50     1.25 ms  <= 1.4  met" in out
    assert "rounds: 3" in out


def test_a_list_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(registry.NAMES)
    assert run_command(["bench", "ls", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == list(registry.NAMES)
