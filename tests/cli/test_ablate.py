"""`pilotfish ablate`, as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from ablations import manifest, record, run_folder
from pilotfish.bench.ablation.presets import PRESETS

Cli = Callable[..., "CompletedProcess[str]"]


def run(folder: Path, ms: float) -> Path:
    times = [1.0, 1.0, 1.0, ms]
    return run_folder(folder, manifest("baseline", asked=6), [record(prompt=p, token_ms=times) for p in range(6)])


def test_runs_are_listed_and_compared(cli: Cli, tmp_path: Path) -> None:
    a, b = run(tmp_path / "ablations/a", 40), run(tmp_path / "ablations/b", 80)
    listed = cli("ablate", "list")
    assert listed.stdout.splitlines()[0] == "ablations/a  2026-01-02T03:04:05Z  finished  baseline"
    assert len(json.loads(cli("ablate", "list", "--json").stdout)) == 2
    compared = cli("ablate", "compare", str(a), str(b))
    assert "tokens_per_second" in compared.stdout
    assert "0.50 × (0.50 to 0.50), worse" in compared.stdout
    rows = json.loads(cli("ablate", "compare", str(a), str(b), "--json").stdout)["rows"]
    assert {row["pairs"] for row in rows} == {6}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("list",), "there are no runs in ablations: `pilotfish ablate run --quick` makes one"),
        (("report", "nowhere"), "nowhere holds no run"),
        (("run", "--rtt", "fast"), "--rtt 'fast' is no list of milliseconds: write 0,20,50"),
        (("run", "--modes", "everything"), "there is no mode 'everything'"),
        (("run", "--prompts", "nowhere.jsonl"), "nowhere.jsonl cannot be read"),
        (("run", "--prompts", "broken.jsonl"), "broken.jsonl, line 2 is no JSON object"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(cli: Cli, tmp_path: Path, words: tuple[str, ...], complaint: str) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "fine"}\nbroken\n')
    ran = cli("ablate", *words)
    assert ran.returncode == 2
    assert complaint in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_own_prompts_are_measured_with_a_bar_and_a_failure_is_named(cli: Cli, tmp_path: Path) -> None:
    rows = [{"prompt": "one", "answer": "x", "family": "f"}, {"prompt": "far too long " * 400}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--engine", "fake", "--max-tokens", "12", "--modes", "baseline", "--seeds", "1", "--rtt", "0")
    ran = cli("ablate", "run", "--prompts", "mine.jsonl", "--lessons", "0", "--out", "run", *words)
    assert ran.returncode == 1, "a request failed"
    assert "2/2 0:00:00" in ran.stderr, "how far, and the time left"
    report = (tmp_path / "run/report.md").read_text()
    assert "1 failure: counted as wrong answers" in report
    assert "| baseline | 0.0 | 1 | 2 | too_long |" in report
    assert not (tmp_path / "run/tables/cost.csv").exists()
    assert cli("ablate", "report", "run", "--price-cloud-hour", "2.5").returncode == 0
    assert (tmp_path / "run/tables/cost.csv").exists()
    assert (tmp_path / "run/plots/cost.png").exists()


@pytest.mark.slow
@pytest.mark.llamacpp
@pytest.mark.timeout(280)
def test_a_quick_run_of_all_modes_on_the_demo_pair(quick: CompletedProcess[str]) -> None:
    assert quick.returncode == 0, quick.stderr
    told = json.loads(quick.stdout)
    assert (told["requests"], told["failed"]) == (6 * 2 * 19, 0)
    folder = Path(told["folder"])
    report = (folder / "report.md").read_text()
    assert "## Confidence" in report
    plots = {path.stem for path in (folder / "plots").iterdir()}
    tables = {path.stem for path in (folder / "tables").iterdir()}
    assert (
        {"latency", "throughput", "rtt", "pareto", "confidence", "positions", "corrections", "wire"} <= plots <= tables
    )
    assert {"summary", "break_even"} <= tables
    told = json.loads((folder / "manifest.json").read_text())
    (sitting,) = told["sittings"]
    assert {"pilotfish", "llama-cpp-python"} <= set(sitting["packages"])
    assert len(sitting["code"].get("revision", "0" * 40)) == 40
    assert {"cpu", "cores", "python", "load_average"} <= set(sitting)
    for variant in PRESETS:
        assert told["models"][variant]["draft"]["fingerprint"]
        assert told["models"][variant]["target"]["id"]
        assert told["settings"][variant]["mode"]
    texts = {}
    for line in (folder / "rounds.jsonl").read_text().splitlines():
        one = json.loads(line)
        texts[one["variant"], one["rtt_ms"], one["prompt"]] = one["ids"]
    exact = [key for key in texts if key[0] == "no_confidence"]
    assert len(exact) == 2 * 19
    assert all(texts[key] == texts["cloud_only", *key[1:]] for key in exact)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(280)
def test_a_run_with_vllm_says_the_same_with_drafts_and_without(tmp_path: Path) -> None:
    asked = [{"prompt": f"Add {number} and 57.", "answer": f"{number} + 57 = {number + 57}"} for number in (348, 120)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    words = ("--engine", "vllm", "--modes", "no_confidence,cloud_only", "--rtt", "0", "--seeds", "1", "--lessons", "0")
    ran = measured(
        *words, "--prompts", str(tmp_path / "mine.jsonl"), "--max-tokens", "24", "--out", str(tmp_path / "run")
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert (told["requests"], told["failed"]) == (3 * 2, 0)
    records = [json.loads(line) for line in (tmp_path / "run/rounds.jsonl").read_text().splitlines()]
    texts = {(one["variant"], one["prompt"]): one["ids"] for one in records}
    assert all(texts["no_confidence", number] == texts["cloud_only", number] for number in (1, 2))


@pytest.fixture
def quick(tmp_path: Path) -> CompletedProcess[str]:
    """Three minutes are what the issue allows; a busy machine of two cores takes about two."""
    return measured("--quick", "--engine", "llamacpp", "--out", str(tmp_path / "run"))


def measured(*words: str) -> CompletedProcess[str]:
    """`ablate run`, for as long as it takes."""
    program = [sys.executable, "-m", "pilotfish.cli.main", "ablate", "run", "--json"]
    return subprocess.run([*program, *words], capture_output=True, text=True, timeout=240)
