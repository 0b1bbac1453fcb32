from __future__ import annotations

import json
from pathlib import Path

import pytest
from redis.asyncio import Redis

from pilotfish.cli import calibration
from pilotfish.cli.calibration import prompt_lines
from pilotfish.cli.main import run_command
from pilotfish.cloud_worker.engines.fake import fake_target
from pilotfish.edge_agent.agent import Agent, Defaults, new_boot
from pilotfish.edge_agent.calibration import Calibration, Labelled
from pilotfish.edge_agent.drafters.fake import FakeDrafter
from pilotfish.edge_agent.gate import Evidence
from pilotfish.edge_agent.launch import learned_folder
from pilotfish.edge_agent.learned import Key, Store
from pilotfish.edge_agent.learning import Learner
from pilotfish.edge_agent.tokenizer import ByteTokenizer
from pilotfish.protocol import fleet
from pilotfish.protocol.broker import EdgeBroker, connect
from pilotfish.protocol.errors import UsageError
from pilotfish.protocol.settings import Settings


@pytest.fixture
def learnt(tmp_path: Path) -> list[str]:
    """Options that lead to a folder where 100 requests of 30 tokens were learnt: sure, fair and unsure ones."""
    evidence, tokens = Evidence(), [Labelled(0.999, True)] * 20 + [Labelled(0.9, True)] * 6 + [Labelled(0.3, False)] * 4
    for number in range(100):
        evidence.observe([*tokens[:-1], Labelled(0.9, number % 10 != 0)])
    sums = {**Calibration().sums(), **evidence.sums()}
    Store(tmp_path / "learned").add(Key("d" * 64, "t" * 16, 0.0, "margin"), sums)
    return ["--cache-dir", str(tmp_path)]


def test_a_budget_becomes_a_share_with_an_interval(learnt: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["calibrate", "--max-disagreement", "0.02", "--json", *learnt]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["requests"], said["tokens"], said["max_disagreement"]) == (100, 3000, 0.02)
    found = said["expected"]
    assert found["unverified"] == pytest.approx(0.9)
    assert found["unverified_low"] < 0.9 < found["unverified_high"]
    assert found["disagreement"] == pytest.approx(10 / 3000)
    assert found["disagreement"] < found["disagreement_high"] < 0.02


def test_an_offload_becomes_the_smallest_budget(learnt: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["calibrate", "--target-offload", "0.3", "--json", *learnt]) == 0
    small = json.loads(capsys.readouterr().out)
    assert run_command(["calibrate", "--target-offload", "0.8", "--json", *learnt]) == 0
    large = json.loads(capsys.readouterr().out)
    assert small["max_disagreement"] < large["max_disagreement"] < 0.02
    assert small["expected"]["unverified"] >= 0.3
    assert large["expected"]["unverified"] >= 0.8


def test_what_it_says_to_people(learnt: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["calibrate", "--max-disagreement", "0.02", *learnt]) == 0
    said = capsys.readouterr().out
    assert "max_disagreement = 0.02" in said
    assert "90.0% of the tokens" in said
    assert "with 95% confidence" in said


def test_too_small_a_budget_is_told(learnt: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["calibrate", "--max-disagreement", "0.0001", *learnt]) == 1
    assert "stays shut" in capsys.readouterr().out


def test_nothing_learnt_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["calibrate", "--cache-dir", str(tmp_path), "--temperature", "0.7"]) == 2
    assert "--prompts demo" in capsys.readouterr().err
    assert run_command(["calibrate", "--target-offload", "1.5"]) == 2
    assert "at most 1" in capsys.readouterr().err


def test_where_prompts_come_from(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("one\n\n two \n")
    assert prompt_lines(str(path)) == ["one", "two"]
    assert len(prompt_lines("demo")) >= 300
    path.write_text("\n")
    with pytest.raises(UsageError, match="no prompt"):
        prompt_lines(str(path))
    with pytest.raises(UsageError, match="one per line"):
        prompt_lines(str(tmp_path / "none"))


@pytest.mark.usefixtures("rig")
async def test_learning_from_prompts(
    redis: Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(redis_url=redis_url, max_tokens=30, cache_dir=tmp_path)

    async def fake_agent(_: Settings, url: str) -> Agent:
        client = connect(url)
        target = await fleet.find_target(client)
        broker, drafter = EdgeBroker(client, "default", "edge2", new_boot()), FakeDrafter(fake_target, alpha=0.8)
        learner = Learner(drafter.info.fingerprint, target.id, "margin", Store(learned_folder(settings)))
        return Agent(drafter, ByteTokenizer(), (), broker, target, Defaults(), learner)

    monkeypatch.setattr(calibration, "patient_agent", fake_agent)
    quality = await calibration.learn(settings, [f"prompt {number}" for number in range(20)])
    assert 150 < quality.labels < 300
    assert quality.ece < 0.1  # all drafts are right with the same chance
    assert quality.brier == pytest.approx(0.16, abs=0.04)
    known = calibration.known(settings)
    assert known.evidence.requests[0] == 20
    calibration.show(calibration.Report.of(known, 0.5, None, quality), as_json=False)
    assert "│" in capsys.readouterr().out
