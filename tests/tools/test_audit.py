"""tools/audit.py on answers of a stand-in for pip-audit; the real one needs a network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pilotfish

FLAW = {"id": "PYSEC-2030-1", "aliases": ["CVE-2030-1"], "fix_versions": ["2"]}


@pytest.fixture
def audit(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool("audit")


def package(**more: Any) -> dict[str, Any]:
    return {"name": "x", "version": "1", **more}


def answers(audit: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = folder / "pip-audit"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setattr(audit, "program", lambda: program)


def test_a_flaw_that_nobody_looked_at_fails_with_its_fix(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(audit, tmp_path, monkeypatch, json.dumps({"dependencies": [package(vulns=[FLAW])]}))
    assert audit.main(["edge"]) == 1
    assert "edge: x 1: PYSEC-2030-1, fixed in 2" in capsys.readouterr().err


def test_a_flaw_that_the_page_names_passes_under_any_of_its_names(audit: ModuleType) -> None:
    assert audit.report("edge", [package(vulns=[FLAW])], {"CVE-2030-1"}) == []


def test_an_index_without_advisories_is_no_clean_bill(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(audit, tmp_path, monkeypatch, json.dumps({"dependencies": [package(skip_reason="not found")]}))
    assert audit.main(["edge"]) == 1
    assert "no advisories to be had here (1 of 1 packages unknown: x" in capsys.readouterr().err


def test_without_a_network_it_says_where_to_run(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(audit, tmp_path, monkeypatch, "")
    with pytest.raises(SystemExit, match=r"no advisories to be had here .* run `make audit` where"):
        audit.main(["edge"])


def test_it_asks_for_public_versions_of_everything_locked(audit: ModuleType) -> None:
    pins = audit.requirements("cloud-cpu").splitlines()
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[a-z0-9.-]+==[^ +]+", pin) for pin in pins)


def test_the_page_names_versions_that_are_locked(audit: ModuleType) -> None:
    locked = "\n".join(audit.requirements(lock) for lock in audit.LOCKS)
    table = (Path(pilotfish.__file__).parent / "SECURITY.md").read_text().partition("| what | flaw |")[2]
    for name, version in re.findall(r"(?m)^\| ([a-z]+) (\d[\d.]+)", table):
        assert f"{name}=={version}\n" in locked, f"{name} is no longer {version}: is its row still true?"
