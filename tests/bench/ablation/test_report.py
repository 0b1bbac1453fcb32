"""The report: what it says, that it says it in both forms, and that it needs nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ablations import SITTING, failed, manifest, record, run_folder
from pilotfish.bench.ablation.catalogue import described, runs
from pilotfish.bench.ablation.compare import compare
from pilotfish.bench.ablation.document import as_markdown
from pilotfish.bench.ablation.measures import Prices
from pilotfish.bench.ablation.report import blocks, load, write
from pilotfish.bench.ablation.tables import all_tables
from pilotfish.protocol.errors import UsageError

SLOW = [10.0, 10.0, 10.0, 80.0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its report; tests that change it make their own."""
    folder = made(tmp_path_factory.mktemp("runs") / "run")
    write(folder)
    return folder


def made(folder: Path) -> Path:
    records = [record(v, p) for v in ("baseline", "cloud_only") for p in range(6)]
    records += [record("no_kv_cache", p, token_ms=SLOW) for p in range(5)]
    records.append(failed("no_kv_cache", 5, failure={"code": "deadline", "sentence": "too <late> | again"}))
    told = manifest("baseline", "cloud_only", "no_kv_cache", asked=6)
    return run_folder(folder, told, records)


class Page(HTMLParser):
    """Every tag, and what each refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_page_fetches_nothing(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.tags.count("img") >= 6
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text


def test_both_forms_say_the_same(run: Path) -> None:
    page, markdown = ((run / name).read_text() for name in ("report.html", "report.md"))
    for words in ("0.50 × (0.50 to 0.50), worse", "equal", "18 of 18 requests"):
        assert words in page
        assert words in markdown
    assert page.count("<h2>") == len(re.findall(r"(?m)^## ", markdown))


def test_failures_are_named(run: Path) -> None:
    page, markdown = ((run / name).read_text() for name in ("report.html", "report.md"))
    assert "1 failure: counted as wrong answers" in markdown
    assert "| no_kv_cache | 0.0 | 1 | 5 | deadline | too <late> &#124; again |" in markdown
    assert "too &lt;late&gt; | again" in page


def test_pictures_and_tables_lie_beside_it(run: Path) -> None:
    for name in re.findall(r"\]\((.*?)\)", (run / "report.md").read_text()):
        assert (run / name).stat().st_size > 5000
    assert {"summary.csv", "latency.csv", "pareto.csv"} <= {path.name for path in (run / "tables").iterdir()}


def test_prices_are_kept(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    assert "cost" not in all_tables(load(folder))
    load(folder, Prices(cloud_hour=2.0))
    assert load(folder).prices == Prices(cloud_hour=2.0)
    assert "cost" in all_tables(load(folder))


def test_what_a_reader_must_know_comes_first(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    told = {
        **manifest("baseline", "cloud_only", "no_kv_cache", asked=6),
        "finished": None,
        "sittings": [SITTING, {**SITTING, "cpu": "another"}],
    }
    told["experiment"]["prompts"]["lessons_are_asked_too"] = True
    run_folder(folder, told, [record(prompt=p) for p in range(6)])
    data = load(folder)
    warnings, _, _ = as_markdown(list(blocks(data, all_tables(data)))).partition("## ")
    for words in ("This run is not finished", "its cpu changed in between", "learnt from prompts that were measured"):
        assert words in warnings


# --- between runs --------------------------------------------------------------------------------------------


def test_two_runs_are_compared_pair_by_pair(run: Path, tmp_path: Path) -> None:
    told = {**manifest("baseline", asked=6), "sittings": [{**SITTING, "packages": {"redis": "6"}}]}
    told["models"]["baseline"] = {"target": {"id": "b"}}
    after = run_folder(tmp_path / "after", told, [record(prompt=p, token_ms=SLOW) for p in range(6)])
    rows, differences = compare(run, after)
    (speed,) = (row for row in rows if row["measure"] == "tokens_per_second")
    assert (speed["value"], speed["verdict"], speed["pairs"]) == (pytest.approx(0.5), "worse", 6)
    assert differences == [
        'packages: {"redis": "5"} against {"redis": "6"}', 'baseline, target: {"id": "a"} against {"id": "b"}'
    ]  # fmt: skip


def test_runs_that_have_nothing_in_common_are_not_compared(run: Path, tmp_path: Path) -> None:
    other = manifest("baseline", rtt_ms=(9.0,))
    with pytest.raises(UsageError, match="no mode and RTT in common"):
        compare(run, run_folder(tmp_path / "b", other, [record(rtt_ms=9.0)]))
    other["experiment"]["prompts"]["sha256"] = "1" * 64
    with pytest.raises(UsageError, match="different prompts"):
        compare(run, run_folder(tmp_path / "c", other, [record(rtt_ms=9.0)]))


def test_runs_are_listed(run: Path) -> None:
    (found,) = runs(run.parent)
    assert found == described(run)
    assert (found["requests"], found["wanted"], found["failed"]) == (18, 18, 1)
    with pytest.raises(UsageError, match="holds no run"):
        described(run.parent)
