"""Tables, from records whose figures can be worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ablations import ROUND, failed, manifest, record
from pilotfish.bench.ablation.data import Data, Row
from pilotfish.bench.ablation.measures import MEASURES, Prices, judged
from pilotfish.bench.ablation.tables import TABLES, all_tables

PROMPTS = range(6)


def data(*records: dict[str, object], rtt_ms: tuple[float, ...] = (0.0,), prices: Prices | None = None) -> Data:
    variants = dict.fromkeys(["baseline", *(str(one["variant"]) for one in records)])
    return Data(manifest(*variants, rtt_ms=rtt_ms), list(records), prices or Prices())


def rows(name: str, made: Data) -> list[Row]:
    return list(TABLES[name](made))


def figure(name: str, made: Data, variant: str = "baseline") -> float:
    found = made.interval(variant, made.rtts[0], name)
    assert found is not None
    return found.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("first_token_ms", 10), ("ms_per_token", 10), ("tokens_per_second", 100), ("accuracy", 1),
        ("cloud_rows_per_token", 2), ("cloud_steps_per_token", 0.5), ("cloud_ms_per_token", 1.5),
        ("acceptance", 2 / 3), ("wire_bytes_per_token", 100), ("unverified", 0),
    ],
)  # fmt: skip
def test_figures_of_one_request(name: str, value: float) -> None:
    assert figure(name, data(record())) == pytest.approx(value)


def test_drafts_behind_a_mismatch_were_not_judged() -> None:
    assert judged(record()) == [(0, 0.95, 1.0, True), (1, 0.9, 1.0, True), (2, 0.4, 0.2, False)]
    assert judged(record(rounds=[{**ROUND, "accepted": None}])) == []
    assert judged(record(rounds=[{**ROUND, "accepted": 4}]))[-1] == (3, 0.8, 0.9, True)


def test_a_failure_is_a_wrong_answer_and_nothing_else() -> None:
    made = data(record(), failed(prompt=2))
    assert figure("accuracy", made) == 0.5
    assert figure("tokens_per_second", made) == 100
    (row,) = rows("failures", made)
    assert (row["prompt"], row["code"], row["sentence"]) == (2, "deadline", "no verdict within 5 ms")


def test_a_text_is_compared_with_that_of_cloud_only() -> None:
    same, other = record(prompt=1), record(prompt=2, ids=[9, 9, 9, 9])
    alone = [record("cloud_only", prompt) for prompt in (1, 2)]
    assert figure("same_text", data(same, other, *alone)) == 0.5
    assert data(same).interval("baseline", 0.0, "same_text") is None


def test_the_summary_compares_with_the_baseline() -> None:
    base = [record(prompt=prompt) for prompt in PROMPTS]
    slow = [record("b", prompt, token_ms=[10.0, 10.0, 10.0, 80.0]) for prompt in PROMPTS]
    found = {(row["variant"], row["measure"]): row for row in rows("summary", data(*base, *slow))}
    assert found["b", "tokens_per_second"]["vs_baseline"] == pytest.approx(0.5)
    assert found["b", "tokens_per_second"]["verdict"] == "worse"
    assert found["b", "first_token_ms"]["verdict"] == "no difference"
    assert found["baseline", "tokens_per_second"]["verdict"] == ""


def test_the_frontier_holds_whom_nobody_dominates() -> None:
    cheap = record("edge_only", right=False, summary={**record()["summary"], "cloud_rows": 0})
    dear = record("cloud_only", summary={**record()["summary"], "cloud_rows": 40})
    found = {row["variant"]: row["on_frontier"] for row in rows("pareto", data(record(), cheap, dear))}
    assert found == {"baseline": True, "edge_only": True, "cloud_only": False}


def test_confidence_is_binned_and_its_error_weighted() -> None:
    found = {(row["kind"], row["from"]): row for row in rows("confidence", data(record()))}
    counts = {bin: (row["accepted"], row["rejected"]) for bin, row in found.items()}
    assert counts == {
        ("raw", 0.9): (2, 0),
        ("raw", 0.4): (0, 1),
        ("calibrated", 0.9): (2, 0),
        ("calibrated", 0.2): (0, 1),
    }
    assert found["raw", 0.9]["ece"] == pytest.approx((abs(0.95 + 0.9 - 2) + 0.4) / 3)
    assert found["calibrated", 0.9]["ece"] == pytest.approx(0.2 / 3)


def test_acceptance_by_position_counts_what_was_reached() -> None:
    two = data(record(), record(prompt=2, rounds=[{**ROUND, "accepted": 0}]))
    found = [(row["position"], row["judged"], row["acceptance"]) for row in rows("positions", two)]
    assert found == [(1, 2, 0.5), (2, 1, 1.0), (3, 1, 0.0)]


def test_corrections_stand_where_they_happened() -> None:
    long = record(origins=["accepted"] * 8 + ["corrected"], ids=[1] * 9, token_ms=[1.0] * 9)
    found = [(row["from_token"], row["tokens"], row["corrected"]) for row in rows("corrections", data(long))]
    assert found == [(1, 8, 0), (9, 1, 1)]


def test_break_even_is_where_the_lines_of_seconds_per_token_cross() -> None:
    def at(variant: str, rtt: float, ms: float) -> list[dict[str, object]]:
        return [record(variant, p, rtt_ms=rtt, token_ms=[1.0, 1.0, 1.0, ms]) for p in PROMPTS]

    made = data(
        *at("baseline", 0.0, 40), *at("baseline", 50.0, 140), *at("cloud_only", 0.0, 80), *at("cloud_only", 50.0, 80),
        rtt_ms=(0.0, 50.0),
    )  # fmt: skip
    (row,) = rows("break_even", made)
    assert (row["reference"], row["rtt_ms"], row["faster_at_lowest_rtt"]) == ("cloud_only", 20.0, "baseline")


def test_bytes_are_told_by_direction() -> None:
    (row,) = rows("wire", data(record()))
    assert (row["up_bytes_per_token"], row["down_bytes_per_token"]) == (75, 25)


def test_cost_is_told_if_there_are_prices_and_only_then() -> None:
    assert not rows("cost", data(record()))
    (row,) = rows("cost", data(record(), prices=Prices(cloud_hour=3.6, edge_hour=1.8, gigabyte=2.0)))
    assert row["cloud_per_1k_tokens"] == pytest.approx(1000 * 6e-6 / 4)
    assert row["edge_per_1k_tokens"] == pytest.approx(1000 * 1e-6 / 4)
    assert row["wire_per_1k_tokens"] == pytest.approx(1000 * 400 * 2e-9 / 4)
    assert row["cost_per_1k_tokens"] == pytest.approx(
        sum(row[f"{part}_per_1k_tokens"] for part in ("cloud", "edge", "wire"))
    )


def test_tables_are_written_as_csv(tmp_path: Path) -> None:
    table = all_tables(data(record()))["throughput"]
    with table.write(tmp_path).open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {"variant": "baseline", "rtt_ms": "0", "tokens_per_second": "100", "tokens_per_second_low": "",
                   "tokens_per_second_high": ""}  # fmt: skip


def test_every_figure_names_its_unit() -> None:
    assert all(one.unit and one.title for one in MEASURES.values())
