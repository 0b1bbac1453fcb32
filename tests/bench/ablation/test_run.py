"""An experiment on the fake pair, with real processes: Redis, worker, proxy, agents."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pilotfish.bench.ablation import manifest as manifests
from pilotfish.bench.ablation import run as course
from pilotfish.bench.ablation.experiment import Experiment
from pilotfish.bench.ablation.presets import variants
from pilotfish.bench.ablation.prompts import Question
from pilotfish.bench.ablation.records import Key, key_of, read
from pilotfish.bench.ablation.rig import Edge
from pilotfish.bench.ablation.run import draw_seed, grouped, measure, turned
from pilotfish.protocol.errors import PilotfishError, UsageError

FAKE = {"engine": "fake", "max_tokens": 12, "cores": "0"}


@pytest.fixture(autouse=True)
def bare_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("REDIS_URL", raising=False)


def prompts(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def experiment(folder: Path, **changes: Any) -> Experiment:
    made = {"modes": "baseline,cloud_only", "seeds": 1, "rtt_ms": [0], "lessons": 0, "settings": FAKE}
    if "prompts" not in changes:
        rows = [{"prompt": f"say {word}", "answer": "x", "family": "f"} for word in ("one", "two")]
        made["prompts"] = prompts(folder, *rows)
    return Experiment(folder / "run", **{**made, **changes})


class Interrupted(Exception):
    pass


async def test_a_run_that_is_interrupted_goes_on_and_asks_nothing_twice(tmp_path: Path) -> None:
    seen: list[str] = []

    def interrupt(done: int, total: int, what: str) -> None:
        seen.append(what)
        if done == 3:
            raise Interrupted

    asked = experiment(tmp_path, rtt_ms=[5])
    with pytest.raises(Interrupted):
        await measure(asked, interrupt)
    first = read(asked.out)
    assert len(first) == 3
    with pytest.raises(UsageError, match="holds another experiment: its seeds was 1, not 2"):
        await measure(experiment(tmp_path, rtt_ms=[5], seeds=2))
    await measure(asked)
    records = read(asked.out)
    assert records[:3] == first
    assert len({key_of(one) for one in records}) == len(records) == 2 * 2
    assert not any(one["failure"] for one in records)
    told = manifests.read(asked.out)
    assert told["finished"]
    assert len(told["sittings"]) == 2
    check_what_was_recorded(records)


def check_what_was_recorded(records: list[dict[str, Any]]) -> None:
    texts = {(one["variant"], one["prompt"]): one["ids"] for one in records}
    assert all(texts["cloud_only", number] == texts["baseline", number] for number in (1, 2))
    for one in records:
        assert len(one["ids"]) == len(one["token_ms"]) == len(one["origins"]) == 12
        assert one["rounds"]
    drafted = [one for one in records if one["variant"] == "baseline"]
    for one in drafted:
        assert one["summary"]["cloud_rows"] == sum(round_["rows"] for round_ in one["rounds"])
        for round_ in one["rounds"]:
            assert len(round_["confidences"]) == round_["drafted"]
            assert None not in round_["confidences"]
        sent = sum(round_["job_bytes"] for round_ in one["rounds"])
        assert sent < one["wire_up"] < sent + 400 * (len(one["rounds"]) + 2)
    assert min(one["token_ms"][0] for one in drafted) > 5


@pytest.mark.slow
async def test_without_kv_every_round_computes_its_whole_prefix(tmp_path: Path) -> None:
    asked = experiment(tmp_path, modes="no_kv_cache", prompts=prompts(tmp_path, {"prompt": "Once.", "answer": "x"}))
    await measure(asked)
    found = {one["variant"]: one["rounds"] for one in read(asked.out)}
    answered = [each for each in found["no_kv_cache"] if not each["refused"]]
    assert all(each["rows"] == each["base"] + each["drafted"] and not each["cached"] for each in answered)
    assert len(answered) > 1
    assert any(each["rows"] < each["base"] and each["cached"] for each in found["baseline"]), "the worker kept it"


@pytest.mark.slow
async def test_a_request_that_fails_is_named_and_the_others_are_measured(tmp_path: Path) -> None:
    rows = [{"prompt": "short", "answer": "x"}, {"prompt": "far too long " * 400, "answer": "x"}]
    asked = experiment(tmp_path, modes="baseline", prompts=prompts(tmp_path, *rows))
    await measure(asked)
    good, bad = read(asked.out)
    assert good["failure"] is None
    assert bad["failure"]["code"] == "too_long"
    assert bad["right"] is False


@pytest.mark.slow
async def test_it_ends_when_everything_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "FAILURES_MAX", 2)
    rows = [{"prompt": "far too long " * 400}] * 9
    with pytest.raises(PilotfishError, match="2 requests in a row failed, the last with: the prompt's"):
        await measure(experiment(tmp_path, modes="baseline", prompts=prompts(tmp_path, *rows)))


@pytest.mark.slow
async def test_an_agent_that_dies_is_a_failure_and_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real, killed = experiment(tmp_path, modes="baseline"), Edge.ask, list[int]()

    async def ask(self: Edge, question: Question, seed: int, rtt_ms: float) -> dict[str, Any]:
        if question.number == 1 and not killed:
            killed.append(self.child.pid)
            os.kill(self.child.pid, signal.SIGKILL)
        return await real(self, question, seed, rtt_ms)

    monkeypatch.setattr(Edge, "ask", ask)
    await measure(asked)
    first, second = read(asked.out)
    assert first["failure"]["code"] == "engine_failed"
    assert second["failure"] is None


@pytest.mark.slow
async def test_what_does_not_start_says_why(tmp_path: Path) -> None:
    settings = {**FAKE, "engine": "llamacpp", "target_model": str(tmp_path / "none.gguf")}
    with pytest.raises(PilotfishError, match=r"the worker did not start: .*none.gguf does not exist"):
        await measure(experiment(tmp_path, settings=settings))


def test_an_experiment_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one seed at least"):
        Experiment(tmp_path, seeds=0)
    with pytest.raises(UsageError, match="RTTs of 0 ms or more"):
        Experiment(tmp_path, rtt_ms=[-1])


def test_variants_of_the_same_worker_settings_share_a_worker() -> None:
    names = [[one.name for one in group] for group in grouped(variants("all"), {})]
    assert ["no_kv_cache"] in names
    assert len(names) == 2


def test_turns_begin_with_another_one() -> None:
    assert [list(turned("abc", by)) for by in range(3)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_draws_depend_on_seed_and_prompt_and_nothing_else() -> None:
    assert draw_seed(Key("a", 0, 1, 5)) == draw_seed(Key("b", 50, 1, 5)) != draw_seed(Key("a", 0, 2, 5))
