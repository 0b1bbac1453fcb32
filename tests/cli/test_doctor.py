from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pilotfish.cli import doctor
from pilotfish.cli.doctor import Check, as_json, checks, healthy, render
from pilotfish.protocol.errors import BrokerUnreachable
from pilotfish.protocol.settings import Settings


@pytest.fixture(autouse=True)
def no_private_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The private Redis of whoever runs the tests stays out of it."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def one(found: list[Check], name: str) -> Check:
    return next(check for check in found if check.name == name)


@pytest.mark.slow
def test_here_everything_needed_is_there(redis_url: str) -> None:
    found = checks(Settings(redis_url=redis_url))
    needed = {"python", "llama.cpp", "cores", "redis-server", "redis"}
    assert {name: one(found, name).ok for name in needed} == dict.fromkeys(needed, True)
    assert "llama_cpp" not in sys.modules


def test_a_wrong_setting_is_the_only_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOTFISH_WINDOW", "many")
    (found,) = checks()
    assert (found.name, found.ok) == ("settings", False)
    assert "window" in found.detail


def test_without_a_redis_url_the_way_to_one_is_named() -> None:
    (found,) = doctor.redis_answers(Settings())
    assert (found.ok, found.fix) == (None, "`pilotfish up` starts one")


def test_a_redis_that_does_not_answer_is_wrong_and_its_password_untold() -> None:
    (found,) = doctor.redis_answers(Settings(redis_url="redis://:secret@127.0.0.1:1/0"))
    assert found.ok is False
    assert "127.0.0.1:1" in found.detail
    assert "secret" not in found.detail + found.fix


def test_without_a_server_the_fix_is_the_brokers_own_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise BrokerUnreachable("set REDIS_URL")

    monkeypatch.setattr("pilotfish.cli.redis_server.find_program", none)
    assert list(doctor.redis_program()) == [Check("redis-server", None, "none here", "set REDIS_URL")]


def test_a_version_that_is_not_the_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOCKS", tmp_path)
    (tmp_path / "cloud-cpu.txt").write_text("arq==0.1 \\\nnobody-has-this==1 \\\npytest-timeout==2.4.0 \\\n")
    (found,) = doctor.packages()
    assert (found.ok, found.detail) == (False, "arq 0.28.0 (lock: 0.1)")


def test_a_wheel_has_no_lock_and_that_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LOCKS", tmp_path)
    (found,) = doctor.packages()
    assert found.ok


def test_engines_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    llama, vllm = doctor.engines()
    assert (llama.ok, vllm.ok) == (False, None)
    assert "pilotfish[edge]" in llama.fix
    assert "PIP_EXTRA_INDEX_URL" in vllm.fix


def test_an_engine_that_does_not_load_tells_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise OSError('wrong libstdc++')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    llama, _ = doctor.engines()
    assert (llama.ok, llama.detail) == (False, "OSError: wrong libstdc++")


def test_an_accelerator_is_named_and_its_absence_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(doctor.hardware())[-1].ok is None
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA H200\n")
    program.chmod(0o755)
    assert list(doctor.hardware())[-1] == Check("accelerator", True, "NVIDIA H200")


def test_missing_models_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    demo, draft = doctor.models(Settings(draft_model=tmp_path / "none.gguf"))
    assert demo.detail.startswith("target and draft missing")
    assert (demo.ok, draft.ok) == (False, False)


def test_only_what_is_wrong_makes_it_unhealthy() -> None:
    assert healthy([Check("a", True, ""), Check("b", None, "")])
    assert not healthy([Check("a", True, ""), Check("c", False, "")])


def test_both_reports_hold_every_check() -> None:
    found = [Check("a", True, "fine"), Check("b", False, "[bad]", "mend it"), Check("c", None, "none")]
    body = json.loads(as_json(found))
    assert body["ok"] is False
    assert [Check(**check) for check in body["checks"]] == found
    out = io.StringIO()
    Console(file=out, width=80).print(render(found))
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["ok", "a", "fine"],
        ["wrong", "b", "[bad]"],
        ["mend", "it"],
        ["absent", "c", "none"],
    ]
